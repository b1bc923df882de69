"""Side-by-side measurement of the decoding methods of one pyramid, in one process, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pyramid_rt.decoding.methods import LOSSLESS_METHODS
from pyramid_rt.tuning.turns import Turns, take_turns

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid
    from pyramid_rt.result import GenerationResult

BASELINE = "ar"
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class MethodReport:
    """The sums of one method over all prompts and repeats.

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
        for method in methods:
            run(prompts[0], method, WARM_UP_TOKENS)
        begin = time.perf_counter()
        turns = take_turns(
            [partial(run, method=method, tokens=max_new_tokens) for method in methods],
            prompts,
            repeats,
            tokens=lambda result: len(result.tokens),
            before=lambda repeat, place, prompt: on_step(methods[place]) if on_step else None,
            goes_on=lambda repeat, index, longest: (
                index > 0 or budget is None or time.perf_counter() - begin <= budget
            ),
        )
    finally:
        pyramid.prefix_reuse = kept
    baseline = methods.index(BASELINE)
    return [_report(method, turns, place, baseline) for place, method in enumerate(methods)]


def _report(method: str, turns: Turns[GenerationResult], place: int, baseline: int) -> MethodReport:
    """Sums over the prompts of one method; counts come from the last repeat (they are the same in all)."""
    lossless = method in LOSSLESS_METHODS
    results = [run.outcome for run in turns.runs(place, -1)]
    outputs = [list(result.tokens) for result in results]
    plain = [list(run.outcome.tokens) for run in turns.runs(baseline, -1)]
    every = [result.stats.to_dict() for result in results]
    target_forwards = [stats["tiers"][-1]["forwards"] for stats in every]
    names = [tier["name"] for tier in every[0]["tiers"][:-1]]
    return MethodReport(
        method=method,
        lossless=lossless,
        tokens_per_second=turns.rate(place),
        ratio=turns.ratio(place, baseline),
        tokens_per_target_forward=_mean(
            [stats["tokens_per_target_forward"] for stats in every], target_forwards
        ),
        acceptance={name: _acceptance(every, name) for name in names},
        differs=None if lossless else _mean([stats["differs"] for stats in every], list(map(len, outputs))),
        unequal=sum(a != b for a, b in zip(outputs, plain, strict=True)),
        repeats=len(turns.repeats),
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
