"""Remedies of a user for a capture that failed, by its cause."""

from __future__ import annotations

import torch

NO_GRAPHS = "graphs=False runs the same rounds without capture"


def remedy(error: BaseException) -> str:
    """One clause for the end of a message; looks at the error and at what caused it."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    text = " ".join(str(one) for one in chain)
    if any(isinstance(one, torch.OutOfMemoryError) for one in chain):
        return (
            "a smaller max_seq or dtype takes less memory, and so does another process's part of the device"
        )
    if "C compiler" in text or any(type(one).__module__.startswith("triton") for one in chain):
        return (
            "this is not the capture's doing but the kernels' compilation: Triton needs a C compiler (gcc, "
            "clang or the variable CC) for its launchers; backend='torch' compiles nothing"
        )
    if "captur" not in text and ("CUDA error" in text or "illegal" in text):
        return "the device itself failed, and nothing runs on it in this process any more"
    return NO_GRAPHS
