"""Measurements of normkit beside its peers: `python -m benchmarks --help`."""
