"""The right outcome of the decision kernels, in float64 and on the host, from the rows that they read.

A kernel's own earlier result is the input of what follows from it: a distance is held against float64, and then
compared with the threshold as the kernel compares it. So no verdict hangs on a rounding, and none is excused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_rt.kernels.decide.decode_state import (
    END,
    LIMIT,
    DecodeState,
    active_at,
    bad_at,
    base_at,
    cached_at,
)
from pyramid_rt.kernels.reference import sampling as ops

# Sums of up to 128,256 weights, added as trees, whose exponents were rounded at a size of 30.
WEIGHT = 4e-6
# Two normalisers near 16, each within two roundings there: 2 x 2 x 2^-20.
DISTANCE = 4e-6


def scaled_rows(state: DecodeState, logits: Tensor) -> Tensor:
    """Logits over the temperature as float32 rounds them, [R, V]; at 0 the logits."""
    return logits / torch.where(state.temperature > 0, state.temperature, 1.0)


def exact_noise(seed: Tensor, positions: Tensor, purpose: int, stage: int, vocab: int) -> Tensor:
    """Gumbel noise [R, V] in float64 of the same uniforms."""
    u = ops.uniform(ops.random_words(seed, positions, purpose, stage, vocab)).double()
    return -torch.log(-torch.log1p(-u))


def cut_range(state: DecodeState, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Between which values [R] (float64, both allowed) a row's cut may lie: top-p and min-p within `WEIGHT`."""
    top_k, top_p, min_p = int(state.top_k), float(state.top_p), float(state.min_p)
    ordered = scaled.sort(-1, descending=True).values
    top = ordered[:, :1].double()
    inside = torch.ones_like(ordered, dtype=torch.bool)
    low = torch.full_like(top, -math.inf)
    if 0 < top_k < scaled.shape[1]:
        low = ordered[:, top_k - 1 : top_k].double()
        inside = ordered >= ordered[:, top_k - 1 : top_k]
    high = low
    if top_p < 1.0:
        weight = torch.where(inside, (ordered.double() - top).exp(), 0.0)
        before, total = weight.cumsum(-1) - weight, weight.sum(-1, keepdim=True)
        ends = []
        for factor in (1 + WEIGHT, 1 - WEIGHT):
            kept = (inside & (before < top_p * factor * total)).sum(-1, keepdim=True).clamp(min=1)
            ends.append(ordered.gather(-1, kept - 1).double())
        low, high = torch.maximum(low, ends[0]), torch.maximum(high, ends[1])
    if min_p > 0.0:
        least = top + math.log(min_p)
        low, high = torch.maximum(low, least - WEIGHT), torch.maximum(high, (least + WEIGHT).minimum(top))
    return low.squeeze(-1), high.squeeze(-1)


def processed(state: DecodeState, level: int, logits: Tensor) -> Tensor:
    """Log-probabilities [R, V] in float64 of a tier's first rows, cut where the kernel cut them."""
    if float(state.temperature) == 0.0:
        return ops.one_hot_logprobs(logits).double()
    scaled, cut = scaled_rows(state, logits), state.cut[level, : logits.shape[0], None]
    return scaled.double().masked_fill(scaled < cut, -math.inf).log_softmax(-1)


def row_ratios(
    state: DecodeState, level: int, logits: Tensor, positions: Tensor, winner: Tensor
) -> dict[str, float]:
    """Error over tolerance of cut, normaliser and own token of a tier's first rows.

    Args:
        logits: [R, V] float32. positions: int64 [R]. winner: int64 [R], of the unfiltered noisy scores.
    """
    count = logits.shape[0]
    own = state.own[level, :count]
    if float(state.temperature) == 0.0:
        return {"own": 0.0 if torch.equal(own, logits.argmax(-1)) else math.inf}
    scaled, cut = scaled_rows(state, logits), state.cut[level, :count]
    low, high = cut_range(state, scaled)
    kept = (scaled >= cut.unsqueeze(-1)) & (scaled > -math.inf)
    alive, double = scaled > -math.inf, scaled.double()
    most = ((double >= low.unsqueeze(-1)) & alive).sum(-1)
    least = ((double >= high.unsqueeze(-1)) & alive).sum(-1)
    many = kept.sum(-1)
    fits = bool(((least <= many) & (many <= most)).all())
    wanted = double.masked_fill(~kept, -math.inf).logsumexp(-1)
    error = (state.normaliser[level, :count].double() - wanted).abs() / (2e-6 + 1e-6 * wanted.abs())
    # What torch rounds as the head does wins exactly where it stands; elsewhere two scores within a rounding
    # of noise, quotient and sum may change places.
    stands = kept.gather(-1, winner.unsqueeze(-1)).squeeze(-1)
    noise = exact_noise(state.seed, positions, ops.PURPOSE_OWN, 0, logits.shape[1])
    score = (double + noise).masked_fill(~kept, -math.inf)
    best = score.amax(-1)
    given = score.gather(-1, own.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    loss = (best - given) / (6e-7 * best.abs().clamp(min=8.0))
    loss = torch.where(stands, torch.where(own == winner, 0.0, math.inf), loss)
    return {
        "cut": 0.0 if fits else math.inf,
        "normaliser": worst(error),
        "own": worst(loss),
    }


def worst(ratio: Tensor) -> float:
    """The largest, inf where one is NaN."""
    return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max()) if ratio.numel() else 0.0


def distance_ratio(kind: str, found: Tensor, p: Tensor, q: Tensor) -> float:
    """Error over tolerance of divergences [m] between float64 rows of logits or log-probabilities."""
    exact = ops.divergence(kind, p.double(), q.double())
    same = exact.isinf() & (exact == found.double())
    error = (found.double() - exact).abs() / (DISTANCE + DISTANCE * exact.abs())
    return worst(torch.where(same, 0.0, error))


def near_verdicts(uniform: Tensor, p: Tensor, q: Tensor) -> tuple[list[bool], list[bool]]:
    """Of tokens judged by u q < p in float64 [m]: which may stand, and which must."""
    edge = 1e-5
    left = uniform.double() * q
    return ((left * (1 - edge) < p).tolist(), (left * (1 + edge) < p).tolist())


def residual_loss(p_log: Tensor, q_log: Tensor, noise: Tensor, token: int) -> float:
    """The shortfall of a token's score [V] from the best residual's, over what rounding may cost.

    p and q are known to 5e-6 of themselves, which counts where they nearly cancel.
    """
    p, q = p_log.exp(), q_log.exp()
    weight = (p - q).clamp(min=0.0)
    if not bool(weight.any()):
        weight, q = p, torch.zeros_like(q)
    score = weight.log() + noise
    best = int(score.argmax())

    def rounding(index: int) -> float:
        return 5e-6 * float((p[index] + q[index]) / weight[index]) + 6e-7 * max(8.0, abs(float(score[index])))

    if float(weight[token]) == 0.0:
        return math.inf
    return float(score[best] - score[token]) / (rounding(best) + rounding(token))


@dataclass(frozen=True)
class Sequel:
    """The state of a decode state on the host, lists of numbers."""

    control: list[int]
    ended: bool
    tokens: list[int]
    origin: list[int]
    counters: list[list[int]]
    source: list[int]

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Sequel:
        """From tensors by name, see `gpu_board.STATE`."""
        return cls(
            state["control"].tolist(),
            bool(state["ended"]),
            state["tokens"].tolist(),
            state["origin"].tolist(),
            state["counters"].tolist(),
            state["source"].tolist(),
        )

    def differences(self, other: Sequel) -> list[str]:
        """Names of what differs."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(other, name)]


def mark(control: list[int], tiers: int, top: int, end: int, ended: bool) -> None:
    """Open the next round at tier `top`, in place; no bound on a proposal's tokens."""
    active = end < control[LIMIT] and not ended
    if top < tiers - 1:
        active = active and control[active_at(tiers, top + 1)] != 0
    for level in range(top + 1):
        control[active_at(tiers, level)] = int(active)
        if level < top or top == tiers - 1:
            control[base_at(tiers, level)] = end


def after_verify(
    before: Sequel,
    tiers: int,
    level: int,
    own: Sequence[int],
    stands: Sequence[bool],
    inherited: Sequence[bool],
    *,
    stops: Sequence[bool],
    lossless: bool,
    residual: int | None,
) -> Sequel:
    """The state after tier `level` judged the proposal below it (`decoding.rounds.torch_steps`, on numbers).

    Args:
        own: the tier's own tokens, one more than proposed. stands, inherited: of the proposed ones.
        stops: by token. residual: the correction of a rejection, None elsewhere.
    """
    control, tokens, origin = list(before.control), list(before.tokens), list(before.origin)
    counters, source = [list(row) for row in before.counters], list(before.source)
    base, outer = control[base_at(tiers, level - 1)], control[base_at(tiers, tiers - 1)]
    m = control[END] - base
    accepted = [*stands[:m], False].index(False)
    whole, position = accepted == m, base + accepted
    put = not (whole and (before.ended or position >= control[LIMIT]))
    token = own[accepted] if whole or residual is None else residual
    differing = 0 if lossless else sum(tokens[base + i] != own[i] for i in range(accepted))
    for column, value in enumerate((m, accepted, differing, int(whole), int(put), 1)):
        counters[level - 1][column] += value
    counters[level][6] += 1
    for tier in range(level):
        control[cached_at(tier)] = min(control[cached_at(tier)], position)
    control[cached_at(level)] = position
    for i in range(accepted):
        if not inherited[i]:
            source[base - outer + i] = level
    ended, end = before.ended and whole, position
    if put:
        tokens[position] = token
        origin[position] = source[position - outer] = level
        ended, end = ended or stops[token], position + 1
    control[END] = end
    mark(control, tiers, level, end, ended)
    return Sequel(control, ended, tokens, origin, counters, source)


def after_draw(
    before: Sequel, tiers: int, level: int, token: int, *, stops: Sequence[bool], first: bool
) -> Sequel:
    """The state after one token was put without a verify, where there was anything to put."""
    control, tokens, origin = list(before.control), list(before.tokens), list(before.origin)
    counters, source = [list(row) for row in before.counters], list(before.source)
    end, ended = control[END], before.ended
    outer = control[base_at(tiers, tiers - 1)]
    active = first or control[active_at(tiers, 0)] != 0
    if active and end < control[LIMIT] and not ended:
        tokens[end], source[end - outer], control[cached_at(level)] = token, level, end
        if not first:
            origin[end] = level
            counters[level][6] += 1
        ended, end = stops[token], end + 1
        control[END] = end
        if not first and tiers > 1:
            control[active_at(tiers, 0)] = int(end < control[LIMIT] and not ended)
    if first or tiers == 1:
        mark(control, tiers, tiers - 1, end, ended)
    return Sequel(control, ended, tokens, origin, counters, source)


def report_numbers(state: DecodeState, begin: int, most: int) -> list[int]:
    """The contents that a report made now should have."""
    tiers, end = state.tiers_count, int(state.control[END])
    words, tokens = state.control.tolist(), state.tokens.tolist()
    wanted = [tokens[i] if i < len(tokens) else 0 for i in range(begin, begin + most)]
    counted = [value for row in state.counters.tolist() for value in row]
    cached, bad = words[cached_at(0) : cached_at(tiers)], words[bad_at(tiers) :]
    return [begin, end, int(state.ended), *cached, *bad, *counted, *wanted]
