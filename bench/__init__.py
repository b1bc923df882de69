"""Benchmarks and the training of the demo models."""
