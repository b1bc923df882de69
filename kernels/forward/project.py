"""Projection onto the residual stream: out = residual + dtype(x W^T + b), and what the norm behind it needs.

Serves the attention output and the MLP's down projection. The product is rounded to dtype before the addition,
as transformers does. For the RMSNorm that reads the result, with the weight w_norm: scaled = dtype(out w_norm),
and sumsq[j, t] = sum of out[t, c]^2 over channels c of 64-channel tile j: of the rounded values, float32, by
neighbours (`tree_sum`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.configs import ProjectionConfig
from pyramid_rt.kernels.forward.product import (
    EVERY,
    Workspace,
    check_workspace,
    product,
    product_grid,
    product_options,
    round_to,
    tree_sum,
)
from pyramid_rt.kernels.launch import (
    CHANNELS,
    DTYPES,
    Launch,
    active_flag,
    check_length,
    check_strides,
    check_tensor,
    runner,
    tiles,
)
from pyramid_rt.kernels.limits import WINDOW


@triton.jit
def _store(
    acc: tl.tensor,
    column: tl.tensor,
    tile: tl.tensor,
    length: tl.tensor,
    epilogue,
    OPTIONS,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Bias, residual and sums of squares of a [BLOCK_N, 16 or 64] product."""
    bias_ptr, norm_ptr, residual_ptr, stride_residual, out_ptr, scaled_ptr, stride_out, sumsq_ptr, N = (
        epilogue
    )
    HAS_BIAS: tl.constexpr = OPTIONS[0]
    COLS: tl.constexpr = acc.shape[1]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = column + tl.arange(0, COLS)
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row[:, None] < length) & (n[None, :] < N)
    y = tl.trans(acc)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    old = tl.load(residual_ptr + row[:, None] * stride_residual + n[None, :], mask=mask, other=0.0)
    y = round_to(round_to(y, dtype, UPCAST) + old.to(tl.float32), dtype, UPCAST)
    tl.store(out_ptr + row[:, None] * stride_out + n[None, :], y.to(dtype), mask=mask)
    gain = tl.load(norm_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    scaled = round_to(y * gain[None, :], dtype, UPCAST).to(dtype)
    tl.store(scaled_ptr + row[:, None] * stride_out + n[None, :], scaled, mask=mask)
    squares = tl.where(mask, y * y, 0.0)
    PARTS: tl.constexpr = BLOCK_N // 64
    sums = tree_sum(tl.reshape(squares, (COLS * PARTS, 64)), COLS * PARTS, 6)
    part = tl.arange(0, COLS * PARTS)
    channel_tile = tile * PARTS + part % PARTS
    out_row = column + part // PARTS
    keep = (out_row < length) & (channel_tile * 64 < N)
    tl.store(sumsq_ptr + channel_tile * 64 + out_row, sums, mask=keep)


# The window's length stays a run-time value: one binary serves every T.
@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["active_ptr"])
def project_kernel(
    x_ptr: tl.tensor,
    stride_x: tl.tensor,
    w_ptr: tl.tensor,
    stride_w: tl.tensor,
    bias_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    stride_residual: tl.tensor,
    out_ptr: tl.tensor,
    scaled_ptr: tl.tensor,
    stride_out: tl.tensor,
    sumsq_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    active_ptr: tl.tensor,
    length: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SUBS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW_STAGES: tl.constexpr,
    WIDE_STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One program: BLOCK_N channels, one split of K, 16 columns or the whole window."""
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = (w_ptr, stride_w, n, n < N)
    if tl.load(active_ptr) == 0:
        return
    epilogue = (
        bias_ptr, norm_ptr, residual_ptr, stride_residual, out_ptr, scaled_ptr, stride_out, sumsq_ptr, N
    )  # fmt: skip
    product(
        (x_ptr, stride_x, x_ptr), weights, (x_ptr, 0.0),
        (partials_ptr, counters_ptr), epilogue, (HAS_BIAS,), length, K, _store,
        EVERY, -1, SUBS, SPLITS, BLOCK_N, BLOCK_K, NARROW_STAGES, WIDE_STAGES, EVEN, UPCAST,
    )  # fmt: skip


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    length: int,
    out: Tensor,
    scaled: Tensor,
    sumsq: Tensor,
    workspace: Workspace,
    config: ProjectionConfig,
    *,
    active: Tensor | None = None,
) -> Launch:
    """The launch of a projection onto the residual stream.

    Args:
        x: [64, K] dtype (float32, bfloat16 or float16).
        weight: [C, K] dtype.
        bias: [C] dtype, or None.
        residual: [64, C] dtype.
        norm: [C] dtype, contiguous: weight of the RMSNorm that reads the result.
        length: T, 1 to 64.
        out: [64, C] dtype, may be `residual` itself; rows T and later are left alone.
        scaled: [64, C] dtype with the strides of `out`, another tensor; rows T and later are left alone.
        sumsq: [ceil(C / 64), 64] float32, contiguous; columns T and later are left alone.
        workspace: of at least `partial_elements(C, ...)` and `counter_elements(C, ...)`.
        config: `projection_config("project", ...)`; its block_n must be a multiple of 64.
        active: 0-d int64, read on the device: 0 and the launch does nothing. None: it always runs.

    Raises:
        ValueError: names the argument that does not fit.
    """
    device, dtype = x.device, weight.dtype
    check_length(length)
    check_tensor("weight", weight, (None, None), DTYPES, device)
    channels, width = weight.shape
    check_tensor("x", x, (WINDOW, width), dtype, device)
    if bias is not None:
        check_tensor("bias", bias, (channels,), dtype, device, contiguous=True)
    check_tensor("residual", residual, (WINDOW, channels), dtype, device)
    check_tensor("norm", norm, (channels,), dtype, device, contiguous=True)
    check_tensor("out", out, (WINDOW, channels), dtype, device)
    check_tensor("scaled", scaled, (WINDOW, channels), dtype, device)
    check_strides("scaled", scaled, "out", out)
    check_tensor("sumsq", sumsq, (tiles(channels, CHANNELS), WINDOW), torch.float32, device, contiguous=True)
    if config.block_n % CHANNELS:
        raise ValueError(f"config.block_n is {config.block_n}, expected a multiple of {CHANNELS}")
    check_workspace(workspace, channels, config.block_n, config.splits, device)
    return Launch(
        project_kernel,
        product_grid(config, channels, length),
        (
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            weight if bias is None else bias,
            norm,
            residual,
            residual.stride(0),
            out,
            scaled,
            out.stride(0),
            sumsq,
            workspace.partials,
            workspace.counters,
            active_flag(active, device),
            length,
            channels,
            width,
        ),
        {"HAS_BIAS": bias is not None, **product_options(project_kernel, config, width)},
    )


run = runner(plan)
