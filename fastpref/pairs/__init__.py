"""From a folder of media to batches: sources, rows, decoding, encoding, the encoded set."""
