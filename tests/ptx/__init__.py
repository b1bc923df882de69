"""The PTX machine: compiled kernels executed on a CPU, in adversarial schedules, with everything checked."""
