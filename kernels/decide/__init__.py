"""The kernels that decide a round: filters, divergences, acceptance, commits, what the host reads."""
