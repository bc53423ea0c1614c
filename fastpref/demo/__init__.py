"""The embedded default: clips, labels, a small pretrained checkpoint and the run that uses them."""
