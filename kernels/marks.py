"""A launch that does next to nothing: in a device's records of its kernels it says where a piece of work begins."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.launch import Launch, check_tensor


@triton.jit
def mark_kernel(count_ptr: tl.tensor) -> None:
    """One program."""
    tl.store(count_ptr, tl.load(count_ptr) + 1)


def plan(count: Tensor) -> Launch:
    """The launch of a mark.

    Args:
        count: [1] int64, raised by one for each mark.

    Raises:
        ValueError: names what does not fit.
    """
    check_tensor("count", count, (1,), torch.int64, count.device)
    return Launch(mark_kernel, (1, 1, 1), (count,), {"num_warps": 1, "num_stages": 1})
