"""Consequences of a verdict for the sequence: prefix, correction or bonus, lengths of all tiers, counters, and the
mark that opens the next round. One program's work, over the at most 64 positions of a verify.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyramid_rt.kernels.decide.decode_state import (
    active_word,
    bad_word,
    base_word,
    cached_word,
    limit_word,
    mark,
)
from pyramid_rt.kernels.limits import NO_POSITION

NONE = tl.constexpr(NO_POSITION)


@triton.jit
def first_non_finite(
    control_ptr: tl.tensor, non_finite: tl.tensor, positions: tl.tensor, valid: tl.tensor, N: tl.constexpr,
    LEVEL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The tier's first undecidable position, those of this verify included."""
    before = tl.load(bad_word(control_ptr, N, LEVEL))
    found = tl.min(tl.where(valid & (non_finite != 0), positions, NONE), 0)
    return tl.minimum(before, found)


@triton.jit
def prefix_length(stands: tl.tensor, steps: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Number of the first `count` that stand before one falls (int64)."""
    falls = (stands == 0) & (steps < count)
    return tl.minimum(tl.min(tl.where(falls, steps, 1 << 20), 0).to(tl.int64), count)


@triton.jit
def commit(
    control_ptr: tl.tensor,
    ended_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    origin_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    stop_ptr: tl.tensor,
    source_ptr: tl.tensor,
    proposed: tl.tensor,
    own: tl.tensor,
    stands: tl.tensor,
    inherited: tl.tensor,
    non_finite: tl.tensor,
    residual: tl.tensor,
    until: tl.tensor,
    N: tl.constexpr,
    LEVEL: tl.constexpr,
    LOSSLESS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UNTIL: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Judge the proposal of the tier below LEVEL and open the next round at LEVEL.

    Vectors [ROWS] begin at the proposal: proposed and own tokens (int64), which stand, which keep the
    distribution they were drawn from, which rows cannot be decided. `residual` replaces the first token that
    falls with RESIDUAL, else the own token there does.
    """
    steps = tl.arange(0, ROWS)
    end = tl.load(control_ptr)
    limit = tl.load(limit_word(control_ptr))
    proposal = tl.load(base_word(control_ptr, N, LEVEL - 1))
    outer = tl.load(base_word(control_ptr, N, N - 1))
    active = tl.load(active_word(control_ptr, N, LEVEL)) != 0
    ended = tl.load(ended_ptr) != 0
    if active:
        count = end - proposal
        accepted = prefix_length(stands, steps, count)
        whole = accepted == count
        position = proposal + accepted
        replace = (whole & (ended | (position >= limit))) == 0
        token = tl.sum(tl.where(steps == accepted, own, 0), 0)
        if RESIDUAL:
            token = tl.where(whole, token, residual)
        standing = steps < accepted
        differing = tl.sum((standing & (proposed != own)).to(tl.int64), 0)
        bad = first_non_finite(control_ptr, non_finite, proposal + steps, steps <= count, N, LEVEL)
        column = tl.arange(0, 8)
        here = counters_ptr + (LEVEL - 1) * 7 + column
        made = tl.where(column == 0, count, tl.where(column == 1, accepted, 0))
        if not LOSSLESS:
            made = tl.where(column == 2, differing, made)
        made = tl.where(column == 3, whole.to(tl.int64), made)
        made = tl.where(column == 4, replace.to(tl.int64), tl.where(column == 5, 1, made))
        counted = tl.load(here, mask=column < 6, other=0) + made
        forwards = tl.load(counters_ptr + LEVEL * 7 + 6) + 1
        tier = tl.arange(0, 16)
        cached = tl.load(cached_word(control_ptr, tier), mask=tier <= LEVEL, other=0)
        cached = tl.where(tier == LEVEL, position, tl.minimum(cached, position))
        stop = tl.load(stop_ptr + token) != 0
        # Every warp has read the counts before one of them writes.
        tl.debug_barrier()
        tl.store(here, counted, mask=column < 6)
        tl.store(counters_ptr + LEVEL * 7 + 6, forwards)
        tl.store(cached_word(control_ptr, tier), cached, mask=tier <= LEVEL)
        tl.store(bad_word(control_ptr, N, LEVEL), bad)
        tl.store(source_ptr + proposal - outer + steps, LEVEL, mask=standing & (inherited == 0))
        ended = ended & whole
        end = position
        if replace:
            tl.store(tokens_ptr + position, token)
            tl.store(origin_ptr + position, LEVEL)
            tl.store(source_ptr + position - outer, LEVEL)
            ended = ended | stop
            end = position + 1
        tl.store(control_ptr, end)
        tl.store(ended_ptr, ended.to(tl.uint8))
    tl.debug_barrier()
    mark(control_ptr, end, (end < limit) & (ended == 0), until, N, LEVEL, UNTIL)
