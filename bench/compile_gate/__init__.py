"""Every kernel compiled ahead of time, for GPUs that need not be there, its machine code held to a gate."""
