"""Paired timings of this repository against the published algorithms; run each as `python -m benchmarks.<name>`."""
