"""Side-by-side measurement of the decoding methods of one pyramid, in one process, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyramid_rt.decoding.methods import LOSSLESS_METHODS

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid
    from pyramid_rt.result import GenerationResult

BASELINE = "ar"
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class MethodReport:
    """What one method did over all prompts and repeats.

    Attributes:
        method: its name.
        lossless: whether its output must be the target's own.
        tokens_per_second: new tokens over seconds, prefill included; the median over the repeats.
        ratio: the median over the repeats of its tokens per second over the baseline's of that repeat.
        tokens_per_target_forward: over all prompts; the token that prefill gave is left out.
        acceptance: accepted over proposed, by name of proposing tier; None where nothing was proposed.
        differs: share of tokens that are not the target's own; None for a lossless method.
        unequal: prompts whose tokens are not those of the baseline.
        repeats: how often everything was measured.
    """

    method: str
    lossless: bool
    tokens_per_second: float
    ratio: float
    tokens_per_target_forward: float | None
    acceptance: dict[str, float | None]
    differs: float | None
    unequal: int
    repeats: int


@dataclass
class _Tally:
    """Sums over the prompts of one method; counts come from the last repeat (they are the same in all)."""

    rates: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)


def compare(
    pyramid: Pyramid,
    prompts: Sequence[str],
    methods: Sequence[str],
    *,
    max_new_tokens: int,
    repeats: int = 3,
    budget: float | None = None,
    on_step: Callable[[str], None] | None = None,
) -> list[MethodReport]:
    """Decode every prompt greedily by every method and measure.

    Methods take turns on each prompt (A B C, A B C, ...), so that a machine that slows down or speeds up
    does so for all of them. All run to `max_new_tokens`, past any end-of-sequence, and process the whole prompt
    (`Pyramid.prefix_reuse` is off meanwhile): equal work.

    Args:
        pyramid: a loaded `Pyramid`.
        prompts: at least one.
        methods: names, the baseline ``ar`` among them.
        max_new_tokens: length of each output.
        repeats: how often everything is measured.
        budget: seconds after which no further repeat begins, so that a slow machine is not kept for long.
        on_step: called before each generation with the method's name.

    Returns: one report per method, in the order given.
    """

    def run(prompt: str, method: str, tokens: int) -> GenerationResult:
        return pyramid.generate(
            prompt, method=method, max_new_tokens=tokens, temperature=0.0, ignore_eos=True
        )

    kept, pyramid.prefix_reuse = pyramid.prefix_reuse, False
    try:
        return _measure(run, prompts, methods, max_new_tokens, repeats, budget, on_step)
    finally:
        pyramid.prefix_reuse = kept


def _measure(
    run: Callable[[str, str, int], GenerationResult],
    prompts: Sequence[str],
    methods: Sequence[str],
    max_new_tokens: int,
    repeats: int,
    budget: float | None,
    on_step: Callable[[str], None] | None,
) -> list[MethodReport]:
    for method in methods:
        run(prompts[0], method, WARM_UP_TOKENS)
    tallies = {method: _Tally() for method in methods}
    begin = time.perf_counter()
    for repeat in range(repeats):
        if repeat and budget is not None and time.perf_counter() - begin > budget:
            break
        seconds = dict.fromkeys(methods, 0.0)
        for tally in tallies.values():
            tally.outputs, tally.stats = [], []
        for prompt in prompts:
            for method, tally in tallies.items():
                if on_step:
                    on_step(method)
                start = time.perf_counter()
                result = run(prompt, method, max_new_tokens)
                seconds[method] += time.perf_counter() - start
                tally.outputs.append(list(result.tokens))
                tally.stats.append(result.stats.to_dict())
        for method, tally in tallies.items():
            tally.rates.append(sum(map(len, tally.outputs)) / seconds[method])
    return [_report(method, tallies[method], tallies[BASELINE]) for method in methods]


def _report(method: str, tally: _Tally, baseline: _Tally) -> MethodReport:
    lossless = method in LOSSLESS_METHODS
    target_forwards = [stats["tiers"][-1]["forwards"] for stats in tally.stats]
    names = [tier["name"] for tier in tally.stats[0]["tiers"][:-1]]
    ratios = [mine / theirs for mine, theirs in zip(tally.rates, baseline.rates, strict=True)]
    return MethodReport(
        method=method,
        lossless=lossless,
        tokens_per_second=statistics.median(tally.rates),
        ratio=statistics.median(ratios),
        tokens_per_target_forward=_mean(
            [stats["tokens_per_target_forward"] for stats in tally.stats], target_forwards
        ),
        acceptance={name: _acceptance(tally.stats, name) for name in names},
        differs=None
        if lossless
        else _mean([stats["differs"] for stats in tally.stats], list(map(len, tally.outputs))),
        unequal=sum(a != b for a, b in zip(tally.outputs, baseline.outputs, strict=True)),
        repeats=len(tally.rates),
    )


def _acceptance(all_stats: Sequence[dict[str, Any]], name: str) -> float | None:
    tiers = [tier for stats in all_stats for tier in stats["tiers"] if tier["name"] == name]
    proposed = sum(tier["proposed"] for tier in tiers)
    return sum(tier["accepted"] for tier in tiers) / proposed if proposed else None


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """The weighted mean of the values there are, which is the quotient of the sums they came from."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
