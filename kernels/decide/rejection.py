"""Rejection (speculative sampling) against the distribution that each token was really drawn from.

x stands iff u q(x) < p(x), p of the verifying tier, q of the tier that `source` names. The token that replaces the
first one to fall is argmax of log max(p - q, 0) + g, or of log p + g where p - q is nowhere positive, with the
residual noise g of the stage; after a whole proposal it is the verifying tier's own. Sources: arXiv:2211.17192,
section 2.3; arXiv:2302.01318, algorithm 2.

Every program judges the rows from the scalars that `filters` left, and scans its share of the one row that
falls; the last one to arrive decides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyramid_rt.kernels.decide.commit import commit, prefix_length
from pyramid_rt.kernels.decide.decode_state import SCAN, DecodeState, active_word, base_word
from pyramid_rt.kernels.decide.rows import power_of_two, processed_log
from pyramid_rt.kernels.launch import Launch, arrive, tiles
from pyramid_rt.kernels.noise import chosen_words, consecutive_words, gumbel, uniform

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}


@triton.jit
def reject_kernel(
    control_ptr: tl.tensor,
    ended_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    origin_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    stop_ptr: tl.tensor,
    source_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    own_ptr: tl.tensor,
    normaliser_ptr: tl.tensor,
    cut_ptr: tl.tensor,
    non_finite_ptr: tl.tensor,
    winners_ptr: tl.tensor,
    winning_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    row_count: tl.tensor,
    padded: tl.tensor,
    vocab: tl.tensor,
    until: tl.tensor,
    N: tl.constexpr,
    LEVEL: tl.constexpr,
    UNTIL: tl.constexpr,
    SHARES: tl.constexpr,
    SCAN: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Rejection: every program judges, and scans SCAN entries of the row that falls."""
    share = tl.program_id(0)
    proposal = tl.load(base_word(control_ptr, N, LEVEL - 1))
    outer = tl.load(base_word(control_ptr, N, N - 1))
    # An inactive verify has no rows, not even the one after its proposal.
    live = tl.load(active_word(control_ptr, N, LEVEL)) != 0
    count = tl.where(live, tl.load(control_ptr) - proposal, -1)
    temperature = tl.load(temperature_ptr)
    steps = tl.arange(0, ROWS)
    row = proposal - outer + steps
    valid = steps < count
    proposed = tl.load(tokens_ptr + proposal + steps, mask=valid, other=0)
    p_place = LEVEL * row_count + row
    own = tl.load(own_ptr + p_place, mask=steps <= count, other=0)
    p_log = log_at(rows_ptr, normaliser_ptr, cut_ptr, own_ptr, p_place, proposed, padded, temperature, valid)
    q_place = tl.load(source_ptr + row, mask=valid, other=0).to(tl.int64) * row_count + row
    q_log = log_at(rows_ptr, normaliser_ptr, cut_ptr, own_ptr, q_place, proposed, padded, temperature, valid)
    words = chosen_words(seed_ptr, steps * 0, proposal + steps, 1 | (LEVEL - 1) << 8)
    stands = uniform(words) * tl.exp(q_log) < tl.exp(p_log)
    accepted = prefix_length(stands, steps, count)
    if accepted < count:
        scan_share(
            seed_ptr, rows_ptr, own_ptr, normaliser_ptr, cut_ptr, winners_ptr, winning_ptr, share,
            tl.sum(tl.where(steps == accepted, p_place, 0), 0), tl.sum(tl.where(steps == accepted, q_place, 0), 0),
            proposal + accepted, padded, vocab, temperature, LEVEL, SHARES, SCAN,
        )  # fmt: skip
    all_done = arrive(arrivals_ptr, SHARES)
    if all_done == 0:
        return
    flaws = tl.load(non_finite_ptr + p_place, mask=steps <= count, other=0)
    residual = proposal * 0
    if accepted < count:
        residual = best_of_shares(winners_ptr, winning_ptr, vocab, SHARES, SLOTS)
    commit(
        control_ptr, ended_ptr, tokens_ptr, origin_ptr, counters_ptr, stop_ptr, source_ptr, proposed, own, stands,
        steps < 0, flaws, residual, until, N, LEVEL, True, True, UNTIL, ROWS,
    )  # fmt: skip


@triton.jit
def log_at(
    rows_ptr: tl.tensor, normaliser_ptr: tl.tensor, cut_ptr: tl.tensor, own_ptr: tl.tensor, place: tl.tensor,
    token: tl.tensor, padded: tl.tensor, temperature: tl.tensor, valid: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Processed log-probability of one token of each row."""
    x = tl.load(rows_ptr + place * padded + token, mask=valid, other=0.0)
    normaliser = tl.load(normaliser_ptr + place, mask=valid, other=0.0)
    cut = tl.load(cut_ptr + place, mask=valid, other=0.0)
    own = tl.load(own_ptr + place, mask=valid, other=0)
    return processed_log(x, token, temperature, normaliser, cut, own)


@triton.jit
def scan_share(
    seed_ptr: tl.tensor, rows_ptr: tl.tensor, own_ptr: tl.tensor, normaliser_ptr: tl.tensor, cut_ptr: tl.tensor,
    winners_ptr: tl.tensor, winning_ptr: tl.tensor, share: tl.tensor, p_place: tl.tensor, q_place: tl.tensor,
    position: tl.tensor, padded: tl.tensor, vocab: tl.tensor, temperature: tl.tensor, LEVEL: tl.constexpr,
    SHARES: tl.constexpr, SCAN: tl.constexpr,
) -> None:  # fmt: skip
    """The share's noisy winners of the residual, and of p for the case that the residual is zero throughout."""
    index = share * SCAN + tl.arange(0, SCAN)
    inside = index < vocab
    p_x = tl.load(rows_ptr + p_place * padded + index, mask=inside, other=float("-inf"))
    q_x = tl.load(rows_ptr + q_place * padded + index, mask=inside, other=float("-inf"))
    p_norm, p_cut, p_own = (
        tl.load(normaliser_ptr + p_place),
        tl.load(cut_ptr + p_place),
        tl.load(own_ptr + p_place),
    )
    q_norm, q_cut, q_own = (
        tl.load(normaliser_ptr + q_place),
        tl.load(cut_ptr + q_place),
        tl.load(own_ptr + q_place),
    )
    p = tl.exp(processed_log(p_x, index, temperature, p_norm, p_cut, p_own))
    q = tl.exp(processed_log(q_x, index, temperature, q_norm, q_cut, q_own))
    noise = gumbel(consecutive_words(seed_ptr, share * SCAN, position, 2 | (LEVEL - 1) << 8, SCAN))
    for which in tl.static_range(2):
        weight = p - q if which == 0 else p
        positive = inside & (weight > 0.0)
        score = tl.where(positive, tl.log(tl.where(positive, weight, 1.0)) + noise, float("-inf"))
        best = tl.max(score, 0)
        tl.store(winners_ptr + which * SHARES + share, best)
        tl.store(winning_ptr + which * SHARES + share, tl.min(tl.where(score == best, index, 0x7FFFFFFF), 0))


@triton.jit
def best_of_shares(
    winners_ptr: tl.tensor,
    winning_ptr: tl.tensor,
    vocab: tl.tensor,
    SHARES: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """Token (int64) of the best residual score, or of p's where no share has one; some token where neither."""
    slot = tl.arange(0, SLOTS)
    inside = slot < SHARES
    score = tl.load(winners_ptr + slot, mask=inside, other=float("-inf"), cache_modifier=".cg")
    token = tl.load(winning_ptr + slot, mask=inside, other=0, cache_modifier=".cg")
    plain = tl.load(winners_ptr + SHARES + slot, mask=inside, other=float("-inf"), cache_modifier=".cg")
    instead = tl.load(winning_ptr + SHARES + slot, mask=inside, other=0, cache_modifier=".cg")
    empty = tl.max(score, 0) == float("-inf")
    score = tl.where(empty, plain, score)
    token = tl.where(empty, instead, token)
    chosen = tl.min(tl.where(inside & (score == tl.max(score, 0)), token, 0x7FFFFFFF), 0).to(tl.int64)
    return tl.minimum(tl.maximum(chosen, 0), vocab - 1)


def plan(state: DecodeState, level: int, count: int, until: int | None) -> Launch:
    """The launch of a checked verify; arguments as `decision.plan`, which is what to call."""
    b, shares = state, tiles(state.vocab_size, SCAN)
    return Launch(
        reject_kernel,
        (shares, 1, 1),
        (
            *b.sequence(), b.seed, b.temperature, b.rows, b.own, b.normaliser, b.cut, b.non_finite, b.winners,
            b.winning, b.arrivals, b.rows.shape[1], b.rows.shape[2], b.vocab_size, until or 0,
        ),
        {
            "N": b.tiers_count, "LEVEL": level, "UNTIL": until is not None, "SHARES": shares, "SCAN": SCAN,
            "SLOTS": power_of_two(shares), "ROWS": power_of_two(count), **OPTIONS,
        },
    )  # fmt: skip
