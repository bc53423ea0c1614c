"""The step-wise online method: preference model, scorers, resampler, loop."""
