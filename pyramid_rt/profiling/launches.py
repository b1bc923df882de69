"""Rounds of launches written down: each launch run by itself, with its name, its pass and its layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner, Stage
from pyramid_rt.decoding.rounds.recursion import burst_name
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.decoding.tiers import DeviceTier, Runnable
from pyramid_rt.kernels.decide.decode_state import active_at, cached_at
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.models.traffic import LAYER_OPS
from pyramid_rt.profiling.records import Expected, kernel_name
from pyramid_rt.profiling.spans import Kind, Recorder


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


def decision_sizes(launch: Runnable) -> dict[str, Any]:
    """The formula of `models.traffic` for a launch that decides, and its rows; nothing where there is none.

    Formulas are of a verify's rows, two at least; that of `reject` counts the rows of `filters` before it too.
    """
    options: dict[str, Any] = getattr(launch, "kwargs", {})
    rows = options.get("COUNT", 1)
    name = kernel_name(launch).removesuffix("_kernel")
    if name == "sample":
        return {"formula": "sample", "rows": 1}
    if rows < 2 or name not in ("decide", "filters"):
        return {}
    formula = "filtered" if name == "filters" else "decide" if options["FUZZY"] else "match"
    return {"formula": formula, "rows": rows}


class RecordingRoundRunner(KernelRoundRunner):
    """Rounds from a list of launches, each launch written down as it is run.

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
            sizes = decision_sizes(launch) if stage.level is None else {}
            self._spans.op(op, layer, {"kernel": kernel_name(launch), **sizes}, launch.run)
