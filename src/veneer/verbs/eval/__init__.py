"""Measures base and adapters on texts and benchmarks."""
