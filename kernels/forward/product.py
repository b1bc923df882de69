"""The product of a tile that all projection kernels share, invariant in the window's length.

Every product is y^T = W x^T over tiles of weight rows and 16 or 64 window columns. Each element has one
accumulator that sees K in ascending steps of BLOCK_K, and the tensor cores add the terms of one element in the
same order at either width. Where K is split, the last program to arrive adds the partial sums in the order of
their splits. So a row's bits depend neither on T nor on its place in the window.

A product after an RMSNorm takes rows that their writer has multiplied by the norm's weight already, and
multiplies its sums by 1 / sqrt(mean(x^2) + eps): the quotient is one number per row and need not be known before
the last term. Normalising rows inside the loop would put a chain of conversions between two steps, which on an
H200 held these kernels at 28 to 68% of the copy bandwidth that the others reach 87% of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.configs import ProjectionConfig
from pyramid_rt.kernels.launch import CHANNELS, arrive, check_tensor, interpreted, tiles
from pyramid_rt.kernels.limits import WINDOW

# Columns of a narrow product: the fewest that sm_90 multiplies from shared memory without serialising.
COLUMNS = 16


# Where a product's columns come from: rows 0 .. T - 1 of the window, a list of rows, or those that decide
# consecutive positions.
EVERY = tl.constexpr(0)


LISTED = tl.constexpr(1)


PLACED = tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch of products split along K. Launches of one stream share it; two streams must not.

    Attributes:
        partials: [n] float32, any contents.
        counters: [m] int32, zero before the first launch; every launch leaves them zero.
    """

    partials: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, partials: int, counters: int, device: torch.device) -> Workspace:
        """Room for the largest of `partial_elements` and `counter_elements` over all launches that share it."""
        return cls(
            torch.empty(max(partials, 1), dtype=torch.float32, device=device),
            torch.zeros(max(counters, 1), dtype=torch.int32, device=device),
        )


def partial_elements(rows: int, block_n: int, splits: int) -> int:
    """Elements of `Workspace.partials` that a product of `rows` weight rows needs."""
    return tiles(rows, block_n) * block_n * WINDOW * splits if splits > 1 else 0


def counter_elements(rows: int, block_n: int, splits: int) -> int:
    """Elements of `Workspace.counters` that a product of `rows` weight rows needs."""
    return tiles(rows, block_n) * (WINDOW // COLUMNS) if splits > 1 else 0


def check_workspace(workspace: Workspace, rows: int, block_n: int, splits: int, device: torch.device) -> None:
    """Refuse a workspace that is too small for a product of `rows` weight rows, or of another type."""
    check_tensor("workspace.partials", workspace.partials, (None,), torch.float32, device, contiguous=True)
    check_tensor("workspace.counters", workspace.counters, (None,), torch.int32, device, contiguous=True)
    for name, tensor, need in (
        ("partials", workspace.partials, partial_elements(rows, block_n, splits)),
        ("counters", workspace.counters, counter_elements(rows, block_n, splits)),
    ):
        if tensor.numel() < need:
            raise ValueError(f"workspace.{name} holds {tensor.numel()} elements, expected at least {need}")


def product_options(kernel: Any, config: ProjectionConfig, width: int) -> dict[str, Any]:
    """The constexprs and compiler options that every projection kernel takes, for K = `width`."""
    return {
        "SUBS": config.sub_tiles,
        "SPLITS": config.splits,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "NARROW_STAGES": config.narrow_stages,
        "WIDE_STAGES": config.wide_stages,
        "EVEN": width % config.block_k == 0,
        "UPCAST": interpreted(kernel),
        "num_warps": config.num_warps,
        # Fusion would be the compiler's choice, and could differ between the two widths of one kernel.
        "enable_fp_fusion": False,
    }


def product_grid(config: ProjectionConfig, rows: int, length: int) -> tuple[int, int, int]:
    """Column tiles (neighbours share weights in L2), tiles of weight rows, splits along K."""
    columns = tiles(length, COLUMNS) if config.sub_tiles == 1 else 1
    return columns, tiles(rows, config.block_n), config.splits


def tile_log2(width: int) -> int:
    """log2 of the partial sums of squares per row, rounded up to a power of two."""
    return (tiles(width, CHANNELS) - 1).bit_length()


@triton.jit
def tree_sum(x: tl.tensor, ROWS: tl.constexpr, LOG2: tl.constexpr) -> tl.tensor:
    """Sums along the last axis, [ROWS, 2^LOG2] -> [ROWS], by adding neighbours.

    `tl.sum` adds in an order that follows from how the compiler spreads the block over threads; this order is
    part of the program, so every kernel, window width and architecture has the same.
    """
    for i in tl.static_range(LOG2):
        even, odd = tl.split(tl.reshape(x, (ROWS, 1 << (LOG2 - 1 - i), 2)))
        x = even + odd
    return tl.reshape(x, (ROWS,))


@triton.jit
def split_pairs(x: tl.tensor, PAIRS: tl.constexpr, COLS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Even and odd rows: [2 PAIRS, COLS] -> two of [PAIRS, COLS]."""
    first, second = tl.split(tl.permute(tl.reshape(x, (PAIRS, 2, COLS)), (0, 2, 1)))
    return first, second


@triton.jit
def round_to(x: tl.tensor, dtype: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """A float32 value as `dtype` can hold it, rounded to nearest even, still float32.

    The interpreter (UPCAST) truncates to bfloat16, so there the bits are rounded by hand. Whoever stores a
    rounded value converts it without loss.
    """
    rounded = x
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = bits.to(tl.float32, bitcast=True)
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def window_rows(
    rows_ptr, first: tl.tensor, length: tl.tensor, GATHER: tl.constexpr, COLS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Rows of x behind COLS columns from `first` on, and which of them are wanted. [COLS] int64 and bool."""
    column = first + tl.arange(0, COLS)
    keep = column < length
    row = column.to(tl.int64)
    if GATHER == LISTED:
        row = tl.load(rows_ptr + column, mask=keep, other=0).to(tl.int64)
    if GATHER == PLACED:
        start_ptr, decided_ptr = rows_ptr
        shift = tl.load(decided_ptr) - 1 - tl.load(start_ptr)
        row = tl.minimum(tl.maximum(row + shift, 0), 63)
    return row, keep


@triton.jit
def _inverse_rms(
    norm,
    rows_ptr,
    first: tl.tensor,
    length: tl.tensor,
    K: tl.tensor,
    GATHER: tl.constexpr,
    LOG2: tl.constexpr,
) -> tl.tensor:
    """1 / sqrt(mean(x^2) + eps) of 16 rows from the partial sums [ceil(K / 64), 64] float32.

    Each use in a kernel reduces a block of this one shape and origin, so the compiler gives all of them one
    layout and one order. A tree by hand would hold a whole row of partial sums in every thread, and spill.
    """
    sumsq_ptr, eps = norm
    row, keep = window_rows(rows_ptr, first, length, GATHER, 16)
    tile = tl.arange(0, 1 << LOG2)
    mask = keep[:, None] & (tile[None, :] * 64 < K)
    parts = tl.load(sumsq_ptr + tile[None, :] * 64 + row[:, None], mask=mask, other=0.0)
    total = tl.sum(parts, 1)
    return tl.rsqrt(total / K.to(tl.float32) + eps)


@triton.jit
def normalised(
    acc: tl.tensor,
    norm,
    rows_ptr,
    first: tl.tensor,
    length: tl.tensor,
    K: tl.tensor,
    GATHER: tl.constexpr,
    LOG2: tl.constexpr,
) -> tl.tensor:
    """Sums [BLOCK_N, 16 or 64] times the inverse root mean square of their columns' rows."""
    COLS: tl.constexpr = acc.shape[1]
    scale = _inverse_rms(norm, rows_ptr, first, length, K, GATHER, LOG2)
    if COLS == 64:
        second = _inverse_rms(norm, rows_ptr, first + 16, length, K, GATHER, LOG2)
        third = _inverse_rms(norm, rows_ptr, first + 32, length, K, GATHER, LOG2)
        fourth = _inverse_rms(norm, rows_ptr, first + 48, length, K, GATHER, LOG2)
        quads = tl.join(tl.join(scale, third), tl.join(second, fourth))
        scale = tl.reshape(tl.permute(quads, (1, 2, 0)), (64,))
    return acc * scale[None, :]


@triton.jit
def load_tile(
    ptr: tl.tensor,
    row: tl.tensor,
    stride: tl.tensor,
    keep: tl.tensor,
    k: tl.tensor,
    K: tl.tensor,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Rows of a matrix, [rows, BLOCK_K] at columns k; 0 where not kept or past K."""
    pointers = ptr + row[:, None] * stride + k[None, :]
    mask = keep[:, None]
    if not EVEN:
        mask = mask & (k[None, :] < K)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def tile_product(
    window,
    weights,
    first: tl.tensor,
    length: tl.tensor,
    split: tl.tensor,
    K: tl.tensor,
    GATHER: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """W x^T over this split's part of K: [BLOCK_N, COLS] float32. `window` and `weights` are as in `product`."""
    x_ptr, stride_x, rows_ptr = window
    w_ptr, stride_w, w_row, w_keep = weights
    row, keep = window_rows(rows_ptr, first, length, GATHER, COLS)
    acc = tl.zeros((BLOCK_N, COLS), tl.float32)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * share
    for base in tl.range(begin, tl.minimum(begin + share, K), BLOCK_K, num_stages=STAGES):
        k = base + tl.arange(0, BLOCK_K)
        w = load_tile(w_ptr, w_row, stride_w, w_keep, k, K, EVEN)
        x = load_tile(x_ptr, row, stride_x, keep, k, K, EVEN)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def partial_offsets(
    tile: tl.tensor,
    split: tl.tensor,
    first: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Offsets in the workspace of a split's [BLOCK_N, COLS] partial of the columns from `first` on."""
    column = first + tl.arange(0, COLS)
    block = ((tile * SPLITS + split).to(tl.int64) * 4 + column // 16) * (BLOCK_N * 16)
    return (block + column % 16)[None, :] + tl.arange(0, BLOCK_N)[:, None] * 16


@triton.jit
def sum_partials(
    partials_ptr: tl.tensor,
    tile: tl.tensor,
    first: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Partial sums of COLS columns added in the order of the splits: [BLOCK_N, COLS] float32."""
    offsets = partial_offsets(tile, 0, first, SPLITS, BLOCK_N, COLS)
    total = tl.load(partials_ptr + offsets, cache_modifier=".cg")
    for s in tl.static_range(1, SPLITS):
        offsets = partial_offsets(tile, s, first, SPLITS, BLOCK_N, COLS)
        total += tl.load(partials_ptr + offsets, cache_modifier=".cg")
    return total


@triton.jit
def _columns(
    window,
    weights,
    norm,
    space,
    epilogue,
    OPTIONS,
    length: tl.tensor,
    K: tl.tensor,
    STORE: tl.constexpr,
    GATHER: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    NORM_LOG2: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One tile of weight rows against 16 columns or all 64."""
    partials_ptr, counters_ptr = space
    rows_ptr = window[2]
    # A program of 64 columns has all of them: known to be the first, their places cost no registers.
    first = tl.program_id(0) * 16 if COLS == 16 else 0
    tile = tl.program_id(1)
    split = tl.program_id(2)
    acc = tile_product(
        window, weights, first, length, split, K, GATHER, COLS, SPLITS, BLOCK_N, BLOCK_K, STAGES, EVEN, UPCAST
    )
    if SPLITS == 1:
        if NORM_LOG2 >= 0:
            acc = normalised(acc, norm, rows_ptr, first, length, K, GATHER, NORM_LOG2)
        STORE(acc, first, tile, length, epilogue, OPTIONS, BLOCK_N, UPCAST)
    else:
        tl.store(partials_ptr + partial_offsets(tile, split, first, SPLITS, BLOCK_N, COLS), acc)
        if arrive(counters_ptr + tile * 4 + first // 16, SPLITS):
            total = sum_partials(partials_ptr, tile, first, SPLITS, BLOCK_N, COLS)
            if NORM_LOG2 >= 0:
                total = normalised(total, norm, rows_ptr, first, length, K, GATHER, NORM_LOG2)
            STORE(total, first, tile, length, epilogue, OPTIONS, BLOCK_N, UPCAST)


@triton.jit
def product(
    window,
    weights,
    norm,
    space,
    epilogue,
    OPTIONS,
    length: tl.tensor,
    K: tl.tensor,
    STORE: tl.constexpr,
    GATHER: tl.constexpr,
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
    """This program's tile of y^T = W x^T: one split of K, 16 columns or the whole window, and what STORE does.

    Args:
        window: (x_ptr, its row stride, where the rows are: with LISTED a pointer to their indices, with PLACED
            pointers to the window's first position and to the position that the first row decides).
        weights: (w_ptr, its row stride, rows [BLOCK_N] int64 of this tile, which of them exist).
        norm: (sumsq_ptr, eps), read if NORM_LOG2 >= 0; the rows of x are then multiplied by the norm's weight.
        space: (partials_ptr, counters_ptr), used if SPLITS > 1.
        epilogue, OPTIONS: what STORE needs of its own; the second holds constexprs, which would become run-time
            values if they were unpacked together with others.
        length: T, or the number of rows. K: width of the weights.
        STORE: called with the sum over all splits [BLOCK_N, 16 or 64] float32, its first column, the tile's
            index, length, epilogue, OPTIONS, BLOCK_N and UPCAST.
        NORM_LOG2: `tile_log2` of K, or -1 without a norm.
    """
    if SUBS == 1 or length <= 16:
        _columns(
            window, weights, norm, space, epilogue, OPTIONS, length, K,
            STORE, GATHER, 16, SPLITS, BLOCK_N, BLOCK_K, NARROW_STAGES, EVEN, NORM_LOG2, UPCAST,
        )  # fmt: skip
    else:
        _columns(
            window, weights, norm, space, epilogue, OPTIONS, length, K,
            STORE, GATHER, 64, SPLITS, BLOCK_N, BLOCK_K, WIDE_STAGES, EVEN, NORM_LOG2, UPCAST,
        )  # fmt: skip
