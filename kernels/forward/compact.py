"""Tree compaction: the accepted path's rows move to the front of the window, in every layer and the tokens.

    cache[l, kv, h, start + i] = cache[l, kv, h, start + path[i]]   for i < count, all reads before any write
    tokens[start + i] = tokens[start + path[i]]

One launch serves a whole tier: its cache is one buffer [L, 2, KV, S, D] (K and V of a layer are views of it).
A program owns one (layer, K or V, head): rows of different programs never mix, so a barrier within the
program is all the order that is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.launch import DTYPES, Launch, check_scalar, check_tensor, runner
from pyramid_rt.kernels.limits import WINDOW


@triton.jit
def compact_kernel(
    cache_ptr,
    tokens_ptr,
    start_ptr,
    path_ptr,
    count_ptr,
    stride_l,
    stride_c,
    stride_h,
    stride_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (KV heads, 2, L). All offsets are 64-bit: a cache of 128k positions exceeds 2^31 elements."""
    start = tl.load(start_ptr)
    count = tl.load(count_ptr)
    to = tl.arange(0, WINDOW)
    chosen = to < count
    source = tl.load(path_ptr + to, mask=chosen, other=0)
    moved = chosen & (source != to)
    head = tl.program_id(0).to(tl.int64)
    base = cache_ptr + tl.program_id(2).to(tl.int64) * stride_l + tl.program_id(1).to(tl.int64) * stride_c
    base += head * stride_h + start * stride_s
    dims = tl.arange(0, BLOCK_D)
    mask = moved[:, None] & (dims < HEAD_DIM)[None, :]
    rows = tl.load(base + source[:, None] * stride_s + dims[None, :], mask=mask, other=0.0)
    # A warp must not write a row that another has yet to read.
    tl.debug_barrier()
    tl.store(base + to.to(tl.int64)[:, None] * stride_s + dims[None, :], rows, mask=mask)
    if TOKENS:
        first = tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0
        if first:
            ids = tl.load(tokens_ptr + start + source, mask=moved, other=0)
            tl.debug_barrier()
            tl.store(tokens_ptr + start + to, ids, mask=moved)


def plan(
    cache: Tensor, tokens: Tensor | None, start: Tensor, path: Tensor, count: Tensor, *, num_warps: int = 4
) -> Launch:
    """Check the arguments and fix the launch.

    Args:
        cache: [L, 2, KV, S, D] dtype of one tier, unit stride along D, any other strides.
        tokens: [N] int64 token buffer by absolute position; None when another tier's launch moves it.
        start: one int64 on the device, absolute position of window row 0; start + 64 <= S and N.
        path: [64] int64 on the device, window row indices in 0 .. 63; those from count on are not read.
        count: one int64 on the device, 0 .. 64; 0 moves nothing.
        num_warps: of a program.

    Raises:
        ValueError: names the argument that does not fit.
    """
    device = cache.device
    check_tensor("cache", cache, (None, 2, None, None, None), DTYPES, device)
    layers, _, heads, rows, head_dim = cache.shape
    if rows < WINDOW:
        raise ValueError(f"cache has {rows} rows, expected at least {WINDOW}")
    check_scalar("start", start, torch.int64, device)
    check_tensor("path", path, (WINDOW,), torch.int64, device, contiguous=True)
    check_scalar("count", count, torch.int64, device)
    if tokens is not None:
        check_tensor("tokens", tokens, (None,), torch.int64, device, contiguous=True)
    return Launch(
        kernel=compact_kernel,
        grid=(heads, 2, layers),
        args=(cache, tokens, start, path, count, *cache.stride()[:4]),
        kwargs={
            "HEAD_DIM": head_dim,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "WINDOW": WINDOW,
            "TOKENS": tokens is not None,
            "num_warps": num_warps,
            "num_stages": 1,
            "enable_fp_fusion": False,
        },
    )


run = runner(plan)
