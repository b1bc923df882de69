"""One launch decides a verify: match, rejection and fuzzy acceptance, with everything that follows from them.

Rules, p verifying, x the proposed token (`pyramid_rt.decoding.rules` has the sources):

- match: x stands iff it is the verifying tier's own token
- rejection: x stands iff u q(x) < p(x), q the distribution that x was drawn from
- fuzzy: x stands iff Div(p, q') <= threshold, q' the proposing tier's own; with or_match also where match lets it

Rejection has its own file, `rejection`. Of the others the programs are rows x shares of the vocabulary; the last
share of a row adds its parts in order, the last row decides. No float is added by an atomic.
"""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl

from pyramid_rt.kernels.configs import architecture
from pyramid_rt.kernels.decide import divergence, rejection
from pyramid_rt.kernels.decide.commit import commit
from pyramid_rt.kernels.decide.decode_state import BLOCK, CHUNK, TILE, DecodeState, active_word, base_word
from pyramid_rt.kernels.decide.divergence import (
    bucketed_divergence,
    finished,
    listed_logs,
    share_of_divergence,
)
from pyramid_rt.kernels.decide.rows import (
    divisor,
    join_lists,
    near_bound,
    power_of_two,
    row_normaliser,
    row_winner,
    slack,
    sum_of_shares,
    tile_gaps,
)
from pyramid_rt.kernels.launch import Launch, arrive, tiles
from pyramid_rt.kernels.reference.sampling import DIVERGENCE_TOP_K, DIVERGENCES

RuleName = Literal["match", "rejection", "fuzzy", "fuzzy_or_match"]
RULES: tuple[RuleName, ...] = ("match", "rejection", "fuzzy", "fuzzy_or_match")
# Listed values that are held against sixteen keys at a time; more would not fit the registers.
# On sm_90 the narrower block spills with Triton 3.6, on sm_80 the wider one with 3.9.
SEARCH, SEARCH_OF = 128, {90: 256}
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}


# Lengths are part of a graph; thresholds, temperature and filter values stay device scalars.
@triton.jit
def decide_kernel(
    control_ptr: tl.tensor, ended_ptr: tl.tensor, tokens_ptr: tl.tensor, origin_ptr: tl.tensor,
    counters_ptr: tl.tensor, stop_ptr: tl.tensor, source_ptr: tl.tensor, thresholds_ptr: tl.tensor,
    temperature_ptr: tl.tensor, rows_ptr: tl.tensor, peak_ptr: tl.tensor, total_ptr: tl.tensor, best_ptr: tl.tensor,
    token_ptr: tl.tensor, own_ptr: tl.tensor, normaliser_ptr: tl.tensor, cut_ptr: tl.tensor,
    non_finite_ptr: tl.tensor, distance_ptr: tl.tensor, partials_ptr: tl.tensor, amounts_ptr: tl.tensor,
    arrivals_ptr: tl.tensor, picked_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor,
    row_count: tl.tensor, padded: tl.tensor, tile_count: tl.tensor, vocab: tl.tensor, until: tl.tensor,
    N: tl.constexpr, LEVEL: tl.constexpr, COUNT: tl.constexpr, FUZZY: tl.constexpr, OR_MATCH: tl.constexpr,
    KIND: tl.constexpr, TOP: tl.constexpr, PROCESSED: tl.constexpr, STORED: tl.constexpr, UNTIL: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Match and fuzzy: one share of one row, the row's end, and the verify's."""
    chunk = tl.program_id(0)
    step = tl.program_id(1)
    proposal = tl.load(base_word(control_ptr, N, LEVEL - 1))
    outer = tl.load(base_word(control_ptr, N, N - 1))
    # An inactive verify has no rows, not even the one after its proposal.
    active = tl.load(active_word(control_ptr, N, LEVEL)) != 0
    count = tl.where(active, tl.load(control_ptr) - proposal, -1)
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
    row_done = arrive(arrivals_ptr + step, CHUNKS)
    # Returns, not branches: what is nested deeper than the hardware keeps track of goes to memory.
    if row_done == 0:
        return
    if not STORED:
        store_own(best_ptr, token_ptr, peak_ptr, total_ptr, own_ptr, non_finite_ptr, step <= count, place, tile_count,
                  vocab, TILES)  # fmt: skip
    if FUZZY:
        store_distance(
            temperature_ptr, rows_ptr, peak_ptr, total_ptr, own_ptr, normaliser_ptr, cut_ptr, partials_ptr,
            amounts_ptr, picked_ptr, found_ptr, values_ptr, distance_ptr, compared, step, place, bound, row_count,
            padded, tile_count, KIND, TOP, PROCESSED, COUNT, CHUNKS, CHUNK, SLOTS, SEARCH, TILES,
        )  # fmt: skip
    all_done = arrive(arrivals_ptr + COUNT, COUNT)
    if all_done == 0:
        return
    proposed, own, flaws, stands, inherited = verdict(
        tokens_ptr, own_ptr, non_finite_ptr, distance_ptr, thresholds_ptr, proposal,
        LEVEL * row_count + proposal - outer, count, LEVEL, COUNT, FUZZY, OR_MATCH, ROWS,
    )  # fmt: skip
    commit(
        control_ptr, ended_ptr, tokens_ptr, origin_ptr, counters_ptr, stop_ptr, source_ptr, proposed, own,
        stands, inherited, flaws, 0, until, N, LEVEL, not FUZZY, False, UNTIL, ROWS,
    )  # fmt: skip


@triton.jit
def verdict(
    tokens_ptr: tl.tensor, own_ptr: tl.tensor, non_finite_ptr: tl.tensor, distance_ptr: tl.tensor,
    thresholds_ptr: tl.tensor, proposal: tl.tensor, first: tl.tensor, count: tl.tensor, LEVEL: tl.constexpr,
    COUNT: tl.constexpr, FUZZY: tl.constexpr, OR_MATCH: tl.constexpr, ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of all rows of a verify: the proposed and the own token, the flaws, what stands, and what stands by divergence.

    The proposal begins at position `proposal`, the verifying tier's rows at row `first` of all tiers'. The rows'
    numbers were stored by other programs, hence past the first cache.
    """
    steps = tl.arange(0, ROWS)
    here = first + steps
    proposed = tl.load(tokens_ptr + proposal + steps, mask=steps < count, other=0)
    own = tl.load(own_ptr + here, mask=steps <= count, other=0, cache_modifier=".cg")
    flaws = tl.load(non_finite_ptr + here, mask=steps <= count, other=0, cache_modifier=".cg")
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
    return proposed, own, flaws, stands, inherited


@triton.jit
def row_scalars(
    peak_ptr: tl.tensor, total_ptr: tl.tensor, own_ptr: tl.tensor,
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
        peak_ptr, total_ptr, own_ptr, normaliser_ptr, cut_ptr, place, tile_count, PROCESSED, TILES
    )
    q_norm, q_cut, q_own = row_scalars(
        peak_ptr, total_ptr, own_ptr, normaliser_ptr, cut_ptr, below, tile_count, PROCESSED, TILES
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
def store_own(
    best_ptr: tl.tensor, token_ptr: tl.tensor, peak_ptr: tl.tensor, total_ptr: tl.tensor, own_ptr: tl.tensor,
    non_finite_ptr: tl.tensor, wanted: tl.tensor, place: tl.tensor, tile_count: tl.tensor, vocab: tl.tensor,
    TILES: tl.constexpr,
) -> None:  # fmt: skip
    """A row's own token, and whether the row can be decided, from the head's tiles."""
    if wanted:
        offset = place * tile_count
        tl.store(own_ptr + place, row_winner(best_ptr, token_ptr, offset, tile_count, vocab, TILES))
        _, non_finite = row_normaliser(peak_ptr, total_ptr, offset, tile_count, TILES)
        tl.store(non_finite_ptr + place, non_finite)


@triton.jit
def store_distance(
    temperature_ptr: tl.tensor, rows_ptr: tl.tensor, peak_ptr: tl.tensor, total_ptr: tl.tensor, own_ptr: tl.tensor,
    normaliser_ptr: tl.tensor, cut_ptr: tl.tensor, partials_ptr: tl.tensor, amounts_ptr: tl.tensor,
    picked_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor, distance_ptr: tl.tensor, wanted: tl.tensor,
    step: tl.tensor, place: tl.tensor, bound: tl.tensor, row_count: tl.tensor, padded: tl.tensor,
    tile_count: tl.tensor, KIND: tl.constexpr, TOP: tl.constexpr, PROCESSED: tl.constexpr, COUNT: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, SEARCH: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """A row's divergence, from the parts of all its shares in their order."""
    if wanted:
        total = sum_of_shares(partials_ptr + step * CHUNKS, CHUNKS, SLOTS)
        if TOP > 0:
            rest = sum_of_shares(partials_ptr + (COUNT + step) * CHUNKS, CHUNKS, SLOTS)
            below = place - row_count
            temperature = tl.load(temperature_ptr)
            p_norm, p_cut, p_own = row_scalars(
                peak_ptr, total_ptr, own_ptr, normaliser_ptr, cut_ptr, place, tile_count, PROCESSED, TILES
            )
            q_norm, q_cut, q_own = row_scalars(
                peak_ptr, total_ptr, own_ptr, normaliser_ptr, cut_ptr, below, tile_count, PROCESSED, TILES
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
                rows_ptr + place * padded, found_ptr + list_at, values_ptr + list_at, length, temperature, p_norm,
                p_cut, p_own, PROCESSED, SEARCH,
            )  # fmt: skip
            total = bucketed_divergence(
                rows_ptr + below * padded, found_ptr + list_at, values_ptr + list_at, length, total, rest, bound,
                temperature, q_norm, q_cut, q_own, KIND, TOP, PROCESSED, SEARCH,
            )  # fmt: skip
        tl.store(distance_ptr + step, finished(total, KIND))


def plan(
    state: DecodeState,
    level: int,
    count: int,
    rule: RuleName,
    *,
    kind: str = "js",
    processed: bool = False,
    stored: bool = False,
    until: int | None = None,
    arch: int | None = None,
) -> Launch:
    """The launch that decides a verify by tier `level`.

    Args:
        state: see `DecodeState`.
        level: the verifying tier, at least 1.
        count: the longest proposal of the tier below, plus 1.
        rule: one of `RULES`.
        kind: of the divergence, one of `reference.sampling.DIVERGENCES`; fuzzy rules only.
        processed: the divergence is taken after temperature and filters; then `filters` has run on the rows of
            both tiers.
        stored: `filters` has run on this tier's rows. Rejection needs it, on the rows of all lower tiers too.
        until: the tier's proposals end when this many tokens stand; None where a fixed number of rounds ends them.
        arch: one of `configs.ARCHITECTURES`; None for that of the decode state's device.

    Raises:
        ValueError: names the argument that does not fit.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(RULES)}")
    if kind not in DIVERGENCES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(DIVERGENCES)}")
    top = rule.startswith("fuzzy") and kind.startswith("topk_")
    state.check(level, count, lists=top)
    if level < 1:
        raise ValueError(f"level is {level}, expected at least 1: the lowest tier verifies nothing")
    if count < 2:
        raise ValueError(f"count is {count}, expected at least 2: a proposed token and the one after it")
    if (rule == "rejection" or processed) and not stored:
        raise ValueError(f"stored is False, expected True with rule={rule!r}, processed={processed}")
    if until is not None and until < 1:
        raise ValueError(f"until is {until}, expected None or at least 1")
    if rule == "rejection":
        return rejection.plan(state, level, count, until)
    s, b, tile_count = state.statistics, state, state.statistics.peak.shape[2]
    chunks = tiles(b.vocab_size, CHUNK) if rule != "match" else 1
    return Launch(
        decide_kernel,
        (chunks, count, 1),
        (
            *b.sequence(), b.thresholds, b.temperature, b.rows, s.peak, s.total, s.best, s.token, b.own, b.normaliser,
            b.cut, b.non_finite, b.distance, b.partials, b.amounts, b.arrivals, b.picked, b.found, b.values,
            b.rows.shape[1], b.rows.shape[2], tile_count, b.vocab_size, until or 0,
        ),
        {
            "N": b.tiers_count, "LEVEL": level, "COUNT": count, "FUZZY": rule != "match",
            "OR_MATCH": rule == "fuzzy_or_match", "KIND": divergence.KINDS.index(kind.removeprefix("topk_")),
            "TOP": DIVERGENCE_TOP_K if top else 0, "PROCESSED": processed, "STORED": stored,
            "UNTIL": until is not None, "CHUNKS": chunks, "CHUNK": CHUNK, "SLOTS": power_of_two(chunks),
            "BLOCK": min(BLOCK, power_of_two(max(b.vocab_size, TILE))),
            "SEARCH": SEARCH_OF.get(architecture(b.rows.device) if arch is None else arch, SEARCH),
            "TILES": power_of_two(tile_count), "ROWS": power_of_two(count), **OPTIONS,
        },
    )  # fmt: skip
