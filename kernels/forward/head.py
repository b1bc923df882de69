"""RMSNorm and LM head of chosen rows, with what sampling needs of every tile of the vocabulary.

logits[r, v] = float32(dtype((s_r . W_v) / sqrt(mean(x_r^2) + eps))), s = dtype(x w_norm); s and the sums of
squares are left by the writer of the residual stream x. -inf from the valid vocabulary on. Per row and tile of
BLOCK_N entries: the largest logit m, the sum of exp(logit - m), and the largest score with its lowest index, where

score = logit / temperature + g, g = -log(-log1p(-u)), u = min((word + 0.5) 2^-32, 1 - 2^-24)

and the words are those of `reference.sampling.own_noise`: Philox4x32-10 with the seed's two words as key and
the counter (v // 4, position, 0, 0), word v % 4. Without noise, or at temperature 0, the score is the logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.configs import ProjectionConfig
from pyramid_rt.kernels.forward.product import (
    LISTED,
    PLACED,
    product,
    product_grid,
    product_options,
    round_to,
    tile_log2,
    tree_sum,
)
from pyramid_rt.kernels.launch import CHANNELS, DTYPES, Launch, active_flag, check_tensor, runner, tiles
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.noise import gumbel, philox_words

# Entries of a logits row are padded to this many: 16 bytes, so that every row can be read in wide loads.
PADDING = 4


@dataclass(frozen=True, slots=True)
class TileStatistics:
    """Results of the head per row and tile of the vocabulary; all [64, tiles], contiguous.

    Attributes:
        peak: float32, the largest logit; -inf in a tile without valid entries.
        total: float32, the sum of exp(logit - peak); NaN where a logit is NaN or +inf, which `peak` may not show.
        best: float32, the largest score.
        token: int32, its lowest vocabulary index.
    """

    peak: Tensor
    total: Tensor
    best: Tensor
    token: Tensor

    @classmethod
    def allocate(cls, count: int, device: torch.device) -> TileStatistics:
        """Uninitialised statistics of `count` tiles."""
        shape = (WINDOW, count)
        peak, total, best = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
        return cls(peak, total, best, torch.empty(shape, dtype=torch.int32, device=device))


@dataclass(frozen=True, slots=True)
class Noise:
    """Own-token noise, as `reference.sampling.own_noise`.

    Attributes:
        seed: [2] int64, the low and the high 32-bit word.
        positions: [R] int64, the absolute position that each row decides; None where a `Placement` says so.
        temperature: 0-d float32; 0 turns the noise off.
    """

    seed: Tensor
    positions: Tensor | None
    temperature: Tensor


@dataclass(frozen=True, slots=True)
class Placement:
    """Rows that decide consecutive positions, by numbers that are read on the device; each 0-d int64.

    Row r < count is window row decided - 1 + r - start, clamped to the window. What becomes of it goes to row
    decided - first + r of the outputs, where they have such a row, and its noise is that of position decided + r.

    Attributes:
        start: absolute position of the window's first row.
        decided: position that row 0 decides.
        first: position that row 0 of the outputs belongs to.
        count: 1 to 64.
    """

    start: Tensor
    decided: Tensor
    first: Tensor
    count: int


@triton.jit
def own_noise(seed_ptr: tl.tensor, position: tl.tensor, tile: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Noise of a tile's entries at R positions (int64): [BLOCK_N, R] float32."""
    QUARTER: tl.constexpr = BLOCK_N // 4
    COLS: tl.constexpr = position.shape[0]
    zero = tl.zeros((QUARTER, COLS), tl.uint32)
    block = zero + (tile * QUARTER + tl.arange(0, QUARTER)).to(tl.uint32)[:, None]
    at = zero + position.to(tl.uint32)[None, :]
    key0 = tl.load(seed_ptr).to(tl.uint32)
    key1 = tl.load(seed_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(key0, key1, block, at, zero)
    words = tl.join(tl.join(gumbel(w0), gumbel(w2)), tl.join(gumbel(w1), gumbel(w3)))
    return tl.reshape(tl.permute(words, (0, 2, 3, 1)), (BLOCK_N, COLS))


@triton.jit
def _store_columns(
    acc: tl.tensor,
    column: tl.tensor,
    tile: tl.tensor,
    count: tl.tensor,
    epilogue,
    OPTIONS,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Logits and statistics of a [BLOCK_N, 16] product."""
    w_ptr, out_ptr, stride_out, statistics, noise, places, vocab, padded, capacity = epilogue
    NOISY: tl.constexpr = OPTIONS[0]
    LOG2: tl.constexpr = OPTIONS[1]
    WHERE: tl.constexpr = OPTIONS[2]
    peak_ptr, total_ptr, best_ptr, token_ptr = statistics
    seed_ptr, positions_ptr, temperature_ptr = noise
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    row = column + tl.arange(0, 16)
    keep = row < count
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = tl.where(n[:, None] < vocab, round_to(acc, dtype, UPCAST), float("-inf"))
    wide_row = row.to(tl.int64)
    if WHERE == PLACED:
        decided_ptr, first_ptr = places
        wide_row += tl.load(decided_ptr) - tl.load(first_ptr)
        keep = keep & (wide_row >= 0) & (wide_row < capacity)
    mask = (n[:, None] < padded) & keep[None, :]
    tl.store(out_ptr + wide_row[None, :] * stride_out + n[:, None], logits, mask=mask)

    peak = tl.max(logits, 0)
    # A tile that is -inf throughout has the sum 0, not the NaN of inf - inf.
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tree_sum(tl.trans(tl.exp(logits - shift[None, :])), 16, LOG2)
    score = logits
    if NOISY:
        temperature = tl.load(temperature_ptr)
        # The noise is more work than all the rest of the epilogue, and greedy decoding needs none.
        if temperature > 0.0:
            if WHERE == PLACED:
                position = tl.load(positions_ptr) + row
            else:
                position = tl.load(positions_ptr + row, mask=keep, other=0)
            drawn = own_noise(seed_ptr, position, tile, BLOCK_N)
            score = tl.div_rn(logits, tl.zeros_like(logits) + temperature) + drawn
    best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    at = wide_row * tl.num_programs(1) + tile
    tl.store(peak_ptr + at, peak, mask=keep)
    tl.store(total_ptr + at, total, mask=keep)
    tl.store(best_ptr + at, best, mask=keep)
    tl.store(token_ptr + at, tile * BLOCK_N + index, mask=keep)


@triton.jit
def _store(
    acc: tl.tensor,
    column: tl.tensor,
    tile: tl.tensor,
    count: tl.tensor,
    epilogue,
    OPTIONS,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Logits and statistics of a [BLOCK_N, 16 or 64] product, 16 columns at a time: the noise of 64 would spill."""
    if acc.shape[1] == 16:
        _store_columns(acc, column, tile, count, epilogue, OPTIONS, BLOCK_N, UPCAST)
    else:
        blocks = tl.permute(tl.reshape(acc, (BLOCK_N, 4, 16)), (0, 2, 1))
        even, odd = tl.split(tl.reshape(blocks, (BLOCK_N, 16, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        quarters: tl.tuple = (first, second, third, fourth)
        for i in tl.static_range(4):
            _store_columns(
                quarters[i], column + 16 * i, tile, count, epilogue, OPTIONS, BLOCK_N, UPCAST
            )  # fmt: skip


# Neither the number of rows nor the place of a scalar in its buffer may make another binary.
@triton.jit(
    do_not_specialize=["count", "capacity", "eps"],
    do_not_specialize_on_alignment=[
        "rows_ptr", "peak_ptr", "total_ptr", "best_ptr", "token_ptr", "seed_ptr", "positions_ptr",
        "temperature_ptr", "start_ptr", "decided_ptr", "first_ptr", "active_ptr",
    ],
)  # fmt: skip
def head_kernel(
    x_ptr: tl.tensor,
    stride_x: tl.tensor,
    sumsq_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    stride_w: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride_out: tl.tensor,
    peak_ptr: tl.tensor,
    total_ptr: tl.tensor,
    best_ptr: tl.tensor,
    token_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    start_ptr: tl.tensor,
    decided_ptr: tl.tensor,
    first_ptr: tl.tensor,
    active_ptr: tl.tensor,
    count: tl.tensor,
    vocab: tl.tensor,
    padded: tl.tensor,
    capacity: tl.tensor,
    K: tl.tensor,
    NOISY: tl.constexpr,
    WHERE: tl.constexpr,
    NORM_LOG2: tl.constexpr,
    BLOCK_LOG2: tl.constexpr,
    SUBS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW_STAGES: tl.constexpr,
    WIDE_STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One program: BLOCK_N entries of the vocabulary, 16 rows or all of them."""
    tl.static_assert(SPLITS == 1)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = (w_ptr, stride_w, n, n < vocab)
    if tl.load(active_ptr) == 0:
        return
    statistics = (peak_ptr, total_ptr, best_ptr, token_ptr)
    noise = (seed_ptr, positions_ptr, temperature_ptr)
    places = (decided_ptr, first_ptr)
    epilogue = (w_ptr, out_ptr, stride_out, statistics, noise, places, vocab, padded, capacity)
    rows = (start_ptr, decided_ptr) if WHERE == PLACED else rows_ptr
    product(
        (x_ptr, stride_x, rows), weights, (sumsq_ptr, eps),
        (x_ptr, x_ptr), epilogue, (NOISY, BLOCK_LOG2, WHERE), count, K, _store,
        WHERE, NORM_LOG2, SUBS, SPLITS, BLOCK_N, BLOCK_K, NARROW_STAGES, WIDE_STAGES, EVEN, UPCAST,
    )  # fmt: skip


def _check_inputs(x: Tensor, sumsq: Tensor, weight: Tensor) -> None:
    check_tensor("weight", weight, (None, None), DTYPES, x.device)
    width = weight.shape[1]
    check_tensor("x", x, (WINDOW, width), weight.dtype, x.device)
    check_tensor("sumsq", sumsq, (tiles(width, CHANNELS), WINDOW), torch.float32, x.device, contiguous=True)


def _checked_rows(
    rows: Tensor | Placement, device: torch.device
) -> tuple[int, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Their number, a tensor for the kernel's list of rows, and the three scalars of a `Placement`."""
    if isinstance(rows, Placement):
        count, some = rows.count, rows.start
        for name in ("start", "decided", "first"):
            check_tensor(f"rows.{name}", getattr(rows, name), (), torch.int64, device)
        scalars = (rows.start, rows.decided, rows.first)
    else:
        check_tensor("rows", rows, (None,), torch.int64, device, contiguous=True)
        count, some = rows.shape[0], rows
        scalars = (rows, rows, rows)
    if not 1 <= count <= WINDOW:
        raise ValueError(f"rows has {count} entries, expected 1 to {WINDOW}")
    return count, some, scalars


def _check_outputs(
    out: Tensor,
    statistics: TileStatistics,
    vocab_size: int,
    config: ProjectionConfig,
    device: torch.device,
    placed: bool,
) -> None:
    check_tensor("out", out, (None if placed else WINDOW, None), torch.float32, device)
    padded = out.shape[1]
    if padded < vocab_size:
        raise ValueError(f"out has {padded} columns, expected at least vocab_size = {vocab_size}")
    if out.stride(0) % PADDING or out.data_ptr() % 16:
        raise ValueError(f"out has rows of stride {out.stride(0)}, expected a multiple of {PADDING}, aligned")
    count = tiles(padded, config.block_n)
    for name in ("peak", "total", "best", "token"):
        kind = torch.int32 if name == "token" else torch.float32
        tensor: Tensor = getattr(statistics, name)
        check_tensor(f"statistics.{name}", tensor, (out.shape[0], count), kind, device, contiguous=True)


def _check_noise(noise: Noise, count: int, device: torch.device, placed: bool) -> None:
    check_tensor("noise.seed", noise.seed, (2,), torch.int64, device, contiguous=True)
    if noise.positions is not None:
        check_tensor("noise.positions", noise.positions, (count,), torch.int64, device, contiguous=True)
    if placed != (noise.positions is None):
        raise ValueError(f"noise.positions is {noise.positions}, expected None iff rows is a Placement")
    check_tensor("noise.temperature", noise.temperature, (), torch.float32, device)


def plan(
    x: Tensor,
    sumsq: Tensor,
    eps: float,
    weight: Tensor,
    rows: Tensor | Placement,
    vocab_size: int,
    out: Tensor,
    statistics: TileStatistics,
    noise: Noise | None,
    config: ProjectionConfig,
    *,
    active: Tensor | None = None,
) -> Launch:
    """The launch of an LM head.

    Args:
        x: [64, C] dtype (float32, bfloat16 or float16), the residual stream times the weight of the RMSNorm.
        sumsq: [ceil(C / 64), 64] float32, contiguous: sums of squares of the residual stream per 64-channel tile.
        eps: of the RMSNorm.
        weight: [V, C] dtype.
        rows: [R] int64, contiguous, 1 <= R <= 64: indices of rows of x; or a `Placement`.
        vocab_size: valid entries, at most V; later ones become -inf.
        out: [M, P] float32 with vocab_size <= P <= V rounded up to the tile; a row's stride is a multiple of 4
            and the first element aligned to 16 bytes. M is 64, with a `Placement` any number. Columns from
            vocab_size on become -inf, rows that are not asked for are left alone.
        statistics: [M, ceil(P / block_n)]; rows that are not asked for are left alone.
        noise: of the own tokens, or None where none is wanted; a graph variant.
        config: `projection_config("head", ...)`, without splits.
        active: 0-d int64, read on the device: 0 and the launch does nothing. None: it always runs.

    Raises:
        ValueError: names the argument that does not fit.
    """
    device, width = x.device, weight.shape[-1]
    _check_inputs(x, sumsq, weight)
    count, some, scalars = _checked_rows(rows, device)
    placed = isinstance(rows, Placement)
    entries = weight.shape[0]
    if not 1 <= vocab_size <= entries:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 to {entries}, the rows of weight")
    if config.splits != 1:
        raise ValueError(f"config.splits is {config.splits}, expected 1")
    _check_outputs(out, statistics, vocab_size, config, device, placed)
    if noise is not None:
        _check_noise(noise, count, device, placed)
    padded = out.shape[1]
    return Launch(
        head_kernel,
        product_grid(config, padded, count),
        (
            x,
            x.stride(0),
            sumsq,
            eps,
            weight,
            weight.stride(0),
            some,
            out,
            out.stride(0),
            statistics.peak,
            statistics.total,
            statistics.best,
            statistics.token,
            some if noise is None else noise.seed,
            scalars[1] if noise is None or noise.positions is None else noise.positions,
            out if noise is None else noise.temperature,
            *scalars,
            active_flag(active, device),
            count,
            vocab_size,
            padded,
            out.shape[0],
            width,
        ),
        {
            "NOISY": noise is not None,
            "WHERE": (PLACED if placed else LISTED).value,
            "NORM_LOG2": tile_log2(width),
            "BLOCK_LOG2": (config.block_n - 1).bit_length(),
            **product_options(head_kernel, config, width),
        },
    )


run = runner(plan)
