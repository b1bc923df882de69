"""Attention of a window's rows against the static cache, with a chain or a tree mask.

    out[t, h] = sum_n softmax_n(q[t, h] . k[h // G, n] / sqrt(D)) v[h // G, n]   over the rows n that t sees

Row t stands at absolute position start + t. With the chain mask it sees n <= start + t; with the tree mask it
sees n < start and those window rows start + j whose bit j is set in ancestors[t] (its own bit included by the
caller). K and V of the window are already in the cache.

Why the bits do not depend on T or on a row's place in the window: a program always multiplies a tile of 64
query rows (T x G, zero-padded); blocks and splits of the cache lie at fixed absolute positions; a block that
a row does not see changes nothing in that row (its weights are exact zeros, its rescale factor exactly one).
Each split leaves float32 partials (max, sum, accumulator). Of every group of 8 neighbouring splits the last
program to arrive folds them in ascending order, and of a (KV head, row tile) the last group to arrive folds the
groups, ascending too: one program in two nested loops would give the same bits. Two levels, because one program
reading all 104 partials of a long context would take longer than the whole GPU takes to read the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.forward.attention_combine import combine_splits, finite, write_rows
from pyramid_rt.kernels.forward.attention_configs import BLOCK_M, FAN, AttentionConfig, Splits
from pyramid_rt.kernels.launch import (
    DTYPES,
    Launch,
    active_flag,
    check_length,
    check_scalar,
    check_tensor,
    interpreted,
    runner,
    tiles,
)

HEAD_DIMS = (64, 96, 128)


@triton.jit
def _split_begin(
    index,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    EDGE0: tl.constexpr,
    EDGE1: tl.constexpr,
):
    """First cache row of a split."""
    first: tl.constexpr = EDGE0 // SIZE0
    second: tl.constexpr = first + (EDGE1 - EDGE0) // SIZE1
    late = tl.where(index < second, EDGE0 + (index - first) * SIZE1, EDGE1 + (index - second) * SIZE2)
    return tl.where(index < first, index * SIZE0, late)


@triton.jit
def _split_count(
    rows,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    EDGE0: tl.constexpr,
    EDGE1: tl.constexpr,
):
    """`Splits.count` on the device."""
    small = tl.cdiv(tl.minimum(rows, EDGE0), SIZE0)
    middle = tl.cdiv(tl.maximum(tl.minimum(rows, EDGE1) - EDGE0, 0), SIZE1)
    return small + middle + tl.cdiv(tl.maximum(rows - EDGE1, 0), SIZE2)


@triton.jit
def _query_tile(
    q_ptr, ancestors_ptr, tile, kv_head, length, q_stride_t, q_stride_h,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TREE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of query rows, zero-padded: their values, window rows and two words of ancestors each."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    window_row = rows // GROUP
    real = window_row < length
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + rows % GROUP
    q_rows = window_row.to(tl.int64) * q_stride_t + head * q_stride_h
    mask = real[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    low, high = window_row, window_row
    if TREE:
        # As two words: testing a bit of 64 for every score would take twice the registers.
        ancestors = tl.load(ancestors_ptr + window_row, mask=real, other=0)
        low, high = ancestors.to(tl.int32), (ancestors >> 32).to(tl.int32)
    return q, window_row, low, high


@triton.jit
def _seen(position, start, length, kv_end, window_row, low, high, TREE: tl.constexpr):
    """The mask of a block of scores: which rows of the cache each query row sees; padding rows see nothing."""
    real = window_row < length
    if TREE:
        node = position - start
        word = tl.where((node < 32)[None, :], low[:, None], high[:, None])
        bit = (word >> (node & 31)[None, :]) & 1
        seen = ((node < 0)[None, :] | (bit != 0)) & (position[None, :] < kv_end) & real[:, None]
    else:
        last = tl.where(real, tl.minimum(start + window_row, kv_end - 1), -1)
        seen = position[None, :] <= last[:, None]
    return seen


@triton.jit
def _rescaled(scores, maximum, total):
    """One step of the running softmax: weights of a block, the new maximum, the sum, and the old parts' factor."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shift = finite(new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(maximum - shift)
    return weights, new_maximum, total * rescale + tl.sum(weights, 1), rescale


@triton.jit
def _weighted_sum(weights, v, acc, UPCAST: tl.constexpr):
    """acc + weights . v, the weights rounded to the type of v."""
    weights = weights.to(v.dtype)
    if UPCAST:
        acc += tl.dot(weights.to(tl.float32), v.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(weights, v, acc, input_precision="ieee")
    return acc


# length (T) and kv_bound stay run-time values without specialisation: one binary for all of them.
@triton.jit(
    do_not_specialize=["length", "kv_bound"],
    do_not_specialize_on_alignment=["start_ptr", "ancestors_ptr", "active_ptr"],
)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, ancestors_ptr, out_ptr, acc_ptr, stats_ptr, arrivals_ptr, active_ptr,
    length, kv_bound, scale, q_stride_t, q_stride_h, cache_stride_h, cache_stride_s, out_stride_t,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TREE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FOLD_M: tl.constexpr, FAN: tl.constexpr,
    SIZE0: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr, EDGE0: tl.constexpr, EDGE1: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, splits of kv_bound, KV heads). scale is log2(e) / sqrt(D)."""
    if tl.load(active_ptr) == 0:
        return
    tile = tl.program_id(0)
    # The longest splits come last in the sequence and first in the grid: less of a tail.
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr).to(tl.int32)
    # The bound also keeps the number of arrivals reachable if a caller's window runs past it.
    kv_end = tl.minimum(start + length, kv_bound)
    begin = _split_begin(split, SIZE0, SIZE1, SIZE2, EDGE0, EDGE1)
    if begin >= kv_end:
        return
    end = tl.minimum(_split_begin(split + 1, SIZE0, SIZE1, SIZE2, EDGE0, EDGE1), kv_end)
    q, window_row, low, high = _query_tile(
        q_ptr, ancestors_ptr, tile, kv_head, length, q_stride_t, q_stride_h,
        GROUP, HEAD_DIM, TREE, UPCAST, BLOCK_M, BLOCK_D,
    )  # fmt: skip

    # 64-bit to the split, 32-bit within it: the launcher bounds a split's extent.
    origin = kv_head * cache_stride_h + begin.to(tl.int64) * cache_stride_s
    k_split, v_split = k_ptr + origin, v_ptr + origin
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    columns, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM
    for block in tl.range(0, tl.cdiv(end - begin, BLOCK_N)):
        offsets = block * BLOCK_N + columns
        # Rows past the window may hold anything, NaN included, and 0 * NaN is NaN: they are not loaded.
        present = offsets < end - begin
        at = offsets * cache_stride_s
        k = tl.load(k_split + at[None, :] + dims[:, None], mask=present[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        seen = _seen(begin + offsets, start, length, kv_end, window_row, low, high, TREE)
        scores = tl.where(seen, scores, float("-inf"))
        weights, maximum, total, rescale = _rescaled(scores, maximum, total)
        acc = acc * rescale[:, None]
        v = tl.load(v_split + at[:, None] + dims[None, :], mask=present[:, None] & inside[None, :], other=0.0)
        acc = _weighted_sum(weights, v, acc, UPCAST)

    splits = _split_count(kv_end, SIZE0, SIZE1, SIZE2, EDGE0, EDGE1)
    out_base = out_ptr + kv_head * GROUP * HEAD_DIM
    tile_rows = tl.minimum(length * GROUP - tile * BLOCK_M, BLOCK_M)
    if splits == 1:
        part = tl.arange(0, BLOCK_M)
        write_rows(out_base, tile * BLOCK_M, part, tile_rows, out_stride_t, acc, total, GROUP, HEAD_DIM)
    else:
        combine_splits(
            out_base, acc_ptr, stats_ptr, arrivals_ptr, kv_head * tl.num_programs(0) + tile, split, splits,
            tile * BLOCK_M, tile_rows, out_stride_t, maximum, total, acc,
            GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, FOLD_M, FAN,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers that a launch writes besides `out`. One set serves all layers of a stream, one after another.

    Attributes:
        acc: [>= pairs * slots * 64 * D] float32, pairs = KV heads x row tiles, slots = splits + their groups.
        stats: [>= pairs * slots * 2 * 64] float32, maxima and sums.
        arrivals: [>= pairs * (groups + 1)] int32, all zero; every launch leaves it so.
    """

    acc: Tensor
    stats: Tensor
    arrivals: Tensor


def row_tiles(length: int, group: int) -> int:
    """Tiles of 64 query rows that T window rows with `group` query heads each fill."""
    return tiles(length * group, BLOCK_M)


def workspace_sizes(
    *, length: int, heads: int, kv_heads: int, head_dim: int, kv_bound: int, splits: Splits
) -> tuple[int, int, int]:
    """Elements of acc, stats and arrivals that suffice for any T <= length and bound <= kv_bound."""
    pairs = kv_heads * row_tiles(length, heads // kv_heads)
    count = splits.count(kv_bound)
    groups = tiles(count, FAN)
    partials = pairs * (count + groups) * BLOCK_M
    return partials * head_dim, partials * 2, pairs * (groups + 1)


def workspace(
    *,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_bound: int,
    splits: Splits,
    device: torch.device,
) -> Workspace:
    """Allocate a workspace of `workspace_sizes`; done once, before the first step."""
    acc, stats, arrivals = workspace_sizes(
        length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_bound=kv_bound, splits=splits
    )
    return Workspace(
        acc=torch.empty(acc, dtype=torch.float32, device=device),
        stats=torch.empty(stats, dtype=torch.float32, device=device),
        arrivals=torch.zeros(arrivals, dtype=torch.int32, device=device),
    )


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, out: Tensor, length: int, ancestors: Tensor | None
) -> None:
    device, dtype = q.device, q.dtype
    check_length(length)
    check_tensor("q", q, (None, None, None), DTYPES, device)
    rows, heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q has heads of {head_dim} channels, expected one of {HEAD_DIMS}")
    if rows < length:
        raise ValueError(f"q has {rows} rows, expected at least length = {length}")
    check_tensor("k", k, (None, None, head_dim), dtype, device)
    kv_heads = k.shape[0]
    if kv_heads == 0 or heads % kv_heads or heads // kv_heads > 8:
        raise ValueError(f"k has {kv_heads} heads, expected {heads} / (1 .. 8), as q has {heads}")
    check_tensor("v", v, tuple(k.shape), dtype, device)
    if v.stride() != k.stride():
        raise ValueError(f"v has strides {v.stride()}, expected those of k, {k.stride()}")
    check_scalar("start", start, torch.int64, device)
    check_tensor("out", out, (rows, heads * head_dim), dtype, device)
    if ancestors is not None:
        check_tensor("ancestors", ancestors, (None,), torch.int64, device, contiguous=True)
        if ancestors.shape[0] < length:
            raise ValueError(
                f"ancestors has {ancestors.shape[0]} entries, expected at least length = {length}"
            )


def _check_space(space: Workspace, sizes: tuple[int, int, int], device: torch.device) -> None:
    for name, size in zip(("acc", "stats", "arrivals"), sizes, strict=True):
        tensor: Tensor = getattr(space, name)
        kind = torch.int32 if name == "arrivals" else torch.float32
        check_tensor(f"space.{name}", tensor, (None,), kind, device, contiguous=True)
        if tensor.numel() < size:
            raise ValueError(f"space.{name} holds {tensor.numel()} elements, expected at least {size}")


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    out: Tensor,
    space: Workspace,
    *,
    length: int,
    kv_bound: int,
    config: AttentionConfig,
    ancestors: Tensor | None = None,
    active: Tensor | None = None,
) -> Launch:
    """Check the arguments and fix the launch.

    Args:
        q: [rows, H, D] dtype, unit stride along D; rows >= length are not read. D 64, 96 or 128.
        k, v: [KV, S, D] dtype, equal strides, unit along D; H / KV is 1 .. 8.
        start: one int64 on the device, absolute position of row 0; at least 0.
        out: [rows, H D] dtype; rows >= length are not written.
        space: of `workspace`, on the same device.
        length: T, 1 .. 64.
        kv_bound: host number of cache rows the grid covers, at least start + T and at most S. It changes the
            cost and nothing else; rows from kv_bound on are not seen.
        config: how to compile; `config_for`.
        ancestors: [>= T] int64 for the tree mask, None for the chain.
        active: 0-d int64, read on the device: 0 and the launch does nothing. None: it always runs.

    Raises:
        ValueError: names the argument that does not fit.
    """
    _check_tensors(q, k, v, start, out, length, ancestors)
    _, heads, head_dim = q.shape
    kv_heads, cache_rows, _ = k.shape
    if not 1 <= kv_bound <= cache_rows:
        raise ValueError(f"kv_bound is {kv_bound}, expected 1 to {cache_rows}, the rows of k")
    if max(config.splits.sizes) * k.stride(1) >= 2**31:
        raise ValueError(f"k has rows of stride {k.stride(1)}, expected a split below 2^31 elements")
    sizes = workspace_sizes(
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_bound=kv_bound,
        splits=config.splits,
    )
    _check_space(space, sizes, q.device)
    word = active_flag(active, q.device)
    tensors = (q, k, v, start, ancestors, out, space.acc, space.stats, space.arrivals, word)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), out.stride(0))
    return Launch(
        kernel=attention_kernel,
        grid=(row_tiles(length, heads // kv_heads), config.splits.count(kv_bound), kv_heads),
        args=(*tensors, length, kv_bound, math.log2(math.e) / math.sqrt(head_dim), *strides),
        kwargs={
            "GROUP": heads // kv_heads,
            "HEAD_DIM": head_dim,
            "TREE": ancestors is not None,
            # The interpreter's bfloat16 dot is silently wrong.
            "UPCAST": interpreted(attention_kernel) and q.dtype != torch.float32,
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "FOLD_M": config.fold_rows,
            "FAN": FAN,
            "SIZE0": config.splits.sizes[0],
            "SIZE1": config.splits.sizes[1],
            "SIZE2": config.splits.sizes[2],
            "EDGE0": config.splits.edges[0],
            "EDGE1": config.splits.edges[1],
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            # Its default changed between versions; without it a fold compiles to the same sums everywhere.
            "enable_fp_fusion": False,
        },
    )


run = runner(plan)
