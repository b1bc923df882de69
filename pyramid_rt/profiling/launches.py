"""Rounds of launches written down, and the kernels of a captured round told apart by the same list.

A round is a list of launches that never changes. Run one by one, each launch is timed where it is run. Replayed as a
graph, the device's own records of its kernels come in the order of the list, so that the n-th record is the n-th
launch: `match` takes them apart, and refuses records that are not that list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner, Stage
from pyramid_rt.decoding.rounds.recursion import burst_name
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.decoding.tiers import DeviceTier, Runnable
from pyramid_rt.errors import PyramidError
from pyramid_rt.kernels.decide.decode_state import active_at, cached_at
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.models.traffic import LAYER_OPS
from pyramid_rt.profiling.spans import Kind, Recorder


@dataclass(frozen=True, slots=True)
class Expected:
    """One launch of a round as it is known beforehand.

    Attributes:
        section: the burst or verify it belongs to; empty for a prompt's.
        tier: whose forward pass it is part of; None for decisions.
        step: the number of that pass in the round.
        layer: of an op in the layers; None elsewhere.
        op: of `models.traffic.STEP_OPS`, or the kernel's name for a decision.
        kernel: the name of its kernel.
    """

    section: str
    tier: str | None
    step: int
    layer: int | None
    op: str
    kernel: str


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """One kernel as the device's profiler recorded it; begin and end in microseconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Attributed:
    """A record and the launch it is; `skipped`: the launch's active flag was 0, and it returned at once."""

    launch: Expected
    record: KernelRecord
    skipped: bool


class MatchError(PyramidError):
    """Records of kernels that are not those of the list of launches."""


def match(
    expected: Sequence[Expected], records: Sequence[KernelRecord], active: Sequence[bool] | None = None
) -> list[Attributed]:
    """Tell the kernels of a round apart by the list that it was captured from.

    Args:
        expected: the launches of the round, in order.
        records: of the round's kernels, of one stream, in any order.
        active: of each launch, its active flag was 1; None: all were.

    Raises:
        MatchError: there are more or fewer records than launches, or one has another kernel's name: nothing is
            guessed.
    """
    if len(records) != len(expected):
        raise MatchError(
            f"{len(records)} kernels were recorded and the round has {len(expected)} launches: "
            "they cannot be told apart"
        )
    if active is not None and len(active) != len(expected):
        raise MatchError(f"{len(active)} active flags were given for {len(expected)} launches")
    ordered = sorted(records, key=lambda record: (record.begin, record.end))
    for at, (launch, record) in enumerate(zip(expected, ordered, strict=True)):
        if launch.kernel not in record.name:
            raise MatchError(
                f"kernel {at} of {len(expected)} was recorded as {record.name!r}, and launch {at} is "
                f"{launch.kernel!r} ({launch.op} in the {launch.section or 'prefill'})"
            )
    flags = [True] * len(expected) if active is None else active
    return [
        Attributed(launch, record, not ran)
        for launch, record, ran in zip(expected, ordered, flags, strict=True)
    ]


def expected_launches(stages: Sequence[Stage], names: Sequence[str]) -> list[Expected]:
    """The launches of some stages, named. `names` are the tiers', small to large."""
    found: list[Expected] = []
    step = -1
    for stage in stages:
        tier = None if stage.level is None else names[stage.level]
        step += stage.level is not None
        for op, layer, launch in ops_of(stage):
            found.append(Expected(stage.section, tier, step, layer, op, kernel_name(launch)))
    return found


def ops_of(stage: Stage) -> list[tuple[str, int | None, Runnable]]:
    """Op, layer and launch of a stage's launches, by their order in a pass: embed, five ops a layer, head.

    A stage that is not made so (a tier that is no model) is one op, "forward", per launch.
    """
    launches = stage.launches
    if stage.level is None:
        return [(kernel_name(launch).removesuffix("_kernel"), None, launch) for launch in launches]
    inside = len(launches) - 1
    if inside < 1:
        return [("forward", None, launch) for launch in launches]
    found: list[tuple[str, int | None, Runnable]] = [("embed", None, launches[0])]
    for at, launch in enumerate(launches[1:]):
        layer, op = divmod(at, len(LAYER_OPS))
        # A pass that wants logits ends with the head; one that fills the cache ends with a layer's first op.
        is_head = at == inside - 1 and op == 0 and kernel_name(launch).startswith("head")
        found.append(("head", None, launch) if is_head else (LAYER_OPS[op], layer, launch))
    return found


def kernel_name(launch: Runnable) -> str:
    """The name of a launch's kernel; of what stands for one, its type's."""
    kernel: Any = getattr(launch, "kernel", None)
    function = getattr(kernel, "fn", kernel)
    return getattr(function, "__name__", type(launch).__name__)


class RecordingRoundRunner(KernelRoundRunner):
    """Rounds from a list of launches, each launch written down as it is run. Not measured on a GPU.

    Args:
        tiers, plan, state, vocab_size: as of `KernelRoundRunner`.
        spans: takes the spans.
    """

    def __init__(
        self, tiers: Sequence[DeviceTier], plan: RoundPlan, state: State, vocab_size: int, *, spans: Recorder
    ) -> None:
        super().__init__(tiers, plan, state, vocab_size)
        self._spans = spans
        self._names = [tier.name for tier in tiers]

    def _run(self, stages: Sequence[Stage]) -> None:
        for section, part in groupby(stages, key=lambda stage: stage.section):
            if not section:
                self._run_stages(tuple(part))
                continue
            inside = tuple(part)
            kind: Kind = "burst" if section == burst_name(self._names) else "verify"
            level = next((stage.level for stage in inside if stage.level is not None), 0)
            with self._spans.span(kind, section, self._names[level]):
                self._run_stages(inside)

    def _run_stages(self, stages: Sequence[Stage]) -> None:
        for at, stage in enumerate(stages):
            if stage.level is None:
                self._run_ops(stage)
                continue
            first = not any(earlier.level is not None for earlier in stages[:at])
            word, level = self.decode_state.word, stage.level
            if stage.section:
                width = self.plan.window(level) if first else 1
                sizes = {
                    "tokens": width,
                    # Read when the call is over: a look now would wait for the device.
                    "context": word(cached_at(level)).clone(),
                    "active": word(active_at(self.plan.tiers, level)).clone(),
                }
            else:
                sizes = {"tokens": WINDOW, "context": self._at.clone()}
            with self._spans.span("forward", "forward", self._names[level], **sizes):
                if self.clock is None:
                    self._run_ops(stage)
                else:
                    with self.clock.measure(level):
                        self._run_ops(stage)

    def _run_ops(self, stage: Stage) -> None:
        for op, layer, launch in ops_of(stage):
            self._spans.op(op, layer, {}, launch.run)
