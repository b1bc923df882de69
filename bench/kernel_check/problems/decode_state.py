"""A decode state in the middle of a verify: logits rows as the head leaves them, a proposal, an open round.

The problems and timings of the decision kernels begin here. Statistics and noise are torch's, on the state's own
device, so that an own token without filters is exactly torch's.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional

from bench.kernel_check.problems.base import Place
from pyramid_rt.kernels.decide.decode_state import (
    END,
    LIMIT,
    TILE,
    DecodeState,
    active_at,
    bad_at,
    base_at,
    cached_at,
)
from pyramid_rt.kernels.limits import NO_POSITION, WINDOW
from pyramid_rt.kernels.reference import sampling as ops

# Where the outer round and its proposal begin, and the limit of a request that has room left.
BASE = 37
FAR = BASE + 3 * WINDOW
CAPACITY = BASE + 4 * WINDOW + 3
SEED = 0xFEDC_BA98_7654_3210
# top_k, top_p, min_p; the first is off.
FILTERS = ((0, 1.0, 0.0), (50, 0.95, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (40, 0.8, 0.02), (1, 1.0, 0.0))
# What the kernels compute: floats first, which NaN poisons, then integers.
FLOATS = ("normaliser", "cut", "distance", "partials", "values", "winners")
INTEGERS = ("own", "non_finite", "amounts", "picked", "found", "winning")
# What a verify changes.
STATE = ("control", "ended", "tokens", "origin", "counters", "source")
POISON = -(10**6)


def make_decode_state(
    place: Place, vocab: int, count: int, *, tiers: int = 2, lists: bool = True
) -> DecodeState:
    """A decode state of a tier's `count` rows and a few to spare; nothing is open on it.

    Rows are a multiple of four, so that stacked copies of the [R] buffers keep the alignment of one.
    """
    rows = 4 * (-(-count // 4) + 1)
    return DecodeState.allocate(tiers, rows, CAPACITY, vocab, lists=lists, device=place.device)


def request(state: DecodeState, *, temperature: float, filters: int = 0, threshold: float = 0.0) -> None:
    """Seed, temperature, one of `FILTERS` by number, and the threshold of every fuzzy rule."""
    state.seed.copy_(torch.tensor([SEED & 0xFFFFFFFF, SEED >> 32]))
    state.temperature.fill_(temperature)
    for name, value in zip(("top_k", "top_p", "min_p"), FILTERS[filters], strict=True):
        getattr(state, name).fill_(value)
    state.thresholds.fill_(threshold)


def positions(state: DecodeState, count: int) -> Tensor:
    """int64 [count]: what the first rows decide."""
    return torch.arange(count, device=state.rows.device) + BASE


def scores(state: DecodeState, logits: Tensor) -> Tensor:
    """Scaled logits and noise, [R, V] float32, of rows from the first position on; raw logits at temperature 0."""
    if float(state.temperature) == 0.0:
        return logits
    noise = ops.own_noise(state.seed, positions(state, logits.shape[0]), logits.shape[1])
    return logits / state.temperature + noise


def put_rows(state: DecodeState, level: int, logits: Tensor, score: Tensor) -> None:
    """Raw logits and scores [R, V] into a tier's rows from the first on, with the statistics of their tiles."""
    count, tile_count = logits.shape[0], state.statistics.peak.shape[2]
    spare = tile_count * TILE - logits.shape[1]
    # In two steps: a vocabulary of 128,256 and 64 rows take 33 MB a tensor.
    wide = functional.pad(logits, (0, spare), value=-math.inf)
    state.rows[level, :count] = wide[:, : state.rows.shape[2]]
    tiled = wide.view(count, tile_count, TILE)
    peak = tiled.amax(-1)
    shift = torch.where(peak == -math.inf, 0.0, peak).unsqueeze(-1)
    found = state.statistics_of(level)
    found.peak[:count] = peak
    found.total[:count] = (tiled - shift).exp().sum(-1)
    tiled = functional.pad(score, (0, spare), value=-math.inf).view(count, tile_count, TILE)
    at = tiled.argmax(-1, keepdim=True)
    found.best[:count] = tiled.gather(-1, at).squeeze(-1)
    tile = torch.arange(tile_count, device=logits.device) * TILE
    found.token[:count] = (at.squeeze(-1) + tile).to(torch.int32)


def hide_rows(state: DecodeState, level: int, first: int) -> None:
    """NaN into a tier's rows from `first` on, statistics included: nobody may read them."""
    state.rows[level, first:] = math.nan
    found = state.statistics_of(level)
    for tensor in (found.peak, found.total, found.best):
        tensor[first:] = math.nan
    found.token[first:] = POISON


def open_verify(
    state: DecodeState, level: int, proposed: Tensor, *, limit: int = FAR, ended: bool = False
) -> None:
    """A proposal [m] of the tier below `level` from `BASE` on, all drawn by that tier, in an open outer round."""
    count, tiers = proposed.shape[0], state.tiers_count
    state.tokens.zero_()
    state.origin.fill_(POISON)
    state.tokens[BASE : BASE + count] = proposed
    state.origin[BASE : BASE + count] = level - 1
    state.source.fill_(POISON)
    state.source[:count] = level - 1
    state.counters.zero_()
    state.ended.fill_(ended)
    words = [0] * state.control.shape[0]
    words[END], words[LIMIT] = BASE + count, limit
    for tier in range(tiers):
        words[base_at(tiers, tier)], words[active_at(tiers, tier)] = BASE, 1
        words[cached_at(tier)] = BASE + count - 1 if tier < level else BASE - 1
        words[bad_at(tiers, tier)] = NO_POSITION
    state.control.copy_(torch.tensor(words))


def poison(state: DecodeState) -> None:
    """NaN, or a number that none is, into everything that kernels compute."""
    for name in FLOATS:
        getattr(state, name).fill_(math.nan)
    for name in INTEGERS:
        getattr(state, name).fill_(POISON)


def snapshot(state: DecodeState) -> dict[str, Tensor]:
    """Copies of what a verify changes."""
    return {name: getattr(state, name).clone() for name in STATE}


def restore(state: DecodeState, kept: dict[str, Tensor]) -> None:
    """Undo what happened since a `snapshot`."""
    for name, tensor in kept.items():
        getattr(state, name).copy_(tensor)


def results(state: DecodeState) -> dict[str, Tensor]:
    """The state and every result but scratch."""
    kept = ("own", "non_finite", "normaliser", "cut", "distance")
    known = {field.name for field in fields(state)}
    assert known.issuperset((*STATE, *kept))
    return {name: getattr(state, name) for name in (*STATE, *kept)}
