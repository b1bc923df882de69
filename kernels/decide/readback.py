"""The vector that the host reads of a round: the only thing that leaves the device.

numbers = (begin, end, ended, cached of N tiers, bad of N tiers, counters of N tiers, tokens begin .. begin + M - 1),
begin being where the last report ended; then begin = end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.decide.decode_state import COUNTERS, DecodeState, bad_word, cached_word
from pyramid_rt.kernels.launch import Launch, check_tensor


@triton.jit(do_not_specialize_on_alignment=["reported_ptr"])
def report_kernel(
    control_ptr: tl.tensor,
    ended_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    reported_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    capacity: tl.tensor,
    N: tl.constexpr,
    MOST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program."""
    begin, end = tl.load(reported_ptr), tl.load(control_ptr)
    tl.store(numbers_ptr, begin)
    tl.store(numbers_ptr + 1, end)
    tl.store(numbers_ptr + 2, tl.load(ended_ptr).to(tl.int64))
    i = tl.arange(0, BLOCK)
    cached = i < N
    tl.store(numbers_ptr + 3 + i, tl.load(cached_word(control_ptr, i), mask=cached), mask=cached)
    tl.store(numbers_ptr + 3 + N + i, tl.load(bad_word(control_ptr, N, i), mask=cached), mask=cached)
    counted = i < N * COLUMNS
    tl.store(numbers_ptr + 3 + 2 * N + i, tl.load(counters_ptr + i, mask=counted), mask=counted)
    row = i < MOST
    tokens = tl.load(tokens_ptr + begin + i, mask=row & (begin + i < capacity), other=0)
    tl.store(numbers_ptr + 3 + (2 + COLUMNS) * N + i, tokens, mask=row)
    # Every warp has read where the last report ended.
    tl.debug_barrier()
    tl.store(reported_ptr, end)


def plan(state: DecodeState, reported: Tensor, numbers: Tensor, most: int) -> Launch:
    """The launch of a report.

    Args:
        state: see `DecodeState`; N tiers.
        reported: 0-d int64, where the last report ended; moved to the end.
        numbers: [3 + (2 + 7) N + most] int64, contiguous.
        most: M, tokens a report may hold, at least 1.

    Raises:
        ValueError: names the argument that does not fit.
    """
    state.check(0, 1)
    device, tiers = state.control.device, state.tiers_count
    check_tensor("reported", reported, (), torch.int64, device)
    if most < 1:
        raise ValueError(f"most is {most}, expected at least 1")
    size = 3 + (2 + COUNTERS) * tiers + most
    check_tensor("numbers", numbers, (size,), torch.int64, device, contiguous=True)
    return Launch(
        report_kernel,
        (1, 1, 1),
        (
            state.control, state.ended.view(torch.uint8), state.counters, state.tokens, reported, numbers,
            state.tokens.shape[0],
        ),
        {
            "N": tiers, "MOST": most, "COLUMNS": COUNTERS,
            "BLOCK": triton.next_power_of_2(max(tiers * COUNTERS, most)),
            "num_warps": 1, "num_stages": 1, "enable_fp_fusion": False,
        },
    )  # fmt: skip
