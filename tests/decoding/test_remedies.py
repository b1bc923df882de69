"""Remedies that a failed capture tells its user."""

from __future__ import annotations

import pytest
import torch

from pyramid_rt.decoding.remedies import remedy


class CompilationError(Exception):
    """Stands for Triton's."""

    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("reads a device value"), "graphs=False"),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), "graphs=False"),
        (torch.OutOfMemoryError("CUDA out of memory"), "max_seq"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "C compiler"),
        (CompilationError("at 3:4"), "C compiler"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "nothing runs on it"),
    ],
)
def test_by_cause(error: Exception, said: str) -> None:
    assert said in remedy(error)


def test_the_cause_of_the_cause_counts() -> None:
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert "max_seq" in remedy(error)
