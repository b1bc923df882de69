"""Partial results of attention over splits of the cache: how they are left, folded and written.

A partial of a split, per query row: m = max of the scores, l = sum of 2^(score - m), a = sum of 2^(score - m) v.
Two of them, earlier (m, l, a) and later (m', l', a'), fold into

    M = max(m, m'),  L = l 2^(m - M) + l' 2^(m' - M),  A = a 2^(m - M) + a' 2^(m' - M)

and the result is A / L. Of every group of FAN neighbouring splits the last program to arrive folds them in
ascending order, and the last group to arrive folds the groups, ascending too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyramid_rt.kernels.launch import arrive


@triton.jit
def finite(maximum):
    """0 for a row that has seen nothing yet: -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def write_rows(
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
def store_partial(
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
def fold_partials(
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
            shift = finite(new_maximum)
            rescale = tl.exp2(maximum - shift)
            weight = tl.exp2(maxima[i] - shift)
            total = total * rescale + totals[i] * weight
            acc = acc * rescale[:, None] + parts[i] * weight[:, None]
            maximum = new_maximum
    return maximum, total, acc


@triton.jit
def combine_splits(
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
    store_partial(acc_ptr, stats_ptr, slots + split, rows, tile_rows, maximum, total, acc, HEAD_DIM, BLOCK_M)
    members = tl.minimum(splits - group * FAN, FAN)
    if arrive(counters + 1 + group, members):
        chunk = tl.arange(0, FOLD_M)
        source = slots + group * FAN
        target = slots + grid_splits + group
        for row in range(0, tile_rows, FOLD_M):
            part = row + chunk
            top, sums, values = fold_partials(
                acc_ptr, stats_ptr, source, members, part, tile_rows, HEAD_DIM, BLOCK_D, BLOCK_M, FAN
            )
            if groups == 1:
                write_rows(out_base, first_row, part, tile_rows, out_stride_t, values, sums, GROUP, HEAD_DIM)
            else:
                store_partial(
                    acc_ptr, stats_ptr, target, part, tile_rows, top, sums, values, HEAD_DIM, BLOCK_M
                )
        # A lone group has already written the result; it must not touch the pair's counter.
        if groups > 1:
            final = arrive(counters, groups)
            if final:
                source = slots + grid_splits
                for row in range(0, tile_rows, FOLD_M):
                    part = row + chunk
                    top, sums, values = fold_partials(
                        acc_ptr, stats_ptr, source, groups, part, tile_rows, HEAD_DIM, BLOCK_D, BLOCK_M, FAN
                    )
                    write_rows(
                        out_base, first_row, part, tile_rows, out_stride_t, values, sums, GROUP, HEAD_DIM
                    )
