"""Measurements behind the figures of the README: `sid bench ...`, or `python -m benchmarks.<name>`."""
