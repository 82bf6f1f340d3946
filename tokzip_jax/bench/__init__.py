"""Benchmarks: `python -m tokzip_jax.bench NAME`. They measure and report; nothing passes or fails by a clock."""
