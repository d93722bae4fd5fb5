"""The peers of benchmarks/peers.py and peers_served.py, one a file: how each is merged and stored, how it answers."""
