"""The kernels of a forward pass, one file an op."""
