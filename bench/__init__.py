"""Benchmarks, one command each: `python -m bench.pair_loss`, `python -m bench.overhead`."""
