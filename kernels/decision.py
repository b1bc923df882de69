"""One launch decides a verify: match, rejection and fuzzy acceptance, with everything that follows from them.

Rules, p verifying, x the proposed token (`pyramid_rt.rules` has the sources):

- match: x stands iff it is the verifying tier's own token
- rejection: x stands iff u q(x) < p(x), q the distribution that x was drawn from; the correction is
  argmax of log max(p - q, 0) + g, or of log p + g where p = q throughout, with the residual noise g of the stage
- fuzzy: x stands iff Div(p, q') <= threshold, q' the proposing tier's own; with or_match also where match lets it

Fuzzy and match: programs are rows x shares of the vocabulary; the last share of a row adds its parts in order,
the last row decides. Rejection: every program judges the rows from the scalars that `thresholds` left and scans
its share of the one row that falls; the last one decides. No float is added by an atomic.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from pyramid_rt.kernels import divergence
from pyramid_rt.kernels.board import BLOCK, CHUNK, SCAN, TILE, Board
from pyramid_rt.kernels.commit import commit, prefix_length
from pyramid_rt.kernels.common import Launch, arrive, tiles
from pyramid_rt.kernels.divergence import bucketed_divergence, finished, listed_logs, share_of_divergence
from pyramid_rt.kernels.head import gumbel
from pyramid_rt.kernels.noise import chosen_words, consecutive_words, uniform
from pyramid_rt.kernels.rows import (
    divisor,
    join_lists,
    near_bound,
    processed_log,
    row_normaliser,
    row_winner,
    slack,
    tile_gaps,
)
from pyramid_rt.kernels.sampling_reference import DIVERGENCE_TOP_K, DIVERGENCES
from pyramid_rt.kernels.thresholds import SEARCH, power_of_two

RuleName = Literal["match", "rejection", "fuzzy", "fuzzy_or_match"]
RULES: tuple[RuleName, ...] = ("match", "rejection", "fuzzy", "fuzzy_or_match")
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}


# Lengths are part of a graph; thresholds, temperature and filter values stay device scalars.
@triton.jit
def decide_kernel(
    control_ptr: tl.tensor,
    ended_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    origin_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    stop_ptr: tl.tensor,
    source_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    total_ptr: tl.tensor,
    best_ptr: tl.tensor,
    token_ptr: tl.tensor,
    own_ptr: tl.tensor,
    normaliser_ptr: tl.tensor,
    cut_ptr: tl.tensor,
    flawed_ptr: tl.tensor,
    distance_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    amounts_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    picked_ptr: tl.tensor,
    found_ptr: tl.tensor,
    values_ptr: tl.tensor,
    row_count: tl.tensor,
    padded: tl.tensor,
    tile_count: tl.tensor,
    vocab: tl.tensor,
    until: tl.tensor,
    N: tl.constexpr,
    LEVEL: tl.constexpr,
    COUNT: tl.constexpr,
    FUZZY: tl.constexpr,
    OR_MATCH: tl.constexpr,
    KIND: tl.constexpr,
    TOP: tl.constexpr,
    PROCESSED: tl.constexpr,
    STORED: tl.constexpr,
    UNTIL: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Match and fuzzy: one share of one row, the row's end, and the verify's."""
    chunk = tl.program_id(0)
    step = tl.program_id(1)
    proposal = tl.load(control_ptr + 2 + N + LEVEL - 1)
    outer = tl.load(control_ptr + 2 + 2 * N - 1)
    # An inactive verify has no rows, not even the one after its proposal.
    live = tl.load(control_ptr + 2 + 2 * N + LEVEL) != 0
    count = tl.where(live, tl.load(control_ptr) - proposal, -1)
    row = proposal - outer + step
    place = LEVEL * row_count + row
    compared = step < count
    if FUZZY:
        bound = 0.0
        if compared:
            bound = compare_share(
                temperature_ptr, rows_ptr, peak_ptr, total_ptr, own_ptr, normaliser_ptr, cut_ptr, partials_ptr,
                amounts_ptr, picked_ptr, chunk, step, place, row_count, padded, tile_count, vocab,
                KIND, TOP, PROCESSED, COUNT, CHUNKS, CHUNK, BLOCK, TILES,
            )  # fmt: skip
    row_done = arrive(arrivals_ptr, step, CHUNKS)
    if row_done:
        if step <= count:
            if not STORED:
                offset = place * tile_count
                tl.store(own_ptr + place, row_winner(best_ptr, token_ptr, offset, tile_count, vocab, TILES))
                _, flawed = row_normaliser(peak_ptr, total_ptr, offset, tile_count, TILES)
                tl.store(flawed_ptr + place, flawed)
        if FUZZY:
            if compared:
                total = row_divergence(
                    temperature_ptr, rows_ptr, peak_ptr, total_ptr, own_ptr, normaliser_ptr, cut_ptr, partials_ptr,
                    amounts_ptr, picked_ptr, found_ptr, values_ptr, step, place, bound, row_count, padded,
                    tile_count, KIND, TOP, PROCESSED, COUNT, CHUNKS, CHUNK, SLOTS, SEARCH, BLOCK, TILES,
                )  # fmt: skip
                tl.store(distance_ptr + step, finished(total, KIND))
        all_done = arrive(arrivals_ptr, COUNT, COUNT)
        if all_done:
            steps = tl.arange(0, ROWS)
            here = LEVEL * row_count + proposal - outer + steps
            proposed = tl.load(tokens_ptr + proposal + steps, mask=steps < count, other=0)
            own = tl.load(own_ptr + here, mask=steps <= count, other=0, cache_modifier=".cg")
            flaws = tl.load(flawed_ptr + here, mask=steps <= count, other=0, cache_modifier=".cg")
            stands = proposed == own
            inherited = steps < 0
            if FUZZY:
                found = tl.load(distance_ptr + steps, mask=steps < COUNT, other=0.0, cache_modifier=".cg")
                threshold = tl.load(thresholds_ptr + LEVEL - 1)
                inherited = (found <= threshold) & (found < float("inf"))
                if OR_MATCH:
                    stands = stands | inherited
                else:
                    stands = inherited
            commit(
                control_ptr, ended_ptr, tokens_ptr, origin_ptr, counters_ptr, stop_ptr, source_ptr, proposed, own,
                stands, inherited, flaws, 0, until, N, LEVEL, not FUZZY, False, UNTIL, ROWS,
            )  # fmt: skip


@triton.jit
def row_scalars(
    temperature_ptr: tl.tensor, peak_ptr: tl.tensor, total_ptr: tl.tensor, own_ptr: tl.tensor,
    normaliser_ptr: tl.tensor, cut_ptr: tl.tensor, place: tl.tensor, tile_count: tl.tensor,
    PROCESSED: tl.constexpr, TILES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Normaliser, cut and own token of a row for `log_probabilities`."""
    if PROCESSED:
        normaliser = tl.load(normaliser_ptr + place)
        cut = tl.load(cut_ptr + place)
        own = tl.load(own_ptr + place)
    else:
        # Both rows by this one piece of code: equal rows must have equal bits.
        normaliser, _ = row_normaliser(peak_ptr, total_ptr, place * tile_count, tile_count, TILES)
        cut = normaliser
        own = place * 0
    return normaliser, cut, own


@triton.jit
def compare_share(
    temperature_ptr: tl.tensor, rows_ptr: tl.tensor, peak_ptr: tl.tensor, total_ptr: tl.tensor, own_ptr: tl.tensor,
    normaliser_ptr: tl.tensor, cut_ptr: tl.tensor, partials_ptr: tl.tensor, amounts_ptr: tl.tensor,
    picked_ptr: tl.tensor, chunk: tl.tensor, step: tl.tensor, place: tl.tensor, row_count: tl.tensor,
    padded: tl.tensor, tile_count: tl.tensor, vocab: tl.tensor, KIND: tl.constexpr, TOP: tl.constexpr,
    PROCESSED: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Store this share's part of a row's divergence. With TOP, returns the bound its list starts from."""
    below = place - row_count
    temperature = tl.load(temperature_ptr)
    p_norm, p_cut, p_own = row_scalars(
        temperature_ptr,
        peak_ptr,
        total_ptr,
        own_ptr,
        normaliser_ptr,
        cut_ptr,
        place,
        tile_count,
        PROCESSED,
        TILES,
    )
    q_norm, q_cut, q_own = row_scalars(
        temperature_ptr,
        peak_ptr,
        total_ptr,
        own_ptr,
        normaliser_ptr,
        cut_ptr,
        below,
        tile_count,
        PROCESSED,
        TILES,
    )
    bound = p_norm
    if TOP > 0:
        divide = temperature * 0.0 + 1.0
        if PROCESSED:
            divide = divisor(temperature)
        top, gaps = tile_gaps(peak_ptr, place * tile_count, tile_count, divide, TILES)
        bound = top - p_norm - near_bound(gaps, TOP) - 2.0 * slack(top)
        if PROCESSED:
            # One-hot: the own token's log-probability is 0, and nothing else is listed.
            bound = tl.where(temperature > 0.0, bound, -1.0)
    first, second, amount = share_of_divergence(
        rows_ptr + place * padded, rows_ptr + below * padded, picked_ptr + step.to(tl.int64) * (CHUNKS * CHUNK),
        chunk, vocab, bound, temperature, p_norm, p_cut, p_own, q_norm, q_cut, q_own, KIND, TOP > 0, PROCESSED,
        CHUNK, BLOCK,
    )  # fmt: skip
    tl.store(partials_ptr + step * CHUNKS + chunk, first)
    if TOP > 0:
        tl.store(partials_ptr + (COUNT + step) * CHUNKS + chunk, second)
        tl.store(amounts_ptr + step * CHUNKS + chunk, amount)
    return bound


@triton.jit
def row_divergence(
    temperature_ptr: tl.tensor, rows_ptr: tl.tensor, peak_ptr: tl.tensor, total_ptr: tl.tensor, own_ptr: tl.tensor,
    normaliser_ptr: tl.tensor, cut_ptr: tl.tensor, partials_ptr: tl.tensor, amounts_ptr: tl.tensor,
    picked_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor, step: tl.tensor, place: tl.tensor,
    bound: tl.tensor, row_count: tl.tensor, padded: tl.tensor, tile_count: tl.tensor, KIND: tl.constexpr,
    TOP: tl.constexpr, PROCESSED: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    SLOTS: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sum of a row's terms, from the parts of all its shares in their order."""
    share = tl.arange(0, SLOTS)
    parts = tl.load(
        partials_ptr + step * CHUNKS + share, mask=share < CHUNKS, other=0.0, cache_modifier=".cg"
    )
    total = tl.sum(parts, 0)
    if TOP > 0:
        rests = tl.load(
            partials_ptr + (COUNT + step) * CHUNKS + share,
            mask=share < CHUNKS,
            other=0.0,
            cache_modifier=".cg",
        )
        below = place - row_count
        temperature = tl.load(temperature_ptr)
        p_norm, p_cut, p_own = row_scalars(
            temperature_ptr,
            peak_ptr,
            total_ptr,
            own_ptr,
            normaliser_ptr,
            cut_ptr,
            place,
            tile_count,
            PROCESSED,
            TILES,
        )
        q_norm, q_cut, q_own = row_scalars(
            temperature_ptr,
            peak_ptr,
            total_ptr,
            own_ptr,
            normaliser_ptr,
            cut_ptr,
            below,
            tile_count,
            PROCESSED,
            TILES,
        )
        list_at = step.to(tl.int64) * (CHUNKS * CHUNK)
        length = join_lists(
            amounts_ptr + step * CHUNKS,
            picked_ptr + list_at,
            found_ptr + list_at,
            CHUNKS,
            CHUNK,
            SLOTS,
            SEARCH,
        )
        listed_logs(
            rows_ptr + place * padded, found_ptr + list_at, values_ptr + list_at, length, temperature, p_norm, p_cut,
            p_own, PROCESSED, BLOCK,
        )  # fmt: skip
        total = bucketed_divergence(
            rows_ptr + below * padded, found_ptr + list_at, values_ptr + list_at, length, total, tl.sum(rests, 0),
            bound, p_norm * 0.0 + 1.0, temperature, q_norm, q_cut, q_own, KIND, TOP, PROCESSED, SEARCH, SEARCH,
        )  # fmt: skip
    return total


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
    flawed_ptr: tl.tensor,
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
    proposal = tl.load(control_ptr + 2 + N + LEVEL - 1)
    outer = tl.load(control_ptr + 2 + 2 * N - 1)
    # An inactive verify has no rows, not even the one after its proposal.
    live = tl.load(control_ptr + 2 + 2 * N + LEVEL) != 0
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
    all_done = arrive(arrivals_ptr, 0, SHARES)
    if all_done:
        flaws = tl.load(flawed_ptr + p_place, mask=steps <= count, other=0)
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
    p = tl.exp(processed_log(
        p_x, index, temperature, tl.load(normaliser_ptr + p_place), tl.load(cut_ptr + p_place), tl.load(own_ptr + p_place)
    ))  # fmt: skip
    q = tl.exp(processed_log(
        q_x, index, temperature, tl.load(normaliser_ptr + q_place), tl.load(cut_ptr + q_place), tl.load(own_ptr + q_place)
    ))  # fmt: skip
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


def plan(
    board: Board,
    level: int,
    count: int,
    rule: RuleName,
    *,
    kind: str = "js",
    processed: bool = False,
    stored: bool = False,
    until: int | None = None,
) -> Launch:
    """The launch that decides a verify by tier `level`.

    Args:
        board: see `Board`.
        level: the verifying tier, at least 1.
        count: the longest proposal of the tier below, plus 1.
        rule: one of `RULES`.
        kind: of the divergence, one of `sampling_reference.DIVERGENCES`; fuzzy rules only.
        processed: the divergence is taken after temperature and filters; then `thresholds` has run on the rows of
            both tiers.
        stored: `thresholds` has run on this tier's rows. Rejection needs it, on the rows of all lower tiers too.
        until: the tier's proposals end when this many tokens stand; None where a fixed number of rounds ends them.

    Raises:
        ValueError: names the argument that does not fit.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(RULES)}")
    if kind not in DIVERGENCES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(DIVERGENCES)}")
    top = rule.startswith("fuzzy") and kind.startswith("topk_")
    board.check(level, count, lists=top)
    if level < 1:
        raise ValueError(f"level is {level}, expected at least 1: the lowest tier verifies nothing")
    if count < 2:
        raise ValueError(f"count is {count}, expected at least 2: a proposed token and the one after it")
    if (rule == "rejection" or processed) and not stored:
        raise ValueError(f"stored is False, expected True with rule={rule!r}, processed={processed}")
    if until is not None and until < 1:
        raise ValueError(f"until is {until}, expected None or at least 1")
    if rule == "rejection":
        return _reject(board, level, count, until)
    s, b, tile_count = board.statistics, board, board.statistics.peak.shape[2]
    chunks = tiles(b.vocab_size, CHUNK) if rule != "match" else 1
    return Launch(
        decide_kernel,
        (chunks, count, 1),
        (
            *_sequence(b), b.thresholds, b.temperature, b.rows, s.peak, s.total, s.best, s.token, b.own, b.normaliser,
            b.cut, b.flawed, b.distance, b.partials, b.amounts, b.arrivals, b.picked, b.found, b.values,
            b.rows.shape[1], b.rows.shape[2], tile_count, b.vocab_size, until or 0,
        ),
        {
            "N": b.tiers_count, "LEVEL": level, "COUNT": count, "FUZZY": rule != "match",
            "OR_MATCH": rule == "fuzzy_or_match", "KIND": divergence.KINDS.index(kind.removeprefix("topk_")),
            "TOP": DIVERGENCE_TOP_K if top else 0, "PROCESSED": processed, "STORED": stored,
            "UNTIL": until is not None, "CHUNKS": chunks, "CHUNK": CHUNK, "SLOTS": power_of_two(chunks),
            "BLOCK": min(BLOCK, power_of_two(max(b.vocab_size, TILE))), "SEARCH": SEARCH,
            "TILES": power_of_two(tile_count), "ROWS": power_of_two(count), **OPTIONS,
        },
    )  # fmt: skip


def _sequence(board: Board) -> tuple[torch.Tensor, ...]:
    """What `commit` writes, in the order of the kernels' arguments; flags as the bytes they are."""
    return (
        board.control,
        board.ended.view(torch.uint8),
        board.tokens,
        board.origin,
        board.counters,
        board.stop_mask.view(torch.uint8),
        board.source,
    )


def _reject(board: Board, level: int, count: int, until: int | None) -> Launch:
    b, shares = board, tiles(board.vocab_size, SCAN)
    return Launch(
        reject_kernel,
        (shares, 1, 1),
        (
            *_sequence(b), b.seed, b.temperature, b.rows, b.own, b.normaliser, b.cut, b.flawed, b.winners, b.winning,
            b.arrivals, b.rows.shape[1], b.rows.shape[2], b.vocab_size, until or 0,
        ),
        {
            "N": b.tiers_count, "LEVEL": level, "UNTIL": until is not None, "SHARES": shares, "SCAN": SCAN,
            "SLOTS": power_of_two(shares), "ROWS": power_of_two(count), **OPTIONS, "num_warps": 4,
        },
    )  # fmt: skip
