"""Benchmarks: the gateway beside the bare parts that it is made of, measured in one run."""
