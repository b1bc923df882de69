"""The limits of a pyramid by the throughput model: what each change would gain, and so what holds it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from pyramid_rt.decoding.methods import TIERS_NEEDED, tiers_of
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.tuning.candidates import (
    DEPENDS_ON,
    DRAFT_LENGTHS_OF_THREE,
    DRAFT_LENGTHS_OF_TWO,
    QUALIFIER_LENGTHS,
)
from pyramid_rt.tuning.compare import BASELINE
from pyramid_rt.tuning.replay import Costs, Setting, kinds_of
from pyramid_rt.tuning.throughput import Chain, throughput

Kind = Literal[
    "draft",
    "qualifier speed",
    "verification",
    "qualifier",
    "added qualifier",
    "baseline",
    "lengths",
    "qualifier threshold",
    "target threshold",
]
# A gain below this is within what the model and the measurement are wrong by: it limits nothing.
WORTH = 1.03
TARGET = "target"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that could be otherwise, and the speed then.

    Attributes:
        kind: the lowest tier ("draft") or the middle one ("qualifier speed") in half its time; "verification" of any
            width in the time of one token; without the "qualifier"; with an "added qualifier"; the "baseline" without
            speculation; other "lengths"; another "qualifier threshold" or "target threshold".
        setting: the options that make it; None where no option does, but another model or another kernel would.
        tokens_per_second: as the model has it.
        gain: that over the model's speed of what is set now.
    """

    kind: Kind
    setting: Setting | None
    tokens_per_second: float
    gain: float


@dataclass(frozen=True, slots=True)
class Model:
    """Everything that the throughput model knows of a pyramid.

    Attributes:
        tiers: how many there are.
        costs: seconds of passes, and of what comes beside them.
        acceptance: of a setting, the alphas of its stages.
        thresholds: by option, those worth a look, ascending.
        common: options of `generate` that all settings share.
        host_control: who ends an inner round.
    """

    tiers: int
    costs: Costs
    acceptance: Callable[[Setting], tuple[float, ...]]
    thresholds: Mapping[str, Sequence[float]]
    common: Mapping[str, Any]
    host_control: bool

    def plan(self, setting: Setting) -> tuple[RoundPlan, tuple[int, ...]]:
        """The plan of a setting, and the levels of its tiers in the pyramid."""
        plan = setting.plan(self.common, host_control=self.host_control)
        return plan, tiers_of(setting.method, self.tiers)

    def chain(self, setting: Setting) -> Chain:
        """The chain of a setting with its speeds and acceptances."""
        plan, levels = self.plan(setting)
        passes = tuple(
            self.costs.curves[level].scaled(1.0, beside=getattr(self.costs, kind))
            for level, kind in zip(levels, kinds_of(plan.rules), strict=True)
        )
        alphas = self.acceptance(setting) if plan.rules else ()
        return Chain(passes, alphas, plan.lengths, plan.inner_rounds)

    def speed(self, setting: Setting) -> float:
        """Tokens per second of a setting."""
        return throughput(self.chain(setting)).tokens_per_second

    def fastest(self, settings: Iterator[Setting]) -> Setting:
        """The fastest of some settings."""
        return max(settings, key=self.speed)


def changes(model: Model, current: Setting) -> list[Change]:
    """Every change that the model can price, the largest gain first.

    Args:
        current: the setting that is on now, of two tiers or more. What makes tiers faster leaves its lengths alone.
    """
    chain, now = model.chain(current), model.speed(current)

    def changed(kind: Kind, speed: float, setting: Setting | None = None) -> Change:
        return Change(kind, setting, speed, speed / now)

    found = [changed(kind, throughput(other).tokens_per_second) for kind, other in _faster_tiers(chain)]
    settings: list[tuple[Kind, Setting]] = [
        ("baseline", Setting(BASELINE)),
        ("lengths", model.fastest(with_lengths(current))),
        *_thresholds(model, current),
    ]
    if TIERS_NEEDED[current.method] > 2:
        settings.append(("qualifier", model.fastest(with_lengths(without_qualifier(current)))))
    elif model.tiers > 2 and current.lossless:
        added = Setting("psd", 1, 1, 0.0)
        settings.append(("added qualifier", model.fastest(with_lengths(added))))
    found += [
        changed(kind, model.speed(setting), setting) for kind, setting in settings if setting != current
    ]
    return sorted(found, key=lambda change: -change.gain)


def limit(found: Sequence[Change]) -> str:
    """The kind of the change that would gain most; "target" where none is worth it: its own passes are the limit."""
    best = max(found, key=lambda change: change.gain)
    return best.kind if best.gain >= WORTH else TARGET


def without_qualifier(setting: Setting) -> Setting:
    """The setting of two tiers whose output is promised what this one's is."""
    if setting.lossless:
        return Setting("sd", setting.draft_length)
    return Setting("fsd", setting.draft_length, target_threshold=setting.target_threshold)


def with_lengths(setting: Setting) -> Iterator[Setting]:
    """The same setting with all lengths that are worth a look, its own included."""
    yield setting
    if "qualifier_length" in DEPENDS_ON[setting.method]:
        for draft, qualifier in product(DRAFT_LENGTHS_OF_THREE, QUALIFIER_LENGTHS):
            yield replace(setting, draft_length=draft, qualifier_length=qualifier)
    else:
        yield from (replace(setting, draft_length=draft) for draft in DRAFT_LENGTHS_OF_TWO)


def _faster_tiers(chain: Chain) -> Iterator[tuple[Kind, Chain]]:
    yield "draft", chain.with_passes(0, chain.passes[0].scaled(0.5))
    for level in range(1, len(chain.passes) - 1):
        yield "qualifier speed", chain.with_passes(level, chain.passes[level].scaled(0.5))
    flat = (chain.passes[0], *(curve.flat() for curve in chain.passes[1:]))
    yield "verification", replace(chain, passes=flat)


def _thresholds(model: Model, current: Setting) -> list[tuple[Kind, Setting]]:
    """Other thresholds: of a lossless method the fastest one, of a lossy one the next above.

    A lossy method gets faster with every step, and further from the target: how far is not the model's to say.
    """
    found: dict[Kind, list[Setting]] = {}
    if current.qualifier_threshold is not None:
        values = model.thresholds.get("qualifier_threshold", ())
        found["qualifier threshold"] = [
            replace(current, qualifier_threshold=value)
            for value in _worth_a_look(values, current.qualifier_threshold, lossy=not current.lossless)
        ]
    if current.target_threshold is not None:
        values = model.thresholds.get("target_threshold", ())
        found["target threshold"] = [
            replace(current, target_threshold=value)
            for value in _worth_a_look(values, current.target_threshold, lossy=True)
        ]
    return [(kind, model.fastest(iter(others))) for kind, others in found.items() if others]


def _worth_a_look(values: Sequence[float], now: float, *, lossy: bool) -> list[float]:
    return [value for value in values if value > now][:1] if lossy else [v for v in values if v != now]
