"""The throughput model behind ``tune``: how many tokens a second a setting would give, without running it.

What the tiers would say at each position of some text is recorded once (`Trace`). A setting is then *replayed*:
the control flow of the recursion runs over the recorded answers, which gives every forward pass it would make and
how wide each would be; measured seconds per pass (`Costs`) turn that into time.

The replay knows what a tier says after the recorded text, not after a token that left it. With a lossless rule on
top this is enough: what is committed is the recorded text, and a token that leaves it falls, so the number of
rounds is exact; only the inner rounds spent past such a token are an estimate. With a fuzzy rule on top the text
itself would change, and everything is an estimate: of a decoder whose tiers agree as often as they do here.

The closed forms of the literature are its mean values: where each token stands with probability alpha, on its own,
a round of `sd` commits (1 - alpha^(k + 1)) / (1 - alpha) tokens (arXiv:2211.17192, equation 1). The replay needs
no such independence, and agreement does come in runs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pyramid_rt.decoding.chains import build_plan
from pyramid_rt.decoding.methods import LOSSLESS_METHODS, rules_of
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.errors import InputError
from pyramid_rt.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Setting:
    """A method and the options it depends on; None where it does not.

    Attributes: as the options of `generate` of the same names.
    """

    method: str
    draft_length: int | None = None
    qualifier_length: int | None = None
    qualifier_threshold: float | None = None
    target_threshold: float | None = None

    @property
    def lossless(self) -> bool:
        return self.method in LOSSLESS_METHODS

    def options(self) -> dict[str, Any]:
        """The options of `generate` that say so."""
        every = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in every.items() if value is not None}

    def plan(self, common: Mapping[str, Any], *, host_control: bool) -> RoundPlan:
        """The plan a pyramid makes of it. `common` holds the options that all settings share.

        Raises InputError: a window over 64 tokens.
        """
        params = SamplingParams.build({**common, **self.options()})
        return build_plan(params, rules_of(self.method, params.rule_options), host_control=host_control)


@dataclass(frozen=True, slots=True)
class Trace:
    """What every tier says at each position of one text of n new tokens.

    Attributes:
        own: per tier, small to large, its own token after the text up to there: n ids.
        divergence: per pair (proposing, verifying) of tiers, the divergence of the two: n numbers.
    """

    own: tuple[tuple[int, ...], ...]
    divergence: Mapping[tuple[int, int], tuple[float, ...]]

    @property
    def length(self) -> int:
        return len(self.own[-1])


@dataclass(frozen=True, slots=True)
class Replay:
    """What one setting did on one trace.

    Attributes:
        committed: tokens, without the one that prefill gives.
        rounds: outer rounds, each with one pass of the target.
        differing: committed tokens that stood although the target's own token is another.
        passes: per tier of the chain, how many forward passes of each width.
    """

    committed: int
    rounds: int
    differing: int
    passes: tuple[Counter[int], ...]


def replay(trace: Trace, plan: RoundPlan, levels: Sequence[int]) -> Replay:
    """Run the control flow of `Recursion` over recorded answers.

    Args:
        trace: of the pyramid's tiers.
        plan: the chain's rules and lengths, and who controls the inner rounds. A rejection rule is taken for a
            match, which lets a little less stand when sampling.
        levels: for each tier of the chain, its index in the pyramid.
    """
    walk = _Walk(trace, plan, levels)
    while walk.end < trace.length:
        walk.outer_round()
    return Replay(trace.length - 1, walk.rounds, walk.differing, tuple(walk.passes))


class _Walk:
    """The state of a replay. Positions count new tokens; prefill has put the one at 0.

    Names are those of `State`: `cached` per tier of the chain, `end` the tokens known, proposals included.
    """

    def __init__(self, trace: Trace, plan: RoundPlan, levels: Sequence[int]) -> None:
        self.limit = trace.length
        self.plan = plan
        self.own = [trace.own[level] for level in levels]
        pairs = zip(plan.rules, pairwise(levels), strict=True)
        self.stands = [_standing(rule, trace, pair) for rule, pair in pairs]
        self.tokens = list(self.own[-1])
        self.end = 1
        self.cached = [0] * plan.tiers
        self.passes: list[Counter[int]] = [Counter() for _ in levels]
        self.rounds = self.differing = 0

    def outer_round(self) -> None:
        """As `Recursion.outer_round`."""
        self.rounds += 1
        if not self.plan.host_control:
            self._charge_fixed()
        top = self.plan.tiers - 1
        if top == 0:
            self._sample(1)
            return
        begin = self.end
        self._extend(top - 1)
        self._verify(top, begin)

    def _extend(self, level: int) -> None:
        plan, base = self.plan, self.end
        if level == 0:
            self._sample(plan.lengths[0])
            return
        fixed = plan.inner_rounds
        for _ in range(fixed or plan.lengths[level]):
            if self.end >= self.limit or (fixed is None and self.end - base >= plan.lengths[level]):
                break
            begin = self.end
            self._extend(level - 1)
            self._verify(level, begin)

    def _sample(self, steps: int) -> None:
        begin, steps = self.end, min(steps, self.limit - self.end)
        if self.plan.host_control:
            self.passes[0][begin - self.cached[0]] += 1
            self.passes[0][1] += steps - 1
        self.end += steps
        self.tokens[begin : self.end] = self.own[0][begin : self.end]
        self.cached[0] = self.end - 1

    def _verify(self, level: int, begin: int) -> None:
        end, tokens, own = self.end, self.tokens, self.own[level]
        if self.plan.host_control:
            self.passes[level][end - self.cached[level]] += 1
        close, match = self.stands[level - 1]
        top = level == self.plan.tiers - 1
        place = begin
        while place < end and (close[place] or (match and tokens[place] == own[place])):
            if top and tokens[place] != own[place]:
                self.differing += 1
            place += 1
        for tier in range(level):
            self.cached[tier] = min(self.cached[tier], place)
        self.cached[level] = self.end = place
        if place < self.limit:
            tokens[place] = own[place]
            self.end += 1

    def _charge_fixed(self) -> None:
        """Under device control a round makes all its passes, each of its full width, whatever stands."""
        plan, times = self.plan, 1
        for level in reversed(range(plan.tiers)):
            if 0 < level < plan.tiers - 1:
                times *= plan.inner_rounds or 1
            self.passes[level][plan.window(level)] += times
        if plan.rules:
            self.passes[0][1] += times * (plan.lengths[0] - 1)


def _standing(rule: Rule, trace: Trace, pair: tuple[int, int]) -> tuple[Sequence[bool], bool]:
    """Where a rule lets any token stand, and whether it also lets the verifying tier's own token stand."""
    replayed = rule.replayed
    if replayed is None:
        raise InputError(f"rule {rule.name!r} cannot be tuned: it says nothing of how it is replayed")
    if replayed.threshold is None:
        return [False] * trace.length, replayed.match
    bound, values = replayed.threshold, trace.divergence[pair]
    return [value <= bound and value < math.inf for value in values], replayed.match


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one forward pass by the width of its window, measured at some widths, ascending."""

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, width: int) -> float:
        """Seconds at any width: between two measured widths linear, outside them as at the nearest."""
        index = bisect_left(self.widths, width)
        if index == len(self.widths):
            return self.seconds[-1]
        if index == 0 or self.widths[index] == width:
            return self.seconds[index]
        left, right = self.widths[index - 1], self.widths[index]
        share = (width - left) / (right - left)
        return self.seconds[index - 1] * (1 - share) + self.seconds[index] * share


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of everything that a generation does.

    Attributes:
        curves: per tier of the pyramid, its forward passes.
        prefill: per tier of the pyramid, one entry per prompt.
        plain: besides the forward pass, for each token of plain decoding.
        step: the same for each token that the lowest tier of a longer chain draws.
        match, fuzzy: the same for each verify by such a rule; what a round takes as a whole is part of it.
    """

    curves: tuple[Curve, ...]
    prefill: tuple[tuple[float, ...], ...]
    plain: float = 0.0
    step: float = 0.0
    match: float = 0.0
    fuzzy: float = 0.0

    def forwards(self, passes: Sequence[Counter[int]], levels: Sequence[int]) -> list[float]:
        """Per tier of the chain, the seconds of its forward passes alone."""
        return [
            sum(count * self.curves[level].at(width) for width, count in tier.items())
            for tier, level in zip(passes, levels, strict=True)
        ]

    def decoding(self, done: Replay, plan: RoundPlan, levels: Sequence[int]) -> float:
        """Seconds of a replay: sum over passes of t(tier, width), and what comes with each pass."""
        beside: float = sum(
            getattr(self, kind) * passes.total()
            for kind, passes in zip(kinds_of(plan.rules), done.passes, strict=True)
        )
        return sum(self.forwards(done.passes, levels)) + beside


def kinds_of(rules: Sequence[Rule]) -> list[str]:
    """For each tier of a chain, which of the fields of `Costs` comes with its passes."""
    if not rules:
        return ["plain"]
    return ["step", *("match" if rule.divergence_kind is None else "fuzzy" for rule in rules)]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of a setting, over all traces.

    Attributes:
        setting: whose.
        seconds: per prompt, the prompt's processing included.
        tokens_per_second: new tokens over seconds, over all prompts.
        tokens_per_target_forward: without the token that prefill gives; None where there is no other.
        differs: share of the tokens that are not the target's own; 0 for a lossless method.
    """

    setting: Setting
    seconds: tuple[float, ...]
    tokens_per_second: float
    tokens_per_target_forward: float | None
    differs: float


def predict(
    setting: Setting, traces: Sequence[Trace], costs: Costs, plan: RoundPlan, levels: Sequence[int]
) -> Prediction:
    """Replay a setting on every trace and price it.

    tokens/s = sum over prompts of n / sum over prompts of (prefill of the chain's tiers + decoding).

    Args:
        traces: one per prompt, in the order of `costs.prefill`.
        plan, levels: as in `replay`.
    """
    done = [replay(trace, plan, levels) for trace in traces]
    seconds = tuple(
        costs.decoding(one, plan, levels) + sum(costs.prefill[level][index] for level in levels)
        for index, one in enumerate(done)
    )
    committed, rounds = sum(one.committed for one in done), sum(one.rounds for one in done)
    return Prediction(
        setting=setting,
        seconds=seconds,
        tokens_per_second=sum(trace.length for trace in traces) / sum(seconds),
        tokens_per_target_forward=committed / rounds if rounds else None,
        differs=sum(one.differing for one in done) / committed if committed else 0.0,
    )
