"""Measurements of ``tune`` on a loaded pyramid before it chooses: answers of the tiers, and seconds."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyramid_rt.decoding.engine import PREFILL_CHUNK
from pyramid_rt.decoding.place import Place, inside
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.kernels.reference import sampling as ops
from pyramid_rt.params import SamplingParams
from pyramid_rt.tuning.replay import Costs, Curve, Trace, kinds_of
from pyramid_rt.tuning.turns import Now

if TYPE_CHECKING:
    from pyramid_rt.decoding.tiers import Tier
    from pyramid_rt.pyramid import Pyramid

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32)
MOST_SAMPLES = 15
CUDA_BURST = 8  # passes in a row between two looks at the clock, as decoding does not wait after each either
_CHUNK = WIDTHS[-1]


def device_clock(place: Place) -> Now:
    """Seconds on the host, once the device has finished what it was given."""
    if place.device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        place.synchronize()
        return time.perf_counter()

    return now


@inside
def record(
    pyramid: Pyramid, prompt: Sequence[int], text: Sequence[int], params: SamplingParams, clock: Now
) -> tuple[Trace, list[float]]:
    """Show every tier a prompt and the text after it, and note what each would have said.

    Writes to the tiers' caches; what they hold afterwards is declared unknown.

    Args:
        prompt, text: token ids; they fit the context together.
        params: temperature, filters, seed (0 where None), divergence and divergence_on apply.
        clock: seconds.

    Returns: the trace, and per tier the seconds for the prompt.
    """
    device, first = pyramid.device, len(prompt)
    tokens = torch.tensor([*prompt, *text], dtype=torch.int64, device=device)
    prefill = [_timed_prefill(tier, tokens[:first], clock) for tier in pyramid.tiers]
    pairs = list(combinations(range(len(pyramid.tiers)), 2))
    own: list[list[int]] = [[] for _ in pyramid.tiers]
    divergence: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    own_tokens = _OwnTokens(params, pyramid.vocab_size, device)
    # The row of a position gives the token after it: the prompt's last gives the first of the text.
    for begin in range(first - 1, tokens.shape[0] - 1, _CHUNK):
        window = tokens[begin : min(begin + _CHUNK, tokens.shape[0] - 1)]
        rows = torch.arange(window.shape[0], dtype=torch.int64, device=device)
        raw = []
        for level, tier in enumerate(pyramid.tiers):
            start = torch.full((), begin, dtype=torch.int64, device=device)
            logits = tier.forward(window, start, rows, begin + window.shape[0])
            assert logits is not None
            raw.append(logits[..., : pyramid.vocab_size])
            own[level] += own_tokens.of(raw[-1], rows + begin + 1)
        compared = raw if params.divergence_on == "raw" else [own_tokens.logprobs(rows_) for rows_ in raw]
        for low, high in pairs:
            between = ops.divergence(params.divergence, compared[high], compared[low])
            divergence[low, high] += between.tolist()
    for tier in pyramid.tiers:
        tier.held = []
    return Trace(tuple(map(tuple, own)), {pair: tuple(v) for pair, v in divergence.items()}), prefill


def _timed_prefill(tier: Tier, prompt: Tensor, clock: Now) -> float:
    begin = clock()
    for start in range(0, prompt.shape[0], PREFILL_CHUNK):
        stop = min(start + PREFILL_CHUNK, prompt.shape[0])
        first = torch.full((), start, dtype=torch.int64, device=prompt.device)
        tier.forward(prompt[start:stop], first, None, stop)
    return clock() - begin


class _OwnTokens:
    """Own tokens and processed distributions, as the recursion makes them."""

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self._sampled, self._vocab_size = params.temperature > 0, vocab_size
        self._filters = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        seed = params.seed or 0
        self._seed = torch.tensor([seed & 0xFFFFFFFF, seed >> 32], dtype=torch.int64, device=device)
        values = (params.temperature, params.top_k, params.top_p, params.min_p)
        self._processing = [
            torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32, device=device)
            for value in values
        ]

    def of(self, raw: Tensor, positions: Tensor) -> list[int]:
        """Own tokens of raw logits [R, V] for positions [R]."""
        scores = self._processed(raw)
        if self._sampled:
            scores = scores + ops.own_noise(self._seed, positions, self._vocab_size)
        return [int(token) for token in scores.argmax(-1).tolist()]

    def logprobs(self, raw: Tensor) -> Tensor:
        """Processed log-probabilities [R, V]; one-hot at temperature 0."""
        return torch.log_softmax(self._processed(raw), -1) if self._sampled else ops.one_hot_logprobs(raw)

    def _processed(self, raw: Tensor) -> Tensor:
        return ops.process_logits(raw, *self._processing, filters=self._sampled and self._filters)


@inside
def time_passes(
    pyramid: Pyramid, text: Sequence[int], widest: Sequence[int], clock: Now, deadline: float
) -> tuple[Curve, ...]:
    """Seconds of a forward pass of each tier by the width of its window; medians, tiers and widths taking turns.

    Where rounds are graphs the passes are graphs too: run one by one from Python, small models would cost what
    planning their launches costs.

    Call it after `record` of a text of at least this length, so that the caches hold something.

    Args:
        text: token ids; the windows begin in its middle, with at most `WIDTHS[-1]` of its tokens.
        widest: per tier, the widest window that matters.
        clock, deadline: seconds; after the deadline no further turn begins, but the first is always finished.
    """
    at = len(text) // 2
    shown = (list(text) * (1 + WIDTHS[-1] // len(text)))[: WIDTHS[-1]]
    tokens = torch.tensor(shown, dtype=torch.int64, device=pyramid.device)
    start = torch.full((), at, dtype=torch.int64, device=pyramid.device)
    rows = torch.arange(tokens.shape[0], dtype=torch.int64, device=pyramid.device)
    grid = [[width for width in WIDTHS if width <= _at_least(most)] for most in widest]
    samples: list[dict[int, list[float]]] = [{width: [] for width in widths} for widths in grid]
    burst = CUDA_BURST if pyramid.device.type == "cuda" else 1
    passes = {
        (level, width): pyramid.captured(
            partial(
                _pass, tier, tokens[:width], start, rows[:width] if level else rows[width - 1 : width], at
            )
        )
        for level, tier in enumerate(pyramid.tiers)
        for width in grid[level]
    }
    for turn in range(MOST_SAMPLES + 1):
        if turn > 1 and clock() > deadline:
            break
        # Tiers take turns within a width: like in decoding, a tier finds the caches full of another's weights.
        for width in WIDTHS:
            for level, found in enumerate(samples):
                if width not in found:
                    continue
                begin = clock()
                for _ in range(burst):
                    passes[level, width]()
                if turn:  # the first turn warms up
                    found[width].append((clock() - begin) / burst)
    for tier in pyramid.tiers:
        tier.held = []
    return tuple(
        Curve(tuple(found), non_decreasing([statistics.median(values) for values in found.values()]))
        for found in samples
    )


def _pass(tier: Tier, tokens: Tensor, start: Tensor, rows: Tensor, at: int) -> None:
    tier.forward(tokens, start, rows, at + tokens.shape[0])


def _at_least(most: int) -> int:
    """The first width of the grid that is not below `most`."""
    return next((width for width in WIDTHS if width >= most), WIDTHS[-1])


def non_decreasing(values: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing numbers nearest to `values` in least squares: pool adjacent violators, take means.

    A wider window does all the work of a narrower one, so where it seems faster that is noise.
    Source: Barlow, Bartholomew, Bremner, Brunk, "Statistical inference under order restrictions", 1972.
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return tuple(mean for block in blocks for mean in [statistics.fmean(block)] * len(block))


@dataclass(frozen=True, slots=True)
class Probe:
    """One setting, really run on some prompts.

    Attributes:
        plan, levels: its chain, and for each tier of it the index in the pyramid.
        seconds: of decoding, without the prompts' processing.
        forwards: per tier of the chain, the part of them spent in its passes; None where CUDA graphs hide it.
        priced: the same, as `Costs.curves` have it.
        passes: per tier of the chain, how many there were.
    """

    plan: RoundPlan
    levels: tuple[int, ...]
    seconds: float
    forwards: tuple[float, ...] | None
    priced: tuple[float, ...]
    passes: tuple[int, ...]


def calibrated(costs: Costs, probes: Sequence[Probe]) -> Costs:
    """Costs that fit what was measured while decoding, where tiers push each other out of the caches.

    The curve of a tier is scaled by its seconds in all probes over what they were priced at. What comes beside
    passes is the least-squares solution, none of it negative, of one equation per probe:
    seconds - forwards = sum over kinds (`kinds_of`) of passes of that kind times its cost.

    Where graphs hide what tiers take, the scales are the solution of seconds = sum over tiers of scale * priced, and
    nothing comes beside.
    """
    timed = [(probe, probe.forwards) for probe in probes if probe.forwards is not None]
    if len(timed) < len(probes):
        return replace(
            costs, curves=_scaled(costs.curves, _scales_of_whole_rounds(len(costs.curves), probes))
        )
    scales = []
    for level in range(len(costs.curves)):
        places = [
            (probe, seconds, probe.levels.index(level)) for probe, seconds in timed if level in probe.levels
        ]
        priced = sum(probe.priced[place] for probe, _, place in places)
        scales.append(sum(seconds[place] for _, seconds, place in places) / priced if priced > 0 else 1.0)
    counts: list[Counter[str]] = []
    for probe in probes:
        counts.append(Counter())
        for kind, passes in zip(kinds_of(probe.plan.rules), probe.passes, strict=True):
            counts[-1][kind] += passes
    kinds = sorted({kind for count in counts for kind in count})
    found = non_negative_solution(
        [[float(count[kind]) for kind in kinds] for count in counts],
        [probe.seconds - sum(seconds) for probe, seconds in timed],
    )
    known = dict(zip(kinds, found, strict=True))
    return replace(
        costs,
        curves=_scaled(costs.curves, scales),
        plain=known.get("plain", 0.0),
        step=known.get("step", 0.0),
        match=known.get("match", 0.0),
        fuzzy=known.get("fuzzy", 0.0),
    )


def _scales_of_whole_rounds(tiers: int, probes: Sequence[Probe]) -> list[float]:
    """Per tier, a factor for its curve, from seconds of whole generations."""
    rows = [
        [probe.priced[probe.levels.index(level)] if level in probe.levels else 0.0 for level in range(tiers)]
        for probe in probes
    ]
    seconds = [probe.seconds for probe in probes]
    overall = max(0.0, sum(seconds)) / sum(map(sum, rows))
    # A tier that seems to cost nothing drowned in the noise; free it is not.
    return [scale or overall for scale in non_negative_solution(rows, seconds)]


def _scaled(curves: Sequence[Curve], scales: Sequence[float]) -> tuple[Curve, ...]:
    return tuple(curve.scaled(scale) for curve, scale in zip(curves, scales, strict=True))


def non_negative_solution(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """x >= 0 that minimises |rows x - values|, for a handful of unknowns.

    At the minimum some unknowns are 0 and the others solve the problem without bounds (Lawson and Hanson, "Solving
    least squares problems", chapter 23); with so few, every such set is tried.
    """
    matrix = torch.tensor(rows, dtype=torch.float64, device="cpu")
    wanted = torch.tensor(values, dtype=torch.float64, device="cpu")
    count = matrix.shape[1]
    best, least = torch.zeros_like(matrix[0]), float(wanted.norm())
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            x = torch.zeros_like(matrix[0])
            x[list(chosen)] = torch.linalg.pinv(matrix[:, list(chosen)]) @ wanted
            error = float((matrix @ x - wanted).norm())
            if bool((x >= 0).all()) and error < least:
                best, least = x, error
    return [float(value) for value in best]
