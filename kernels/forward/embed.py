"""Embedding: x[t] = table[tokens[t]] for the window's rows, and what the norm behind it needs.

With that RMSNorm's weight w_norm: scaled = dtype(x w_norm), and sumsq[j, t] = sum of x[t, c]^2 over channels c
of 64-channel tile j, in float32, by neighbours (`tree_sum`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.forward.product import round_to, tree_sum
from pyramid_rt.kernels.launch import (
    CHANNELS,
    DTYPES,
    Launch,
    active_flag,
    check_length,
    check_strides,
    check_tensor,
    interpreted,
    runner,
    tiles,
)
from pyramid_rt.kernels.limits import WINDOW


# The window's length stays a run-time value: one binary serves every T.
@triton.jit(
    do_not_specialize=["length"], do_not_specialize_on_alignment=["tokens_ptr", "start_ptr", "active_ptr"]
)
def embed_kernel(
    table_ptr: tl.tensor,
    stride_table: tl.tensor,
    tokens_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scaled_ptr: tl.tensor,
    stride_out: tl.tensor,
    sumsq_ptr: tl.tensor,
    start_ptr: tl.tensor,
    active_ptr: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    PLACED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One program: 16 rows of 64 channels."""
    if tl.load(active_ptr) == 0:
        return
    tile = tl.program_id(0)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    channel = tile * 64 + tl.arange(0, 64)
    keep = row < length
    begin = tl.load(start_ptr) if PLACED else 0
    token = tl.load(tokens_ptr + begin + row, mask=keep, other=0)
    mask = keep[:, None] & (channel[None, :] < width)
    x = tl.load(table_ptr + token[:, None] * stride_table + channel[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + row[:, None] * stride_out + channel[None, :], x, mask=mask)
    wide = x.to(tl.float32)
    gain = tl.load(norm_ptr + channel, mask=channel < width, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    scaled = round_to(wide * gain[None, :], dtype, UPCAST).to(dtype)
    tl.store(scaled_ptr + row[:, None] * stride_out + channel[None, :], scaled, mask=mask)
    tl.store(sumsq_ptr + tile * 64 + row, tree_sum(wide * wide, 16, 6), mask=keep)


def plan(
    table: Tensor,
    tokens: Tensor,
    norm: Tensor,
    length: int,
    out: Tensor,
    scaled: Tensor,
    sumsq: Tensor,
    start: Tensor | None = None,
    *,
    active: Tensor | None = None,
) -> Launch:
    """The launch of an embedding gather.

    Args:
        table: [V, C] dtype (float32, bfloat16 or float16).
        tokens: [length or more] int64, contiguous, each in 0 .. V - 1.
        norm: [C] dtype, contiguous: weight of the first layer's RMSNorm.
        length: T, 1 to 64.
        out: [64, C] dtype; rows T and later are left alone.
        scaled: [64, C] dtype with the strides of `out`; rows T and later are left alone.
        sumsq: [ceil(C / 64), 64] float32, contiguous; columns T and later are left alone.
        start: 0-d int64, read on the device: the window is tokens[start : start + T], which the caller keeps
            inside. None: it is tokens[:T].
        active: 0-d int64, read on the device: 0 and the launch does nothing. None: it always runs.

    Raises:
        ValueError: names the argument that does not fit.
    """
    device = table.device
    check_length(length)
    check_tensor("table", table, (None, None), DTYPES, device)
    check_tensor("tokens", tokens, (None,), torch.int64, device, contiguous=True)
    if tokens.shape[0] < length:
        raise ValueError(f"tokens has {tokens.shape[0]} entries, expected at least length = {length}")
    width = table.shape[1]
    check_tensor("norm", norm, (width,), table.dtype, device, contiguous=True)
    check_tensor("out", out, (WINDOW, width), table.dtype, device)
    check_tensor("scaled", scaled, (WINDOW, width), table.dtype, device)
    check_strides("scaled", scaled, "out", out)
    check_tensor("sumsq", sumsq, (tiles(width, CHANNELS), WINDOW), torch.float32, device, contiguous=True)
    if start is not None:
        check_tensor("start", start, (), torch.int64, device)
    return Launch(
        embed_kernel,
        (tiles(width, CHANNELS), tiles(length, 16), 1),
        (
            table,
            table.stride(0),
            tokens,
            norm,
            out,
            scaled,
            out.stride(0),
            sumsq,
            tokens if start is None else start,
            active_flag(active, device),
            length,
            width,
        ),
        {
            "PLACED": start is not None,
            "UPCAST": interpreted(embed_kernel),
            "num_warps": 2,
            "enable_fp_fusion": False,
        },
    )


run = runner(plan)
