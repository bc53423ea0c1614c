"""Pictures and numbers of a model: samples, validation, scores, reports."""
