"""The peers of benchmarks/peers.py and peers_served.py, one a file: how each is merged and stored, and how it answers."""
