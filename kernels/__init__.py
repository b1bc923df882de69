"""One file per op; reference.py holds all of them in plain torch. Kernels know tensors, nothing else."""
