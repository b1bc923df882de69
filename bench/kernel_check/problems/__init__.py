"""Ops with inputs, run on any window of their rows and held against float64."""
