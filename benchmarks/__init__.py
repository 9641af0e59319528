"""Measures every op against its peers and the machine's ceilings: ``python -m benchmarks run``."""
