"""The throughput model behind ``tune``: how many tokens a second a setting would give, without running it.

The tiers' answers at each position of some text are recorded once (`Trace`). A setting is then *replayed*: the
recursion runs over the recorded answers, which gives every forward pass it would make and how wide each would be;
measured seconds per pass (`Costs`) turn that into time.

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
from pyramid_rt.decoding.rounds.recursion import Recursion
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
    """The answers of every tier at each position of one text of n new tokens.

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
    """The course of one setting on one trace.

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
    """Run the recursion over recorded answers.

    Args:
        trace: of the pyramid's tiers.
        plan: the chain's rules and lengths, and who controls the inner rounds. A rejection rule is taken for a
            match, which lets a little less stand when sampling.
        levels: for each tier of the chain, its index in the pyramid.

    Raises InputError: a rule that does not say how it is replayed.
    """
    steps = ReplaySteps(trace, plan, levels)
    recursion = Recursion(plan, steps)
    while steps.end < trace.length:
        recursion.outer_round()
    return Replay(trace.length - 1, steps.rounds, steps.differing, tuple(steps.passes))


@dataclass(slots=True)  # not frozen: thousands of settings are replayed, and frozen ones take longer to make
class ReplayRound:
    """A round that is open at a tier, above a proposal that begins at `proposal`."""

    level: int
    active: bool  # an inactive round makes its passes, under device control, and changes nothing
    proposal: int


class ReplaySteps:
    """Steps of the recursion over what was recorded: they count passes instead of making them.

    Positions count new tokens; prefill has put the one at 0. Under device control a round makes all its passes,
    each of its full width, whatever stands; under host control those that are needed.

    Attributes:
        end: tokens known, proposals included.
        rounds, differing, passes: as in `Replay`.
    """

    def __init__(self, trace: Trace, plan: RoundPlan, levels: Sequence[int]) -> None:
        """Arguments as of `replay`."""
        self.plan, self._limit, self._top = plan, trace.length, plan.tiers - 1
        self._own = [trace.own[level] for level in levels]
        pairs = zip(plan.rules, pairwise(levels), strict=True)
        self._stands = [standing(rule, trace, pair) for rule, pair in pairs]
        self._tokens = list(self._own[-1])
        self._cached = [0] * plan.tiers
        self.end = 1
        self.passes: list[Counter[int]] = [Counter() for _ in levels]
        self.rounds = self.differing = 0

    def begin(self, known_end: int | None) -> ReplayRound | None:
        """See `Steps`."""
        if self.end >= self._limit:
            return None
        self.rounds += 1
        return ReplayRound(self._top, True, self.end)

    def inner(self, outer: ReplayRound) -> ReplayRound | None:
        """See `Steps`."""
        plan, level = self.plan, outer.level - 1
        active = outer.active and self.end < self._limit
        if plan.inner_rounds is None:
            active = active and self.end - outer.proposal < plan.lengths[level]
        if plan.host_control and not active:
            return None
        return ReplayRound(level, active, self.end)

    def sample(self, opened: ReplayRound) -> None:
        """See `Steps`."""
        plan, begin = self.plan, self.end
        steps = min(plan.burst, self._limit - begin)
        if plan.host_control:
            self._pass(0, begin - self._cached[0], steps)
        else:
            self._pass(0, plan.window(0), plan.burst)
        if opened.active:
            self.end += steps
            self._tokens[begin : self.end] = self._own[0][begin : self.end]
            self._cached[0] = self.end - 1

    def verify(self, opened: ReplayRound) -> None:
        """See `Steps`."""
        plan, level, place = self.plan, opened.level, opened.proposal
        self._pass(level, self.end - self._cached[level] if plan.host_control else plan.window(level))
        if not opened.active:
            return
        end, tokens, own = self.end, self._tokens, self._own[level]
        close, match = self._stands[level - 1]
        top = level == self._top
        while place < end and (close[place] or (match and tokens[place] == own[place])):
            if top and tokens[place] != own[place]:
                self.differing += 1
            place += 1
        for tier in range(level):
            self._cached[tier] = min(self._cached[tier], place)
        self._cached[level] = self.end = place
        if place < self._limit:
            tokens[place] = own[place]
            self.end += 1

    def _pass(self, level: int, width: int, steps: int = 1) -> None:
        """Count a pass of this width and, in a burst, one of width 1 for each step after it."""
        self.passes[level][width] += 1
        if steps > 1:
            self.passes[level][1] += steps - 1


def standing(rule: Rule, trace: Trace, pair: tuple[int, int]) -> tuple[Sequence[bool], bool]:
    """The positions where a rule lets any token stand, and True where it also lets the verifier's own token stand."""
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

    def at(self, width: float) -> float:
        """Seconds at any width: between two measured widths linear, outside them as at the nearest."""
        index = bisect_left(self.widths, width)
        if index == len(self.widths):
            return self.seconds[-1]
        if index == 0 or self.widths[index] == width:
            return self.seconds[index]
        left, right = self.widths[index - 1], self.widths[index]
        share = (width - left) / (right - left)
        return self.seconds[index - 1] * (1 - share) + self.seconds[index] * share

    def scaled(self, factor: float, beside: float = 0.0) -> Curve:
        """The same with every number times `factor`, and `beside` more seconds on each pass."""
        return Curve(self.widths, tuple(factor * seconds + beside for seconds in self.seconds))

    def flat(self) -> Curve:
        """The same where a pass takes as long as one of a single token, whatever its width."""
        return Curve((1,), (self.at(1),))


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
    """The model's word on a setting, over all traces.

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
