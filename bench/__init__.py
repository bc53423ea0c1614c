"""Benchmarks, one command each: `python -m bench.step`, `python -m bench.pair_loss`, ..."""
