"""RMSNorm, joint Q, K, V projection, RoPE, and K and V into the static cache.

(q, k, v) = (s W^T) r + b, with s = dtype(x w_norm) and r = 1 / sqrt(mean(x^2) + eps) from the sums of squares,
both left by the writer of the residual stream x; and for q and k at position p, for each i < D / 2:
y_i = x_i cos_p,i - x_{i+D/2} sin_p,i  and  y_{i+D/2} = x_{i+D/2} cos_p,i + x_i sin_p,i.

The rotation pairs channels i and i + D/2 of a head. A tile's weight rows alternate between the two: row 2 j of
a tile is the first of a pair and row 2 j + 1 the second, pairs being numbered through all heads of Q, K and V.
Only the addresses of the rows change, each still read in full lines, so the checkpoint's order of rows stays,
nothing is permuted at load, a tile may straddle heads, and every even head size works.
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
    """Bias, rotation and the three destinations of a [BLOCK_N, 16 or 64] product."""
    bias_ptr, rotary_ptr, start_ptr, q_ptr, k_cache, v_cache = epilogue
    HAS_BIAS: tl.constexpr = OPTIONS[0]
    HEADS: tl.constexpr = OPTIONS[1]
    KV_HEADS: tl.constexpr = OPTIONS[2]
    HEAD_DIM: tl.constexpr = OPTIONS[3]
    k_ptr, stride_k_head, stride_k_row = k_cache
    v_ptr, stride_v_head, stride_v_row = v_cache
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    COLS: tl.constexpr = acc.shape[1]
    HALF: tl.constexpr = HEAD_DIM // 2
    PAIRS: tl.constexpr = BLOCK_N // 2
    row = (column + tl.arange(0, COLS))[None, :].to(tl.int64)
    pair = (tile * PAIRS + tl.arange(0, PAIRS))[:, None]
    head, i = pair // HALF, pair % HALF
    inside = pair < (HEADS + 2 * KV_HEADS) * HALF
    mask = inside & (row < length)
    a, b = split_pairs(acc, PAIRS, COLS)
    if HAS_BIAS:
        a += tl.load(bias_ptr + head * HEAD_DIM + i, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + head * HEAD_DIM + HALF + i, mask=inside, other=0.0).to(tl.float32)
    a, b = round_to(a, dtype, UPCAST), round_to(b, dtype, UPCAST)
    position = tl.load(start_ptr) + row
    rotated = mask & (head < HEADS + KV_HEADS)
    angle = rotary_ptr + position * (2 * HEAD_DIM) + i
    cos = tl.load(angle, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(angle + HEAD_DIM + HALF, mask=rotated, other=0.0).to(tl.float32)
    # The reference rounds the product with the cosine to dtype, then the sum.
    low = round_to(tl.where(rotated, round_to(a * cos, dtype, UPCAST) - b * sin, a), dtype, UPCAST).to(dtype)
    high = round_to(tl.where(rotated, round_to(b * cos, dtype, UPCAST) + a * sin, b), dtype, UPCAST).to(dtype)

    to_q = mask & (head < HEADS)
    q_out = q_ptr + (row * HEADS + head) * HEAD_DIM + i
    tl.store(q_out, low, mask=to_q)
    tl.store(q_out + HALF, high, mask=to_q)
    to_k = rotated & (head >= HEADS)
    k_out = k_ptr + (head - HEADS).to(tl.int64) * stride_k_head + position * stride_k_row + i
    tl.store(k_out, low, mask=to_k)
    tl.store(k_out + HALF, high, mask=to_k)
    to_v = mask & (head >= HEADS + KV_HEADS)
    v_out = v_ptr + (head - HEADS - KV_HEADS).to(tl.int64) * stride_v_head + position * stride_v_row + i
    tl.store(v_out, low, mask=to_v)
    tl.store(v_out + HALF, high, mask=to_v)


# The window's length stays a run-time value: one binary serves every T.
@triton.jit(do_not_specialize=["length", "eps"], do_not_specialize_on_alignment=["start_ptr", "active_ptr"])
def qkv_kernel(
    x_ptr: tl.tensor,
    stride_x: tl.tensor,
    sumsq_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    stride_w: tl.tensor,
    bias_ptr: tl.tensor,
    rotary_ptr: tl.tensor,
    start_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    stride_k_head: tl.tensor,
    stride_k_row: tl.tensor,
    v_ptr: tl.tensor,
    stride_v_head: tl.tensor,
    stride_v_row: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    active_ptr: tl.tensor,
    length: tl.tensor,
    K: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
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
    """One program: BLOCK_N / 2 rotary pairs, one split of K, 16 columns or the whole window."""
    HALF: tl.constexpr = HEAD_DIM // 2
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = n // 2
    row = ((pair // HALF) * HEAD_DIM + pair % HALF + (n % 2) * HALF).to(tl.int64)
    weights = (w_ptr, stride_w, row, n < (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    if tl.load(active_ptr) == 0:
        return
    k_cache = (k_ptr, stride_k_head, stride_k_row)
    v_cache = (v_ptr, stride_v_head, stride_v_row)
    product(
        (x_ptr, stride_x, x_ptr), weights, (sumsq_ptr, eps), (partials_ptr, counters_ptr),
        (bias_ptr, rotary_ptr, start_ptr, q_ptr, k_cache, v_cache), (HAS_BIAS, HEADS, KV_HEADS, HEAD_DIM),
        length, K, _store,
        EVERY, NORM_LOG2, SUBS, SPLITS, BLOCK_N, BLOCK_K, NARROW_STAGES, WIDE_STAGES, EVEN, UPCAST,
    )  # fmt: skip


def _check_inputs(x: Tensor, sumsq: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    device, dtype = x.device, weight.dtype
    check_tensor("weight", weight, (None, None), DTYPES, device)
    rows, width = weight.shape
    check_tensor("x", x, (WINDOW, width), dtype, device)
    check_tensor("sumsq", sumsq, (tiles(width, CHANNELS), WINDOW), torch.float32, device, contiguous=True)
    if bias is not None:
        check_tensor("bias", bias, (rows,), dtype, device, contiguous=True)


def _checked_heads(
    rows: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int]:
    """Query heads, KV heads and channels of a head, which make up the rows of the weight."""
    check_tensor("q", q, (WINDOW, None, None), dtype, device, contiguous=True)
    heads, head_dim = q.shape[1:]
    check_tensor("k_cache", k_cache, (None, None, head_dim), dtype, device)
    kv_heads = k_cache.shape[0]
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), dtype, device)
    if head_dim % 2:
        raise ValueError(f"q has heads of {head_dim} channels, expected an even number")
    if rows != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"weight has {rows} rows, expected ({heads} + 2 * {kv_heads}) * {head_dim} as q and k_cache have heads"
        )
    return heads, kv_heads, head_dim


def plan(
    x: Tensor,
    sumsq: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    rotary: Tensor,
    start: Tensor,
    length: int,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    workspace: Workspace,
    config: ProjectionConfig,
    *,
    active: Tensor | None = None,
) -> Launch:
    """The launch of a normalised Q, K, V projection with rotation and cache write.

    Args:
        x: [64, C] dtype (float32, bfloat16 or float16), the residual stream times the weight of the RMSNorm.
        sumsq: [ceil(C / 64), 64] float32, contiguous: sums of squares of the residual stream per 64-channel tile.
        eps: of the RMSNorm.
        weight: [(H + 2 KV) D, C] dtype, rows of Q, then K, then V, in the checkpoint's order.
        bias: [(H + 2 KV) D] dtype, or None.
        rotary: [rows, 2, D] dtype, contiguous: `reference.rotary_table`.
        start: 0-d int64, absolute position of the window's first row. The caller keeps start + T within the
            rows of `rotary` and of the caches.
        length: T, 1 to 64.
        q: [64, H, D] dtype, contiguous; rows T and later are left alone.
        k_cache, v_cache: [KV, S, D] dtype; only rows start .. start + T - 1 are written.
        workspace: of at least `partial_elements((H + 2 KV) D, ...)` and `counter_elements(...)`.
        config: `projection_config("qkv", ...)`.
        active: 0-d int64, read on the device: 0 and the launch does nothing. None: it always runs.

    Raises:
        ValueError: names the argument that does not fit.
    """
    device = x.device
    check_length(length)
    _check_inputs(x, sumsq, weight, bias)
    rows, width = weight.shape
    heads, kv_heads, head_dim = _checked_heads(rows, q, k_cache, v_cache, weight.dtype, device)
    check_tensor("rotary", rotary, (None, 2, head_dim), weight.dtype, device, contiguous=True)
    check_tensor("start", start, (), torch.int64, device)
    check_workspace(workspace, rows, config.block_n, config.splits, device)
    return Launch(
        qkv_kernel,
        product_grid(config, rows, length),
        (
            x,
            x.stride(0),
            sumsq,
            eps,
            weight,
            weight.stride(0),
            weight if bias is None else bias,
            rotary,
            start,
            q,
            k_cache,
            k_cache.stride(0),
            k_cache.stride(1),
            v_cache,
            v_cache.stride(0),
            v_cache.stride(1),
            workspace.partials,
            workspace.counters,
            active_flag(active, device),
            length,
            width,
        ),
        {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "HAS_BIAS": bias is not None,
            "NORM_LOG2": tile_log2(width),
            **product_options(qkv_kernel, config, width),
        },
    )


run = runner(plan)
