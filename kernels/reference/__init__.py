"""Every op in plain torch: the oracle of the kernels, and the `torch` backend. Imports no Triton."""
