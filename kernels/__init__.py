"""Kernels: a forward pass, the decisions of a round, and the same in plain torch. They know tensors, nothing else."""
