"""The peers of benchmarks/peers.py, one a file: how each is merged, what it stores and how it answers."""
