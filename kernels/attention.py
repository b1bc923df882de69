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

from pyramid_rt.kernels.attention_configs import BLOCK_M, FAN, AttentionConfig, Splits
from pyramid_rt.kernels.common import DTYPES, Launch

MAX_ROWS = 64
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
def _finite(maximum):
    """0 for a row that has seen nothing yet: -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _write(
    out_base, first_row, part, tile_rows, stride_t, acc, total, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """acc / total of some rows of a tile; the tile's first query row (window row x G + head) is first_row.

    The added zero turns -0 into 0, which empty later splits would do to some rows anyway.
    """
    dims = tl.arange(0, acc.shape[1])
    rows = first_row + part
    offsets = (rows // GROUP).to(tl.int64) * stride_t + rows % GROUP * HEAD_DIM
    mask = (part < tile_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    total = tl.where(total == 0.0, 1.0, total)
    result = acc / total[:, None] + 0.0
    pointers = out_base + offsets[:, None] + dims[None, :]
    tl.store(pointers, result.to(out_base.dtype.element_ty), mask=mask)


@triton.jit
def _store(
    acc_ptr,
    stats_ptr,
    slot,
    rows,
    tile_rows,
    maximum,
    total,
    acc,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Leave partials of some rows of a tile in a slot."""
    dims = tl.arange(0, acc.shape[1])
    real = rows < tile_rows
    stats = stats_ptr + slot * (2 * BLOCK_M) + rows
    tl.store(stats, maximum, mask=real)
    tl.store(stats + BLOCK_M, total, mask=real)
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(
        acc_ptr + slot * (BLOCK_M * HEAD_DIM) + offsets, acc, mask=real[:, None] & (dims < HEAD_DIM)[None, :]
    )


@triton.jit
def _arrive(counter_ptr, expected):
    """Announce this program's partials; whether it is the last of `expected`, which resets the counter."""
    # Every warp's partials before the one thread that announces them; Triton 3.6 adds no barrier itself.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _fold(
    acc_ptr,
    stats_ptr,
    slot,
    count,
    rows,
    tile_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FAN: tl.constexpr,
):
    """Fold `count` slots from `slot` on, ascending, for some rows of a tile.

    FAN slots are asked for before the first is used: a lone program is bound by the latency of its loads.
    """
    dims = tl.arange(0, BLOCK_D)
    stats = stats_ptr + slot * (2 * BLOCK_M) + rows
    accs = acc_ptr + slot * (BLOCK_M * HEAD_DIM) + rows[:, None] * HEAD_DIM + dims[None, :]
    maximum = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([rows.shape[0]], tl.float32)
    acc = tl.zeros([rows.shape[0], BLOCK_D], tl.float32)
    for first in tl.range(0, count, FAN, num_stages=1):
        maxima: tl.tuple = ()
        totals: tl.tuple = ()
        parts: tl.tuple = ()
        for i in tl.static_range(FAN):
            index = first + i
            real = rows < tl.where(index < count, tile_rows, 0)
            mask = real[:, None] & (dims < HEAD_DIM)[None, :]
            stat = stats + index * (2 * BLOCK_M)
            maxima = maxima + (tl.load(stat, mask=real, other=float("-inf"), cache_modifier=".cg"),)  # noqa: RUF005
            totals = totals + (tl.load(stat + BLOCK_M, mask=real, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
            part = accs + index * (BLOCK_M * HEAD_DIM)
            parts = parts + (tl.load(part, mask=mask, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
        for i in tl.static_range(FAN):
            new_maximum = tl.maximum(maximum, maxima[i])
            shift = _finite(new_maximum)
            rescale = tl.exp2(maximum - shift)
            weight = tl.exp2(maxima[i] - shift)
            total = total * rescale + totals[i] * weight
            acc = acc * rescale[:, None] + parts[i] * weight[:, None]
            maximum = new_maximum
    return maximum, total, acc


@triton.jit
def _combine(
    out_base,
    acc_ptr,
    stats_ptr,
    arrivals_ptr,
    pair,
    split,
    splits,
    first_row,
    tile_rows,
    out_stride_t,
    maximum,
    total,
    acc,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FOLD_M: tl.constexpr,
    FAN: tl.constexpr,
):
    """Leave this split's partials; fold the group if it is complete, and all groups if they are.

    Slots of a (KV head, row tile): the splits of the grid, then their groups. Padding rows (from tile_rows on)
    are neither stored nor read back: T = 1 moves G rows, not 64.
    """
    groups = tl.cdiv(splits, FAN)
    grid_splits = tl.num_programs(1)
    grid_groups = tl.cdiv(grid_splits, FAN)
    slots = pair * (grid_splits + grid_groups)
    counters = arrivals_ptr + pair * (grid_groups + 1)
    group = split // FAN
    rows = tl.arange(0, BLOCK_M)
    _store(acc_ptr, stats_ptr, slots + split, rows, tile_rows, maximum, total, acc, HEAD_DIM, BLOCK_M)
    members = tl.minimum(splits - group * FAN, FAN)
    if _arrive(counters + 1 + group, members):
        chunk = tl.arange(0, FOLD_M)
        source = slots + group * FAN
        target = slots + grid_splits + group
        for row in range(0, tile_rows, FOLD_M):
            part = row + chunk
            top, sums, values = _fold(
                acc_ptr, stats_ptr, source, members, part, tile_rows, HEAD_DIM, BLOCK_D, BLOCK_M, FAN
            )
            if groups == 1:
                _write(out_base, first_row, part, tile_rows, out_stride_t, values, sums, GROUP, HEAD_DIM)
            else:
                _store(acc_ptr, stats_ptr, target, part, tile_rows, top, sums, values, HEAD_DIM, BLOCK_M)
        # A lone group has already written the result; it must not touch the pair's counter.
        if groups > 1:
            final = _arrive(counters, groups)
            if final:
                source = slots + grid_splits
                for row in range(0, tile_rows, FOLD_M):
                    part = row + chunk
                    top, sums, values = _fold(
                        acc_ptr, stats_ptr, source, groups, part, tile_rows, HEAD_DIM, BLOCK_D, BLOCK_M, FAN
                    )
                    _write(out_base, first_row, part, tile_rows, out_stride_t, values, sums, GROUP, HEAD_DIM)


# length (T) and kv_bound stay run-time values without specialisation: one binary for all of them.
@triton.jit(do_not_specialize=["length", "kv_bound"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    ancestors_ptr,
    out_ptr,
    acc_ptr,
    stats_ptr,
    arrivals_ptr,
    length,
    kv_bound,
    scale,
    q_stride_t,
    q_stride_h,
    cache_stride_h,
    cache_stride_s,
    out_stride_t,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TREE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FOLD_M: tl.constexpr,
    FAN: tl.constexpr,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    EDGE0: tl.constexpr,
    EDGE1: tl.constexpr,
):
    """Grid (row tiles, splits of kv_bound, KV heads). scale is log2(e) / sqrt(D)."""
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

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    window_row = rows // GROUP
    real = window_row < length
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM
    tile_mask = real[:, None] & inside[None, :]
    head = kv_head * GROUP + rows % GROUP
    q_rows = window_row.to(tl.int64) * q_stride_t + head * q_stride_h
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=tile_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # Padding rows see nothing.
    last = tl.where(real, tl.minimum(start + window_row, kv_end - 1), -1)
    if TREE:
        ancestors = tl.load(ancestors_ptr + window_row, mask=real, other=0)

    # 64-bit to the split, 32-bit within it: the launcher bounds a split's extent.
    origin = kv_head * cache_stride_h + begin.to(tl.int64) * cache_stride_s
    k_split = k_ptr + origin
    v_split = v_ptr + origin
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    for block in tl.range(0, tl.cdiv(end - begin, BLOCK_N)):
        offsets = block * BLOCK_N + columns
        # Rows past the window may hold anything, NaN included, and 0 * NaN is NaN: they are not loaded.
        present = offsets < end - begin
        k = tl.load(
            k_split + offsets[None, :] * cache_stride_s + dims[:, None],
            mask=present[None, :] & inside[:, None],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        position = begin + offsets
        if TREE:
            node = position - start
            bit = (ancestors[:, None] >> tl.maximum(node, 0).to(tl.int64)[None, :]) & 1
            seen = ((node < 0)[None, :] | (bit != 0)) & (position[None, :] < kv_end) & real[:, None]
        else:
            seen = position[None, :] <= last[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = _finite(new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        maximum = new_maximum
        acc = acc * rescale[:, None]
        v = tl.load(
            v_split + offsets[:, None] * cache_stride_s + dims[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        weights = weights.to(v.dtype)
        if UPCAST:
            acc += tl.dot(weights.to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(weights, v, acc, input_precision="ieee")

    splits = _split_count(kv_end, SIZE0, SIZE1, SIZE2, EDGE0, EDGE1)
    out_base = out_ptr + kv_head * GROUP * HEAD_DIM
    tile_rows = tl.minimum(length * GROUP - tile * BLOCK_M, BLOCK_M)
    if splits == 1:
        part = tl.arange(0, BLOCK_M)
        _write(out_base, tile * BLOCK_M, part, tile_rows, out_stride_t, acc, total, GROUP, HEAD_DIM)
    else:
        _combine(
            out_base,
            acc_ptr,
            stats_ptr,
            arrivals_ptr,
            kv_head * tl.num_programs(0) + tile,
            split,
            splits,
            tile * BLOCK_M,
            tile_rows,
            out_stride_t,
            maximum,
            total,
            acc,
            GROUP,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_D,
            FOLD_M,
            FAN,
        )


@dataclass(frozen=True, slots=True)
class Workspace:
    """What a launch writes besides `out`. One serves all layers of a stream, one after another.

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
    return -(-length * group // BLOCK_M)


def workspace_sizes(
    *, length: int, heads: int, kv_heads: int, head_dim: int, kv_bound: int, splits: Splits
) -> tuple[int, int, int]:
    """Elements of acc, stats and arrivals that suffice for any T <= length and bound <= kv_bound."""
    pairs = kv_heads * row_tiles(length, heads // kv_heads)
    count = splits.count(kv_bound)
    groups = -(-count // FAN)
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


def _need(ok: bool, name: str, found: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"attention: {name} is {found}, expected {expected}")


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, out: Tensor, length: int, ancestors: Tensor | None
) -> None:
    _need(q.dtype in DTYPES, "q's dtype", q.dtype, f"one of {DTYPES}")
    _need(q.dim() == 3, "q's shape", tuple(q.shape), "[rows, H, D]")
    rows, heads, head_dim = q.shape
    _need(head_dim in HEAD_DIMS, "q's head size", head_dim, f"one of {HEAD_DIMS}")
    _need(1 <= length <= min(rows, MAX_ROWS), "length", length, f"1 .. {min(rows, MAX_ROWS)}")
    _need(q.stride(2) == 1, "q's strides", q.stride(), "a unit stride along D")
    _need(k.dim() == 3 and k.shape[2] == head_dim, "k's shape", tuple(k.shape), f"[KV, S, {head_dim}]")
    _need(heads % k.shape[0] == 0 and heads // k.shape[0] <= 8, "k's KV", k.shape[0], f"{heads} / (1 .. 8)")
    _need(k.stride(2) == 1, "k's strides", k.stride(), "a unit stride along D")
    _need(v.shape == k.shape, "v's shape", tuple(v.shape), f"that of k, {tuple(k.shape)}")
    _need(v.stride() == k.stride(), "v's strides", v.stride(), f"those of k, {k.stride()}")
    _need(start.dtype == torch.int64 and start.numel() == 1, "start", (start.dtype, start.shape), "one int64")
    shape = (rows, heads * head_dim)
    _need(tuple(out.shape) == shape, "out's shape", tuple(out.shape), f"[rows, H D] = {shape}")
    _need(out.stride(1) == 1, "out's strides", out.stride(), "a unit stride along H D")
    for name, tensor in (("k", k), ("v", v), ("out", out)):
        _need(tensor.dtype == q.dtype, f"{name}'s dtype", tensor.dtype, f"that of q, {q.dtype}")
    if ancestors is not None:
        _need(ancestors.dtype == torch.int64, "ancestors' dtype", ancestors.dtype, "int64")
        _need(
            ancestors.dim() == 1 and ancestors.shape[0] >= length and ancestors.stride(0) == 1,
            "ancestors' shape",
            tuple(ancestors.shape),
            f"[>= {length}], contiguous",
        )
    for name, optional in (("k", k), ("v", v), ("start", start), ("out", out), ("ancestors", ancestors)):
        if optional is not None:
            _need(optional.device == q.device, f"{name}'s device", optional.device, f"that of q, {q.device}")


def _check_workspace(space: Workspace, sizes: tuple[int, int, int], device: torch.device) -> None:
    types = (torch.float32, torch.float32, torch.int32)
    tensors = (space.acc, space.stats, space.arrivals)
    for name, tensor, size, dtype in zip(("acc", "stats", "arrivals"), tensors, sizes, types, strict=True):
        _need(tensor.dtype == dtype, f"space.{name}'s dtype", tensor.dtype, str(dtype))
        _need(tensor.is_contiguous(), f"space.{name}'s strides", tensor.stride(), "contiguous")
        _need(tensor.numel() >= size, f"space.{name}'s size", tensor.numel(), f"at least {size}")
        _need(tensor.device == device, f"space.{name}'s device", tensor.device, f"that of q, {device}")


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

    Raises:
        ValueError: an argument the kernel does not take, by name.
    """
    _check_tensors(q, k, v, start, out, length, ancestors)
    _, heads, head_dim = q.shape
    kv_heads, cache_rows, _ = k.shape
    _need(1 <= kv_bound <= cache_rows, "kv_bound", kv_bound, f"1 .. {cache_rows}, the rows of k")
    extent = max(config.splits.sizes) * k.stride(1)
    _need(0 < extent < 2**31, "k's stride along S", k.stride(1), "below 2^31 elements over a split")
    sizes = workspace_sizes(
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_bound=kv_bound,
        splits=config.splits,
    )
    _check_workspace(space, sizes, q.device)
    interpreted = bool(triton.knobs.runtime.interpret)
    if not interpreted:
        _need(q.device.type in ("cuda", "meta"), "q's device", q.device, "cuda")
    tensors = (q, k, v, start, ancestors, out, space.acc, space.stats, space.arrivals)
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
            "UPCAST": interpreted and q.dtype != torch.float32,
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


def run(
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
) -> None:
    """`plan` and launch: writes out[:length], allocates nothing."""
    plan(
        q, k, v, start, out, space, length=length, kv_bound=kv_bound, config=config, ancestors=ancestors
    ).run()
