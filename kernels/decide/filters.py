"""Processed distributions of logits rows as three numbers each: cut, normaliser and own token.

Processed logits of a row are s = logit / temperature where s >= cut, else -inf. The cut is the largest of

- top-k: the k-th largest s
- top-p: the least s of an entry above which less than top_p S weighs, S = sum of exp(s) over the top-k set
- min-p: max s + log(min_p)

so ties stand. The normaliser is log(sum of exp(s) over s >= cut). The own token is the head's noisy winner where
that stands, else the noisy winner among those that do. At temperature 0 it is the argmax, and the rest unused.
Source of the filters: `reference.sampling.filter_logits`, which they equal but where the running sum of top-p,
or exp(s - max s) of min-p, is within rounding of its bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyramid_rt.kernels.configs import architecture
from pyramid_rt.kernels.decide.decode_state import BLOCK, CHUNK, TILE, DecodeState, active_word, base_word
from pyramid_rt.kernels.decide.rows import (
    divisor,
    join_lists,
    key_value,
    least_key,
    light_bound,
    listed_from,
    near_bound,
    order_key,
    power_of_two,
    row_normaliser,
    row_winner,
    scaled_logits,
    slack,
    sum_of_shares,
    tile_gaps,
)
from pyramid_rt.kernels.launch import Launch, arrive, tiles
from pyramid_rt.kernels.noise import gumbel_at

# Listed values that are held against sixteen keys at a time, per architecture where fewer registers are left, and
# those that are put in order at a time; more would spill.
SEARCH, SEARCH_OF = 512, {120: 256}
JOINED = 256
OPTIONS = {"num_stages": 2, "enable_fp_fusion": False}
# Warps of a program per architecture: the others spill with one or the other of the supported Tritons.
WARPS, WARPS_OF = 8, {100: 4}


@triton.jit
def least_likely(top: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """top + log(min_p), -inf where min-p is off."""
    return tl.where(
        min_p > 0.0, tl.minimum(top + tl.log(tl.maximum(min_p, 1.1754943508222875e-38)), top), float("-inf")
    )


@triton.jit
def list_bound(
    top: tl.tensor, gaps: tl.tensor, top_k_ptr: tl.tensor, top_p_ptr: tl.tensor, min_p_ptr: tl.tensor
) -> tl.tensor:
    """A value at or below the cut, from which on entries are listed."""
    top_k, top_p, min_p = tl.load(top_k_ptr), tl.load(top_p_ptr), tl.load(min_p_ptr)
    gap = top * 0.0 + float("inf")
    if top_k > 0:
        gap = near_bound(gaps, top_k)
    elif top_p < 1.0:
        gap = light_bound(gaps, 1.0 - top_p)
    bound = top - gap - slack(top)
    # Top-p weighs the whole top-k set, also what min-p takes out of it.
    if (top_k <= 0) | (top_p >= 1.0):
        bound = tl.maximum(bound, least_likely(top, min_p))
    return bound


@triton.jit
def find_cut(
    values_ptr: tl.tensor, length: tl.tensor, bound: tl.tensor, top: tl.tensor, mass: tl.tensor,
    top_k_ptr: tl.tensor, top_p_ptr: tl.tensor, min_p_ptr: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The cut of a row whose entries from `bound` on are listed and that weighs `mass` in all."""
    top_k, top_p, min_p = tl.load(top_k_ptr), tl.load(top_p_ptr), tl.load(min_p_ptr)
    cut = order_key(top * 0.0 + float("-inf"))
    if (top_k > 0) & (top_k < vocab):
        cut = least_key(values_ptr, length, bound, top, top, top_k.to(tl.float32), False, BLOCK)
        _, mass = listed_from(values_ptr, length, cut, top, BLOCK)
    if top_p < 1.0:
        cut = tl.maximum(cut, least_key(values_ptr, length, bound, top, top, top_p * mass, True, BLOCK))
    return tl.maximum(key_value(cut), least_likely(top, min_p))


@triton.jit
def filtered_winner(
    values_ptr: tl.tensor, found_ptr: tl.tensor, length: tl.tensor, cut: tl.tensor, seed_ptr: tl.tensor,
    position: tl.tensor, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The noisy winner (int64) among the listed entries from the cut on, ties to the lowest index."""
    best = cut * 0.0 + float("-inf")
    token = length * 0
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        s = tl.load(values_ptr + at, mask=at < length, other=float("-inf"))
        index = tl.load(found_ptr + at, mask=at < length, other=0)
        stands = (at < length) & (s >= cut)
        score = tl.where(stands, s + gumbel_at(seed_ptr, index, position, 0), float("-inf"))
        highest = tl.max(score, 0)
        lowest = tl.min(tl.where(stands & (score == highest), index, 0x7FFFFFFF), 0)
        token = tl.where(highest > best, lowest, token)
        best = tl.maximum(best, highest)
    return token.to(tl.int64)


@triton.jit
def load_values(
    row_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor, length: tl.tensor, divide: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Scaled logits of the listed entries."""
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        index = tl.load(found_ptr + at, mask=at < length, other=0)
        x = tl.load(row_ptr + index, mask=at < length, other=0.0)
        tl.store(values_ptr + at, scaled_logits(x, divide), mask=at < length)
    tl.debug_barrier()


@triton.jit
def filter_row(
    row_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor, length: tl.tensor, bound: tl.tensor,
    top: tl.tensor, mass: tl.tensor, token: tl.tensor, temperature: tl.tensor, seed_ptr: tl.tensor,
    position: tl.tensor, top_k_ptr: tl.tensor, top_p_ptr: tl.tensor, min_p_ptr: tl.tensor, vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Cut, weight of what stands, and own token of a row, from its listed entries and its unfiltered winner."""
    divide = divisor(temperature)
    load_values(row_ptr, found_ptr, values_ptr, length, divide, BLOCK)
    cut = find_cut(
        values_ptr, length, bound, top, mass, top_k_ptr, top_p_ptr, min_p_ptr, vocab, BLOCK
    )  # fmt: skip
    _, mass = listed_from(values_ptr, length, order_key(cut), top, BLOCK)
    # At temperature 0 nothing is read of this but the own token, which is the head's.
    fallen = scaled_logits(tl.load(row_ptr + token), divide) < cut
    if fallen & (temperature > 0.0):
        token = filtered_winner(values_ptr, found_ptr, length, cut, seed_ptr, position, BLOCK)
    return cut, mass, token


@triton.jit
def survey(
    row_ptr: tl.tensor, picked_ptr: tl.tensor, chunk: tl.tensor, top: tl.tensor, bound: tl.tensor,
    divide: tl.tensor, vocab: tl.tensor, FILTERS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """A share of a row: its sum of exp(s - top), and how many entries from `bound` on were listed."""
    mass = tl.zeros((BLOCK,), tl.float32)
    amount = chunk * 0
    for first in tl.range(0, tl.minimum(vocab - chunk * CHUNK, CHUNK), BLOCK):
        index = chunk * CHUNK + first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + index, mask=index < vocab, other=float("-inf"))
        s = scaled_logits(x, divide)
        mass += tl.exp(s - top)
        if FILTERS:
            keep = (index < vocab) & (s >= bound)
            place = tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(picked_ptr + chunk * CHUNK + amount + place, index, mask=keep)
            amount += tl.sum(keep.to(tl.int32), 0)
    return tl.sum(mass, 0), amount


@triton.jit
def row_of(
    control_ptr: tl.tensor, slot: tl.tensor, row_count: tl.tensor, N: tl.constexpr, LEVEL: tl.constexpr,
    DRAW: tl.constexpr, COUNT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of a slot of the grid: its row among all tiers' rows, the position that row decides, and whether it has work.

    Tier LEVEL's rows come first, then, past COUNT, those of the tier below.
    """
    end = tl.load(control_ptr)
    outer = tl.load(base_word(control_ptr, N, N - 1))
    decided = end
    if not DRAW:
        decided = tl.load(base_word(control_ptr, N, LEVEL - 1))
    above = slot < COUNT
    level = tl.where(above, LEVEL, LEVEL - 1)
    step = tl.where(above, slot, slot - COUNT)
    row = decided - outer + step
    # The row after a proposal is the judge's alone.
    active = (row >= 0) & (row < row_count) & (decided + step < end + above.to(tl.int64))
    active = active & (tl.load(active_word(control_ptr, N, LEVEL)) != 0)
    return level.to(tl.int64) * row_count + row, decided + step, active


# What a request may change stays in device scalars; lengths of a round are part of a graph, as are these.
@triton.jit
def filters_kernel(
    control_ptr: tl.tensor, seed_ptr: tl.tensor, temperature_ptr: tl.tensor, top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor, min_p_ptr: tl.tensor, rows_ptr: tl.tensor, peak_ptr: tl.tensor, total_ptr: tl.tensor,
    best_ptr: tl.tensor, token_ptr: tl.tensor, own_ptr: tl.tensor, normaliser_ptr: tl.tensor, cut_ptr: tl.tensor,
    non_finite_ptr: tl.tensor, partials_ptr: tl.tensor, amounts_ptr: tl.tensor, arrivals_ptr: tl.tensor,
    picked_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor, row_count: tl.tensor, padded: tl.tensor,
    tile_count: tl.tensor, vocab: tl.tensor,
    N: tl.constexpr, LEVEL: tl.constexpr, DRAW: tl.constexpr, COUNT: tl.constexpr, FILTERS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
    JOINED: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """One share of one row, and by the row's last share its three numbers."""
    chunk = tl.program_id(0)
    slot = tl.program_id(1)
    place, position, active = row_of(control_ptr, slot, row_count, N, LEVEL, DRAW, COUNT)
    # Returns, not branches: what is nested deeper than the hardware keeps track of goes to memory.
    if active == 0:
        return
    offset = place * tile_count
    temperature = tl.load(temperature_ptr)
    divide = divisor(temperature)
    top, gaps = tile_gaps(peak_ptr, offset, tile_count, divide, TILES)
    bound = top
    if FILTERS:
        bound = list_bound(top, gaps, top_k_ptr, top_p_ptr, min_p_ptr)
    list_at = slot.to(tl.int64) * (CHUNKS * CHUNK)
    mass, amount = survey(
        rows_ptr + place * padded, picked_ptr + list_at, chunk, top, bound, divide, vocab, FILTERS, CHUNK, BLOCK
    )  # fmt: skip
    tl.store(partials_ptr + slot * CHUNKS + chunk, mass)
    if FILTERS:
        tl.store(amounts_ptr + slot * CHUNKS + chunk, amount)
    last = arrive(arrivals_ptr + slot, CHUNKS)
    if last == 0:
        return
    mass = sum_of_shares(partials_ptr + slot * CHUNKS, CHUNKS, SLOTS)
    token = row_winner(best_ptr, token_ptr, offset, tile_count, vocab, TILES)
    _, non_finite = row_normaliser(peak_ptr, total_ptr, offset, tile_count, TILES)
    cut = top * 0.0 + float("-inf")
    if FILTERS:
        length = join_lists(
            amounts_ptr + slot * CHUNKS, picked_ptr + list_at, found_ptr + list_at, CHUNKS, CHUNK, SLOTS, JOINED
        )  # fmt: skip
        cut, mass, token = filter_row(
            rows_ptr + place * padded, found_ptr + list_at, values_ptr + list_at, length, bound, top, mass,
            token, temperature, seed_ptr, position, top_k_ptr, top_p_ptr, min_p_ptr, vocab, SEARCH,
        )  # fmt: skip
    tl.store(own_ptr + place, token)
    tl.store(normaliser_ptr + place, top + tl.log(tl.where(mass > 0.0, mass, 1.0)))
    tl.store(cut_ptr + place, cut)
    tl.store(non_finite_ptr + place, non_finite)


def plan(
    state: DecodeState,
    level: int,
    count: int,
    *,
    draw: bool,
    filters: bool,
    below: bool = False,
    arch: int | None = None,
) -> Launch:
    """The launch over the rows that tier `level` has just computed.

    Args:
        state: see `DecodeState`.
        level: the tier.
        count: rows: 1 for a draw, else as many as the longest proposal below plus the one after it.
        draw: the row decides the next token; else the rows verify the proposal of the tier below.
        filters: top-k, top-p or min-p may be on; a graph variant.
        below: also the rows of the tier below for the proposed positions; without filters only.
        arch: one of `configs.ARCHITECTURES`; None for that of the decode state's device.

    Raises:
        ValueError: names the argument that does not fit.
    """
    state.check(level, count, lists=filters)
    if draw and count != 1:
        raise ValueError(f"count is {count}, expected 1 where a token is drawn")
    if not draw and level == 0:
        raise ValueError("level is 0, expected at least 1: the lowest tier verifies nothing")
    if below and (draw or filters or count < 2):
        raise ValueError(f"below is True, expected False with draw={draw}, filters={filters}, count={count}")
    s, chunks = state.statistics, tiles(state.vocab_size, CHUNK)
    tile_count = s.peak.shape[2]
    arch = architecture(state.rows.device) if arch is None else arch
    return Launch(
        filters_kernel,
        (chunks, 2 * count - 1 if below else count, 1),
        (
            state.control, state.seed, state.temperature, state.top_k, state.top_p, state.min_p,
            state.rows, s.peak, s.total, s.best, s.token, state.own, state.normaliser, state.cut, state.non_finite,
            state.partials, state.amounts, state.arrivals, state.picked, state.found, state.values,
            state.rows.shape[1], state.rows.shape[2], tile_count, state.vocab_size,
        ),
        {
            "N": state.tiers_count, "LEVEL": level, "DRAW": draw, "COUNT": count, "FILTERS": filters,
            "CHUNKS": chunks, "CHUNK": CHUNK, "SLOTS": power_of_two(chunks),
            "BLOCK": min(BLOCK, power_of_two(max(state.vocab_size, TILE))),
            "SEARCH": SEARCH_OF.get(arch, SEARCH), "JOINED": JOINED, "TILES": power_of_two(tile_count),
            "num_warps": WARPS_OF.get(arch, WARPS), **OPTIONS,
        },
    )  # fmt: skip
