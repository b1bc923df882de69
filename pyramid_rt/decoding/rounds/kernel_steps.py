"""The steps of a round as kernel launches: a flat list, written down once and run again for every round.

Nothing in the list depends on a device value, so it is what a CUDA graph captures. Every decision opens the round
that follows it (`kernels.decide.decode_state.mark`): a round costs one launch beside its forward pass, or two where
processed distributions are wanted (filters, rejection, a divergence on processed logits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from pyramid_rt.decoding.observing import Observer
from pyramid_rt.decoding.observing.kernels import KernelObserver
from pyramid_rt.decoding.rounds.recursion import (
    Recursion,
    Segment,
    TierTimer,
    burst_name,
    horizon,
    timing,
    verify_name,
)
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.decoding.tiers import DeviceForward, DeviceTier, Runnable
from pyramid_rt.kernels.decide import decision, sample
from pyramid_rt.kernels.decide import filters as filter_kernels
from pyramid_rt.kernels.decide.decode_state import END, DecodeState, active_at, base_at, cached_at
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW


@dataclass(frozen=True, slots=True)
class KernelRound:
    """A round that is open at a tier; what else there is to know about it is on the device."""

    level: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Launches that belong together.

    Attributes:
        section: the name of the part of a round that they belong to; empty for a prompt's.
        level: the tier whose forward pass they are; None for decisions.
        launches: in order.
        judge: the tier whose verify they decide; None where they decide none.
    """

    section: str
    level: int | None
    launches: tuple[Runnable, ...]
    judge: int | None = None


class KernelSteps:
    """Writes a round of `tiers` down in `stages`; the cache is looked at up to `kv_bound`."""

    def __init__(
        self,
        tiers: Sequence[DeviceTier],
        plan: RoundPlan,
        decode_state: DecodeState,
        vocab_size: int,
        kv_bound: int,
    ) -> None:
        self.tiers, self.plan, self.decode_state = tiers, plan, decode_state
        self.vocab_size, self.kv_bound = vocab_size, kv_bound
        self.processed = processed_tiers(plan)
        self.names = [tier.name for tier in tiers]
        self.section = ""
        self.stages: list[Stage] = []

    def begin(self, known_end: int | None) -> KernelRound:
        """No launch: the last decision, or the prompt's end, opened the outer round."""
        return KernelRound(self.plan.tiers - 1)

    def inner(self, outer: KernelRound) -> KernelRound:
        """No launch: the decision before it, or the start of the outer round, opened this round."""
        return KernelRound(outer.level - 1)

    def sample(self, opened: KernelRound) -> None:
        """Tier 0 draws its tokens, one forward pass each."""
        plan, decode_state = self.plan, self.decode_state
        self.section = burst_name(self.names)
        for step in range(plan.burst):
            width = plan.window(0) if step == 0 else 1
            self.forward(0, decode_state.word(END), width, 1)
            # Without filters the rows of a whole burst are processed together, when they are judged.
            stored = plan.filters
            if stored:
                self.decide(filter_kernels.plan(decode_state, 0, 1, draw=True, filters=True))
            self.decide(sample.plan(decode_state, 0, first=False, stored=stored))

    def verify(self, opened: KernelRound) -> None:
        """A forward pass over the proposal, and the decision."""
        plan, decode_state, level = self.plan, self.decode_state, opened.level
        self.section = verify_name(self.names, level)
        rule, count = plan.rules[level - 1], plan.longest[level - 1] + 1
        self.forward(level, decode_state.word(base_at(plan.tiers, level - 1)), plan.window(level), count)
        stored = plan.filters or self.processed[level]
        late = level == 1 and self.processed[0] and not plan.filters
        if stored or late:
            self.decide(
                filter_kernels.plan(decode_state, level, count, draw=False, filters=plan.filters, below=late)
            )
        until = None
        if plan.inner_rounds is None and level < plan.tiers - 1:
            until = plan.lengths[level]
        self.decide(
            decision.plan(
                decode_state,
                level,
                count,
                rule_name(rule),
                kind=rule.divergence_kind or "js",
                processed=rule.needs_below_processed,
                stored=stored or late,
                until=until,
            ),
            judge=level,
        )

    def fill(self, level: int, start: Tensor) -> None:
        """Write down a pass of 64 tokens from `start` on that leaves nothing but keys and values."""
        self.run_tier(self.request(level, start, start, WINDOW, 0, self.kv_bound), level)

    def first(self, start: Tensor) -> None:
        """Write down the end of the target's prefill, in a window of 64 that may reach past the prompt."""
        level, decode_state, filters = self.plan.tiers - 1, self.decode_state, self.plan.filters
        self.decide(sample.plan_begin(decode_state))
        self.run_tier(self.request(level, start, decode_state.word(END), WINDOW, 1, self.kv_bound), level)
        if filters:
            self.decide(filter_kernels.plan(decode_state, level, 1, draw=True, filters=True))
        self.decide(sample.plan(decode_state, level, first=True, stored=filters))

    def forward(self, level: int, decided: Tensor, width: int, count: int) -> None:
        """Write down a forward pass of a tier from its cached length on; skipped where its round has ended."""
        start = self.decode_state.word(cached_at(level))
        active = self.decode_state.word(active_at(self.plan.tiers, level))
        self.run_tier(self.request(level, start, decided, width, count, self.kv_bound, active), level)

    def request(
        self,
        level: int,
        start: Tensor,
        decided: Tensor,
        width: int,
        count: int,
        kv_bound: int,
        active: Tensor | None = None,
    ) -> DeviceForward:
        """A forward pass into this decode_state's buffers."""
        decode_state = self.decode_state
        return DeviceForward(
            tokens=decode_state.tokens,
            start=start,
            decided=decided,
            first=decode_state.word(base_at(self.plan.tiers, self.plan.tiers - 1)),
            width=width,
            count=count,
            vocab_size=self.vocab_size,
            rows=decode_state.rows[level],
            statistics=decode_state.statistics_of(level),
            seed=decode_state.seed,
            temperature=decode_state.temperature,
            kv_bound=kv_bound,
            active=active,
        )

    def run_tier(self, request: DeviceForward, level: int) -> None:
        """Write down the launches of a forward pass."""
        self.stages.append(Stage(self.section, level, tuple(self.tiers[level].device_forward(request))))

    def decide(self, launch: Runnable, judge: int | None = None) -> None:
        """Write down a launch that is no forward pass; `judge` as in `Stage`."""
        self.stages.append(Stage(self.section, None, (launch,), judge))


class KernelRoundRunner:
    """Rounds that are run from a list of launches.

    Args:
        tiers: small to large.
        plan: of device control.
        state: made by `State.for_kernels` for the same plan.
        vocab_size: columns decoded over.
        clock: times every forward pass where given.
    """

    steps_class: ClassVar[type[KernelSteps]] = KernelSteps

    def __init__(
        self,
        tiers: Sequence[DeviceTier],
        plan: RoundPlan,
        state: State,
        vocab_size: int,
        clock: TierTimer | None = None,
    ) -> None:
        if plan.host_control:
            raise ValueError(
                "plan.host_control is True, expected False: rounds of kernels control themselves"
            )
        if state.decode_state is None:
            raise ValueError("state.decode_state is None, expected a state made by State.for_kernels")
        self.tiers, self.plan, self.decode_state, self.clock = tiers, plan, state.decode_state, clock
        self.vocab_size, self.capacity = vocab_size, state.tokens.shape[0]
        self._at = torch.zeros((), dtype=torch.int64, device=state.tokens.device)
        self.moved: Sequence[Tensor] = (self._at,)
        self._recorded: dict[tuple[str, int], tuple[Stage, ...]] = {}
        self._observer: KernelObserver | None = None

    def stages(self, kv_bound: int) -> tuple[Stage, ...]:
        """An outer round that looks at the cache up to `kv_bound`; written down at the first call."""
        return self._written("round", kv_bound, lambda steps: Recursion(self.plan, steps).outer_round())

    def compile(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the kernels of a round without running them; `progress` as of `Engine.compile`."""
        launches = [launch for stage in self.stages(self.capacity) for launch in stage.launches]
        for done, launch in enumerate(launches):
            if progress is not None:
                progress(done, len(launches))
            if isinstance(launch, Launch):
                launch.warmup()
        if progress is not None:
            progress(len(launches), len(launches))

    def _written(self, name: str, kv_bound: int, write: Callable[[KernelSteps], None]) -> tuple[Stage, ...]:
        """The list of this name and bound; made by `write` at the first call."""
        key = name, kv_bound
        if key not in self._recorded:
            steps = self.steps_class(self.tiers, self.plan, self.decode_state, self.vocab_size, kv_bound)
            write(steps)
            self._recorded[key] = tuple(steps.stages)
        return self._recorded[key]

    def restart(self, clock: TierTimer | None) -> None:
        """See `RoundRunner`."""
        self.clock = clock

    def watched_by(self, observer: Observer) -> None:
        """See `RoundRunner`."""
        self._observer = KernelObserver(observer, self.plan, self.decode_state)

    def park(self, context: int) -> None:
        """See `RoundRunner`."""
        self._at.fill_(context)
        sample.plan_begin(self.decode_state).run()

    def place(self, start: Tensor | int) -> None:
        """Set the position at which the next `fill` or `first` begins."""
        if isinstance(start, Tensor):
            self._at.copy_(start)
        else:
            self._at.fill_(start)

    def fill(self, level: int) -> None:
        """The 64 tokens from `place` on into a tier's cache."""
        name = f"fill {level}"
        self._run(self._written(name, self.capacity, lambda steps: steps.fill(level, self._at)))

    def first(self) -> None:
        """`first_token` of the window that begins at `place` and ends with the prompt, up to 64 tokens."""
        self._run(self._written("first", self.capacity, lambda steps: steps.first(self._at)))

    def launches(self) -> int | None:
        """See `RoundRunner`."""
        return sum(len(stage.launches) for stage in self.stages(self.capacity))

    def outer_round(self, known_end: int | None = None) -> None:
        """See `RoundRunner`."""
        self._run(self.stages(self._bound(known_end)))

    def sections(self, known_end: int) -> Sequence[Segment]:
        """See `RoundRunner`."""
        parts = groupby(self.stages(self._bound(known_end)), key=lambda stage: stage.section)
        return [self._section(tuple(stages)) for _, stages in parts]

    def _bound(self, known_end: int | None) -> int:
        return self.capacity if known_end is None else horizon(known_end, self.plan, self.capacity)

    def _section(self, stages: Sequence[Stage]) -> Segment:
        """Stages of one section."""
        level = next((stage.level for stage in stages if stage.level is not None), None)
        return Segment(stages[0].section, level, lambda: self._run(stages))

    def first_token(self, row: Tensor, kv_bound: int, window: Tensor, start: Tensor) -> None:
        """See `RoundRunner`; `window` must be that part of the token buffer, of up to 64 tokens.

        Raises:
            ValueError: a longer window.
        """
        if window.shape[0] > WINDOW:
            raise ValueError(f"window has {window.shape[0]} tokens, expected at most {WINDOW}")
        self.place(start)
        self.first()

    def _run(self, stages: Sequence[Stage]) -> None:
        watching = self._observer
        for stage in stages:
            seen = None if watching is None or stage.judge is None else watching.before(stage.judge)
            with timing(self.clock, stage.level):
                for launch in stage.launches:
                    launch.run()
            if watching is not None and seen is not None:
                watching.after(seen)


def rule_name(rule: Rule) -> decision.RuleName:
    """The kernels' name of a rule that they know. Raises ValueError for another."""
    if rule.kernel_name not in decision.RULES:
        raise ValueError(f"rule {rule.name!r} has no kernel, expected one of {', '.join(decision.RULES)}")
    return rule.kernel_name


def processed_tiers(plan: RoundPlan) -> tuple[bool, ...]:
    """For each tier: does a rule of the chain read its processed distribution?"""
    wanted = [False] * plan.tiers
    for stage, rule in enumerate(plan.rules):
        wanted[stage] = wanted[stage] or rule.needs_below_processed or plan.keep_effective[stage]
        wanted[stage + 1] = wanted[stage + 1] or rule.needs_processed
    return tuple(wanted)
