"""RMSNorm, gate and up projection, SiLU product: out = silu(gate) * up, silu(z) = z / (1 + exp(-z)).

gate = (s Wg^T) r + bg, up = (s Wu^T) r + bu, with s = dtype(x w_norm) and r = 1 / sqrt(mean(x^2) + eps) from the
sums of squares, both left by the writer of the residual stream x. gate, up and silu(gate) are rounded to dtype,
as transformers does.

A tile's weight rows alternate between gate and up, so both halves of a product are in one accumulator.
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
    split_pairs,
    tile_log2,
)
from pyramid_rt.kernels.launch import (
    CHANNELS,
    DTYPES,
    Launch,
    active_flag,
    check_length,
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
    """silu(gate) * up of a [BLOCK_N, 16 or 64] product."""
    bias_ptr, out_ptr, stride_out, inner = epilogue
    HAS_BIAS: tl.constexpr = OPTIONS[0]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    COLS: tl.constexpr = acc.shape[1]
    PAIRS: tl.constexpr = BLOCK_N // 2
    row = column + tl.arange(0, COLS)
    n = tile.to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    mask = (n[:, None] < inner) & (row[None, :] < length)
    gate, up = split_pairs(acc, PAIRS, COLS)
    if HAS_BIAS:
        gate += tl.load(bias_ptr + n, mask=n < inner, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + inner + n, mask=n < inner, other=0.0).to(tl.float32)[:, None]
    gate, up = round_to(gate, dtype, UPCAST), round_to(up, dtype, UPCAST)
    silu = round_to(gate / (1.0 + tl.exp(-gate)), dtype, UPCAST)
    product = round_to(silu * up, dtype, UPCAST).to(dtype)
    tl.store(out_ptr + row[None, :] * stride_out + n[:, None], product, mask=mask)


# The window's length stays a run-time value: one binary serves every T.
@triton.jit(do_not_specialize=["length", "eps"], do_not_specialize_on_alignment=["active_ptr"])
def gate_up_kernel(
    x_ptr: tl.tensor,
    stride_x: tl.tensor,
    sumsq_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    stride_w: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride_out: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    active_ptr: tl.tensor,
    length: tl.tensor,
    inner: tl.tensor,
    K: tl.tensor,
    HAS_BIAS: tl.constexpr,
    NORM_LOG2: tl.constexpr,
    SUBS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW_STAGES: tl.constexpr,
    WIDE_STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One program: BLOCK_N / 2 channels, one split of K, 16 columns or the whole window."""
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = (w_ptr, stride_w, n // 2 + (n % 2) * inner, n < 2 * inner)
    if tl.load(active_ptr) == 0:
        return
    product(
        (x_ptr, stride_x, x_ptr), weights, (sumsq_ptr, eps), (partials_ptr, counters_ptr),
        (bias_ptr, out_ptr, stride_out, inner), (HAS_BIAS,), length, K, _store,
        EVERY, NORM_LOG2, SUBS, SPLITS, BLOCK_N, BLOCK_K, NARROW_STAGES, WIDE_STAGES, EVEN, UPCAST,
    )  # fmt: skip


def plan(
    x: Tensor,
    sumsq: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    length: int,
    out: Tensor,
    workspace: Workspace,
    config: ProjectionConfig,
    *,
    active: Tensor | None = None,
) -> Launch:
    """The launch of a normalised gate and up projection.

    Args:
        x: [64, C] dtype (float32, bfloat16 or float16), the residual stream times the weight of the RMSNorm.
        sumsq: [ceil(C / 64), 64] float32, contiguous: sums of squares of the residual stream per 64-channel tile.
        eps: of the RMSNorm.
        weight: [2 I, C] dtype, rows of gate, then up.
        bias: [2 I] dtype, or None.
        length: T, 1 to 64.
        out: [64, I] dtype; rows T and later are left alone.
        workspace: of at least `partial_elements(2 I, ...)` and `counter_elements(2 I, ...)`.
        config: `projection_config("gate_up", ...)`.
        active: 0-d int64, read on the device: 0 and the launch does nothing. None: it always runs.

    Raises:
        ValueError: names the argument that does not fit.
    """
    device, dtype = x.device, weight.dtype
    check_length(length)
    check_tensor("weight", weight, (None, None), DTYPES, device)
    rows, width = weight.shape
    if rows % 2:
        raise ValueError(f"weight has {rows} rows, expected an even number: gate, then up")
    check_tensor("x", x, (WINDOW, width), dtype, device)
    check_tensor("sumsq", sumsq, (tiles(width, CHANNELS), WINDOW), torch.float32, device, contiguous=True)
    if bias is not None:
        check_tensor("bias", bias, (rows,), dtype, device, contiguous=True)
    check_tensor("out", out, (WINDOW, rows // 2), dtype, device)
    check_workspace(workspace, rows, config.block_n, config.splits, device)
    return Launch(
        gate_up_kernel,
        product_grid(config, rows, length),
        (
            x,
            x.stride(0),
            sumsq,
            eps,
            weight,
            weight.stride(0),
            weight if bias is None else bias,
            out,
            out.stride(0),
            workspace.partials,
            workspace.counters,
            active_flag(active, device),
            length,
            rows // 2,
            width,
        ),
        {
            "HAS_BIAS": bias is not None,
            "NORM_LOG2": tile_log2(width),
            **product_options(gate_up_kernel, config, width),
        },
    )


run = runner(plan)
