"""One token put without a verify: a step of the lowest tier's burst, or the first token after the prompt.

The token is the noisy winner of the head's tiles, or, where processed distributions are wanted, what
`filters` stored. Nothing is put where the round is not active, at the limit, or after a stop token; the lowest
tier's active flag says so to the passes of the rest of a burst.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyramid_rt.kernels.decide.decode_state import (
    DecodeState,
    active_word,
    bad_word,
    base_word,
    cached_word,
    limit_word,
    mark,
)
from pyramid_rt.kernels.decide.rows import power_of_two, row_normaliser, row_winner
from pyramid_rt.kernels.launch import Launch

OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def sample_kernel(
    control_ptr: tl.tensor,
    ended_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    origin_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    stop_ptr: tl.tensor,
    source_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    total_ptr: tl.tensor,
    best_ptr: tl.tensor,
    token_ptr: tl.tensor,
    own_ptr: tl.tensor,
    non_finite_ptr: tl.tensor,
    row_count: tl.tensor,
    tile_count: tl.tensor,
    vocab: tl.tensor,
    N: tl.constexpr,
    LEVEL: tl.constexpr,
    FIRST: tl.constexpr,
    STORED: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """One program; the row decides the position `end`."""
    end = tl.load(control_ptr)
    limit = tl.load(limit_word(control_ptr))
    outer = tl.load(base_word(control_ptr, N, N - 1))
    ended = tl.load(ended_ptr) != 0
    go = (end < limit) & (ended == 0)
    if not FIRST:
        # The word that the tier's pass went by: without it there is no row.
        go = go & (tl.load(active_word(control_ptr, N, 0)) != 0)
    bad = tl.load(bad_word(control_ptr, N, LEVEL))
    forwards = tl.load(counters_ptr + LEVEL * 7 + 6) + 1
    if go:
        place = LEVEL * row_count + (end - outer)
        if STORED:
            token = tl.load(own_ptr + place)
            non_finite = tl.load(non_finite_ptr + place)
        else:
            token = row_winner(best_ptr, token_ptr, place * tile_count, tile_count, vocab, TILES)
            _, non_finite = row_normaliser(peak_ptr, total_ptr, place * tile_count, tile_count, TILES)
        bad = tl.where(non_finite != 0, tl.minimum(bad, end), bad)
        stop = tl.load(stop_ptr + token) != 0
        # Every warp has read the counts before one of them writes.
        tl.debug_barrier()
        tl.store(tokens_ptr + end, token)
        tl.store(bad_word(control_ptr, N, LEVEL), bad)
        tl.store(source_ptr + (end - outer), LEVEL)
        tl.store(cached_word(control_ptr, LEVEL), end)
        if not FIRST:
            tl.store(origin_ptr + end, LEVEL)
            tl.store(counters_ptr + LEVEL * 7 + 6, forwards)
            # What is left of the burst is skipped. With one tier, `mark` sees to it.
            if N > 1:
                tl.store(active_word(control_ptr, N, 0), ((end + 1 < limit) & (stop == 0)).to(tl.int64))
        tl.store(control_ptr, end + 1)
        tl.store(ended_ptr, stop.to(tl.uint8))
        end += 1
        ended = stop
    if FIRST or N == 1:
        tl.debug_barrier()
        mark(control_ptr, end, (end < limit) & (ended == 0), 0, N, N - 1, False)


@triton.jit
def begin_kernel(control_ptr: tl.tensor, ended_ptr: tl.tensor, N: tl.constexpr) -> None:
    """Open an outer round at the end of the sequence."""
    end = tl.load(control_ptr)
    unfinished = (end < tl.load(limit_word(control_ptr))) & (tl.load(ended_ptr) == 0)
    mark(control_ptr, end, unfinished, 0, N, N - 1, False)


def plan_begin(state: DecodeState) -> Launch:
    """The launch that opens the first outer round; every later one is opened by the launch that ends a round.

    Raises:
        ValueError: the decode state's buffers do not fit each other.
    """
    state.check(0, 1)
    return Launch(
        begin_kernel,
        (1, 1, 1),
        (state.control, state.ended.view(torch.uint8)),
        {"N": state.tiers_count, **OPTIONS},
    )


def plan(state: DecodeState, level: int, *, first: bool, stored: bool) -> Launch:
    """The launch that puts one token.

    Args:
        state: see `DecodeState`.
        level: the tier whose row decides it: the lowest, or the target after the prompt.
        first: the first token after the prompt, which no statistic counts; opens the first outer round.
        stored: `filters` has run on the row.

    Raises:
        ValueError: names the argument that does not fit.
    """
    state.check(level, 1)
    if level != (state.tiers_count - 1 if first else 0):
        raise ValueError(
            f"level is {level}, expected {state.tiers_count - 1 if first else 0} with first={first}"
        )
    s, tile_count = state.statistics, state.statistics.peak.shape[2]
    return Launch(
        sample_kernel,
        (1, 1, 1),
        (
            *state.sequence(), s.peak, s.total, s.best, s.token, state.own,
            state.non_finite, state.rows.shape[1], tile_count, state.vocab_size,
        ),
        {
            "N": state.tiers_count, "LEVEL": level, "FIRST": first, "STORED": stored,
            "TILES": power_of_two(tile_count), **OPTIONS,
        },
    )  # fmt: skip
