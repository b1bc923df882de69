"""Runs the outer rounds of one plan, on buffers taken once: eager or captured, and what the host learns of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from pyramid_rt.decoding.graphs import Capture, Graphs, Recorder
from pyramid_rt.decoding.observing import Observer, VerifyRecord
from pyramid_rt.decoding.place import Place, inside
from pyramid_rt.decoding.readback import RoundReader, Snapshot
from pyramid_rt.decoding.rounds.recursion import RoundRunner, Segment, TierTimer
from pyramid_rt.decoding.rounds.torch_steps import TorchRoundRunner
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.decoding.tiers import DeviceTier, Tier
from pyramid_rt.models.llama import SLACK_ROWS

PREFILL_CHUNK = 512


class WindowRoundRunner(RoundRunner, Protocol):
    """A runner that processes a prompt by lists of launches too, which always take 64 tokens."""

    def place(self, start: Tensor | int) -> None:
        """Set the position at which the next `fill` or `first` begins."""
        ...

    def compile(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the kernels of a round; see `Engine.compile`."""
        ...

    def fill(self, level: int) -> None:
        """The 64 tokens from `place` on into a tier's cache."""
        ...

    def first(self) -> None:
        """`first_token` of the window that begins at `place` and ends with the prompt, up to 64 tokens."""
        ...


def by_kernels(tiers: Sequence[Tier], plan: RoundPlan) -> bool:
    """True where rounds run from a list of launches: under device control, if every tier and every rule can."""
    return (
        not plan.host_control
        and all(getattr(tier, "device_rounds", False) for tier in tiers)
        and all(rule.kernel_name is not None for rule in plan.rules)
    )


def rounds_for(
    tiers: Sequence[Tier], plan: RoundPlan, state: State, vocab_size: int, clock: TierTimer | None = None
) -> RoundRunner:
    """Rounds of `tiers` (small to large) by `plan` on `state`; by kernels iff the state was made for them.

    Then every tier must be a `DeviceTier`.
    """
    if state.decode_state is None:
        return TorchRoundRunner(tiers, plan, state, vocab_size, clock)
    # Triton, which the kernels need, is not everywhere.
    from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner

    return KernelRoundRunner(cast(Sequence[DeviceTier], tiers), plan, state, vocab_size, clock)


class Engine:
    """Kept between calls; a call overwrites everything of the request in `state`.

    Args:
        tiers: those of the method, small to large.
        plan: the static shape of a round.
        vocab_size: columns of the logits that are decoded over.
        max_seq: positions of the caches, slack excluded.
        place: of the buffers; everything here happens inside it.
        recorder: captures rounds; None runs them eagerly, as a plan with `trace` needs it.
        stepwise: capture the steps of a round separately.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        plan: RoundPlan,
        vocab_size: int,
        max_seq: int,
        place: Place,
        recorder: Recorder | None = None,
        *,
        stepwise: bool = False,
    ) -> None:
        self.tiers, self.plan, self.place = tuple(tiers), plan, place
        self._clock: TierTimer | None = None
        self._context = max_seq
        with place.allocation():
            self._allocate(vocab_size, recorder, stepwise)

    def _allocate(self, vocab_size: int, recorder: Recorder | None, stepwise: bool) -> None:
        tiers, plan, max_seq = self.tiers, self.plan, self._context
        make = State.for_kernels if by_kernels(tiers, plan) else State.allocate
        self.state = make(plan, max_seq, vocab_size, self.place.device)
        # Under device control the next round starts before the last one is read. Log-probabilities are read
        # from rows that the next round overwrites.
        self.ahead = 0 if plan.host_control or plan.logprobs is not None or plan.trace else 1
        self._rounds = rounds_for(tiers, plan, self.state, vocab_size)
        self._observer: Observer | None = None
        if plan.trace:
            self._observer = Observer(plan.rules, [tier.name for tier in tiers])
            self._rounds.watched_by(self._observer)
        self._reader = RoundReader(plan, self.state, self.ahead, self.place)
        self._graphs: Graphs | None = None
        if recorder is not None:
            names = tuple(tier.name for tier in tiers)
            others = [self._reader.reported]
            self._graphs = Graphs(
                self._rounds, self.state, others, plan, max_seq, names, recorder, stepwise=stepwise
            )
        # What the prompt is processed by: lists of launches on windows of one width, or the tiers' own way.
        self._fillers = cast(WindowRoundRunner, self._rounds) if self.state.decode_state is not None else None

    @property
    def unread(self) -> int:
        """Rounds that were launched and not read."""
        return self._reader.posted

    @property
    def timed(self) -> bool:
        """True where the time of each tier shows: not where a whole round is one graph."""
        return self._graphs is None or self._graphs.stepwise

    @property
    def chunk(self) -> int:
        """Most tokens of the prompt that are processed at a time."""
        return PREFILL_CHUNK if self._fillers is None else SLACK_ROWS

    def launches(self) -> int | None:
        """Kernel launches of an outer round; None where torch decides how many."""
        count = self._rounds.launches()
        return None if count is None else count + 1  # and the report

    @inside
    def compile(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the kernels of a round, where rounds are made of them: seconds for each that no cache on disk has.

        Args:
            progress: called with (launches whose kernels are compiled, launches in all), before the first and after
                each.
        """
        if self._fillers is not None and self.state.tokens.device.type == "cuda":
            self._fillers.compile(progress)

    @inside
    def prepare(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Capture what will be needed, for every length of text; how many graphs were new.

        Args:
            progress: called with (works that are captured, works in all), before the first and after each.
        """
        if self._graphs is None:
            return 0
        horizons = self._graphs.horizons()
        works: list[tuple[str, int, Capture]] = [("round", rows, self._round) for rows in horizons]
        if self._fillers is not None:
            fills = [(f"fill {level}", horizons[-1], self._fill(level)) for level in range(self.plan.tiers)]
            works += [*fills, ("first token", horizons[-1], self._first)]
        count = 0
        for done, (name, rows, work) in enumerate(works):
            if progress is not None:
                progress(done, len(works))
            count += self._graphs.prepare(name, rows, work)
        if progress is not None:
            progress(len(works), len(works))
        return count

    @inside
    def restart(self, end: int, clock: TierTimer) -> None:
        """A new text of `end` tokens: forget rounds that were not read, and time forwards by this clock."""
        self._clock = clock
        self._reader.restart(end)
        self._rounds.restart(clock)
        if self._observer is not None:
            self._observer.restart()

    @inside
    def fill(self, level: int, begin: int, end: int) -> None:
        """Positions begin .. end - 1 of the prompt, up to `chunk`, into a tier's cache."""
        if self._fillers is not None:
            self._fillers.place(begin)
            self._call(f"fill {level}", self._context, self._fill(level))
            return
        start = torch.full((), begin, dtype=torch.int64, device=self.state.tokens.device)
        self.tiers[level].forward(self.state.tokens[begin:end], start, None, end)

    def whole_chunks(self, level: int, prompt: int) -> int:
        """The count of a prompt's first tokens that a tier takes by `fill_chunk`: 0 where it has no such way."""
        tier = self._bulk_tier(level)
        return 0 if tier is None else tier.whole_chunks(prompt)

    def bulk(self, level: int) -> int:
        """The count of leading positions of a tier's cache that `fill_chunk` made."""
        tier = self._bulk_tier(level)
        return 0 if tier is None else tier.bulk

    def keep(self, level: int, count: int) -> None:
        """Give up what a tier holds from position `count` on."""
        tier = self.tiers[level]
        tier.held = tier.held[:count]
        bulk = self._bulk_tier(level)
        if bulk is not None:
            bulk.bulk = min(bulk.bulk, count)

    @inside
    def fill_chunk(self, level: int, begin: int) -> int:
        """A chunk of the prompt into a tier's cache; where it ends."""
        tier = self._bulk_tier(level)
        assert tier is not None
        return tier.fill_chunk(self.state.tokens, begin)

    def _bulk_tier(self, level: int) -> DeviceTier | None:
        tier = self.tiers[level]
        return cast(DeviceTier, tier) if getattr(tier, "device_rounds", False) else None

    @inside
    def first_token(self, begin: int, end: int) -> None:
        """The same with the prompt's last tokens, up to `chunk`, in the target, which commits the token after."""
        if self._fillers is not None:
            self._fillers.place(begin)
            self._call("first token", self._context, self._first)
        else:
            window = self.state.tokens[begin:end]
            row = torch.full((1,), end - 1 - begin, dtype=torch.int64, device=window.device)
            start = torch.full((), begin, dtype=torch.int64, device=window.device)
            self._rounds.first_token(row, end, window, start)
            self._reader.gather()
        self._reader.post()

    @inside
    def launch(self, known_end: int) -> None:
        """One outer round; waits for nothing. `known_end` is an upper bound of `state.end`."""
        self.run(known_end)
        self._reader.post()

    @inside
    def run(self, known_end: int) -> None:
        """A round without readback; else as `launch`."""
        if self._graphs is not None:
            self._call("round", known_end, self._round)
        else:  # which may be under host control, where rounds have no fixed sections
            self._rounds.outer_round(known_end)
            self._reader.gather()

    @inside
    def read(self) -> Snapshot:
        """The oldest round that was not read; waits for it."""
        return self._reader.take()

    @inside
    def observed(self) -> list[VerifyRecord]:
        """The verifies of the round that was read, where the plan has them watched."""
        return [] if self._observer is None else self._observer.take()

    def _call(self, name: str, known_end: int, work: Capture) -> None:
        """Some work on the device, captured where there are graphs."""
        if self._graphs is not None:
            self._graphs.run(name, known_end, work, self._clock)
        else:
            for section in work(known_end):
                section.run()

    def _fill(self, level: int) -> Capture:
        fillers, name = self._fillers, f"fill of {self.tiers[level].name!r}"
        assert fillers is not None
        return lambda known_end: [Segment(name, level, lambda: fillers.fill(level))]

    def _first(self, known_end: int) -> Sequence[Segment]:
        assert self._fillers is not None
        last = self.plan.tiers - 1
        name = f"first token of {self.tiers[last].name!r}"
        return [Segment(name, last, self._fillers.first), self._report]

    def _round(self, known_end: int) -> Sequence[Segment]:
        return [*self._rounds.sections(known_end), self._report]

    @property
    def _report(self) -> Segment:
        return Segment("report", None, self._reader.gather)
