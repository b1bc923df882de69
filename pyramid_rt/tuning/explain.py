"""The limits of a pyramid: speeds and acceptances measured in a short run, and the throughput model on them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pyramid_rt import checks
from pyramid_rt.decoding.methods import best_method, tiers_of
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.errors import InputError
from pyramid_rt.params import SamplingParams
from pyramid_rt.pyramid import CHAIN
from pyramid_rt.text.encoding import encode_prompt
from pyramid_rt.tuning.candidates import DEPENDS_ON, thresholds
from pyramid_rt.tuning.compare import BASELINE
from pyramid_rt.tuning.limits import Change, Model, changes, limit, with_lengths, without_qualifier
from pyramid_rt.tuning.replay import Costs, Setting, Trace, replay, standing
from pyramid_rt.tuning.search import Session, TuneOptions, Written, check_measurable
from pyramid_rt.tuning.throughput import Throughput, alpha_of, throughput
from pyramid_rt.tuning.turns import Now, Turns

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Prompt, Pyramid


@dataclass(frozen=True, slots=True)
class StageRun:
    """One stage of a setting in the run.

    Attributes:
        proposing, verifying: names of its tiers.
        proposed: tokens in a proposal on average. tokens: those that a verify gave, correction or bonus included.
        beta: tokens / (proposed + 1). alpha: the chance of one token at which the model gives the same.
    """

    proposing: str
    verifying: str
    proposed: float
    tokens: float
    beta: float
    alpha: float


@dataclass(frozen=True, slots=True)
class Compared:
    """A setting that was run, in tokens per second of decoding, prompts left out.

    Attributes:
        setting: whose.
        predicted: by the throughput model. replayed: by the replay of `tune`, in which agreement may come in runs.
        measured: the median over the repeats.
        stages: lowest first; none of the baseline.
    """

    setting: Setting
    predicted: float
    replayed: float
    measured: float
    stages: tuple[StageRun, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The outcome: speeds, acceptances, and what limits a pyramid.

    Attributes:
        tiers: names of the pyramid's tiers, small to large.
        setting: that is explained. names: of its chain's tiers.
        common: options of `generate` that all settings shared.
        costs: seconds of passes by their width, and of what comes beside them.
        model: the model's word on the setting.
        changes: what could be otherwise, the largest gain first.
        limit: the kind of the first change; "target" where none gains anything worth it.
        run: the baseline, the setting, and the best without the qualifier: model beside measurement.
        prompts, length, repeats: how much was run.
    """

    tiers: tuple[str, ...]
    setting: Setting
    names: tuple[str, ...]
    common: Mapping[str, Any]
    costs: Costs
    model: Throughput
    changes: tuple[Change, ...]
    limit: str
    run: tuple[Compared, ...]
    prompts: int
    length: int
    repeats: int

    @property
    def fewer(self) -> Change:
        """The fastest way with fewer tiers."""
        return next(change for change in self.changes if change.kind in ("qualifier", "baseline"))


def explain(
    pyramid: Pyramid,
    prompts: Sequence[Prompt],
    *,
    method: str | None = None,
    max_new_tokens: int = 64,
    repeats: int = 3,
    budget: float = 60.0,
    clock: Now | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Explanation:
    """Measure a pyramid on prompts and say what limits its speed.

    Args:
        pyramid: with two tiers or more. Nobody else may use it meanwhile.
        prompts: as `generate` takes them, at least one; texts like those that it is to be fast on.
        method: that is explained; by default the pyramid's own, or where that is `ar` the best lossless one.
            Lengths, thresholds and sampling are the pyramid's defaults.
        max_new_tokens: length of each output, >= 2. repeats: how often the settings are run. budget: seconds.
        clock: seconds; by default the host's, after the device has finished.
        on_step: called with what is being done.

    Raises:
        InputError: the pyramid has one tier, the method proposes nothing or needs more tiers, or there is no prompt.
    """
    prompts = checks.sequence("prompts", prompts, "prompts")
    check_measurable(pyramid, prompts, "explain prices")
    setting = _setting(pyramid, method)
    options = TuneOptions(
        max_new_tokens=max_new_tokens, repeats=repeats, budget=budget, lossy=not setting.lossless
    )
    ids = [encode_prompt(prompt, pyramid.tokenizer, pyramid.vocab_size).ids for prompt in prompts]
    for place, prompt in enumerate(ids):
        if not 0 < len(prompt) <= pyramid.max_seq - 2:
            raise InputError(
                f"prompts[{place}] has {len(prompt)} tokens, expected 1 to {pyramid.max_seq - 2}: "
                f"max_seq is {pyramid.max_seq}"
            )
    kept, pyramid.prefix_reuse = pyramid.prefix_reuse, False
    try:
        session = Session.begin(pyramid, options, clock, on_step)
        session.measure(ids)
        return _explained(session, setting)
    finally:
        pyramid.prefix_reuse = kept


def _setting(pyramid: Pyramid, method: str | None) -> Setting:
    """The setting of a call by this method without further options."""
    if method is None:
        method = pyramid.default_method
        method = best_method(len(pyramid.tiers)) if method == BASELINE else method
    if method in (CHAIN, BASELINE) or method not in DEPENDS_ON:
        named = [name for name in DEPENDS_ON if name != BASELINE]
        raise InputError(f"method must be one of {', '.join(named)}, found {checks.shown(method)}")
    tiers_of(method, len(pyramid.tiers))
    params = SamplingParams.build({}, pyramid.defaults_of(method))
    return Setting(method, **{name: getattr(params, name) for name in DEPENDS_ON[method]})


def _explained(session: Session, setting: Setting) -> Explanation:
    pyramid = session.pyramid
    names = tuple(tier.name for tier in pyramid.tiers)
    levels = tiers_of(setting.method, len(names))
    acceptances = _Acceptances(session)
    model = Model(
        tiers=len(names),
        costs=session.costs,
        acceptance=acceptances,
        thresholds={
            "qualifier_threshold": [0.0, *thresholds(session.traces, (0, 1))],
            "target_threshold": thresholds(session.traces, (levels[-2], levels[-1])),
        },
        common=session.common,
        host_control=pyramid.control == "host",
    )
    settings = [Setting(BASELINE), setting]
    if len(levels) > 2:
        settings.append(model.fastest(with_lengths(without_qualifier(setting))))
    race = session.race(settings)
    stages = [_stages(one, race, place, names) for place, one in enumerate(settings)]
    for one, its_stages in zip(settings[1:], stages[1:], strict=True):
        acceptances.hold(one, [stage.alpha for stage in its_stages])
    found = tuple(changes(model, setting))
    return Explanation(
        tiers=names,
        setting=setting,
        names=tuple(names[level] for level in levels),
        common=session.common,
        costs=session.costs,
        model=throughput(model.chain(setting)),
        changes=found,
        limit=limit(found),
        run=tuple(
            Compared(
                one,
                model.speed(one),
                _replayed(session, one),
                _measured(session, one, race, place),
                stages[place],
            )
            for place, one in enumerate(settings)
        ),
        prompts=race.prompts,
        length=session.length,
        repeats=len(race.repeats),
    )


class _Acceptances:
    """Alphas of any setting: from what the tiers said after the recorded text, held to those that were run.

    In a run a tier also speaks after tokens that the text does not have. Where a method was run, the chances of
    falling are scaled by what was found there over what the text says.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[Setting, tuple[float, ...]] = {}
        self._scales: dict[str, list[float]] = {}

    def __call__(self, setting: Setting) -> tuple[float, ...]:
        scales = self._scales.get(setting.method)
        said = self._said(setting)
        if scales is None:
            return said
        return tuple(max(0.0, 1 - (1 - alpha) * scale) for alpha, scale in zip(said, scales, strict=True))

    def hold(self, setting: Setting, alphas: Sequence[float]) -> None:
        """These were found in the run."""
        pairs = zip(self._said(setting), alphas, strict=True)
        self._scales[setting.method] = [
            (1 - found) / (1 - said) if said < 1 else 1.0 for said, found in pairs
        ]

    def _said(self, setting: Setting) -> tuple[float, ...]:
        # Lengths do not matter, and are most of what settings differ by.
        key = Setting(setting.method, 1, 1, setting.qualifier_threshold, setting.target_threshold)
        if key not in self._known:
            plan, levels = self._session.chain(setting)
            self._known[key] = recorded_alphas(self._session.traces, plan.rules, levels)
        return self._known[key]


def recorded_alphas(
    traces: Sequence[Trace], rules: Sequence[Rule], levels: Sequence[int]
) -> tuple[float, ...]:
    """Per stage, the share of places where the token that comes up from below stands.

    Args:
        traces: what every tier of the pyramid said. rules: of the chain. levels: of its tiers in the pyramid.
    """
    stood = [0] * len(rules)
    for trace in traces:
        stages = [
            (standing(rule, trace, pair), trace.own[pair[1]])
            for rule, pair in zip(rules, pairwise(levels), strict=True)
        ]
        for place in range(1, trace.length):  # prefill has given the first
            token = trace.own[levels[0]][place]
            for stage, ((close, match), own) in enumerate(stages):
                if close[place] or (match and token == own[place]):
                    stood[stage] += 1
                else:
                    token = own[place]
    places = sum(trace.length - 1 for trace in traces)
    return tuple(count / places for count in stood)


def _stages(setting: Setting, race: Turns[Written], place: int, names: Sequence[str]) -> tuple[StageRun, ...]:
    """The stages of a setting in its runs; counts are the same in every repeat."""
    every = [run.outcome.stats["tiers"] for run in race.runs(place)]
    chain = [names[level] for level in tiers_of(setting.method, len(names))]
    found = []
    for stage, (below, above) in enumerate(pairwise(chain)):
        proposed = sum(tiers[stage]["proposed"] for tiers in every)
        verifies = sum(tiers[stage + 1]["forwards"] for tiers in every)
        tokens = sum(
            (tiers[stage]["block_efficiency"] or 0.0)
            * (tiers[stage]["proposed"] + tiers[stage + 1]["forwards"])
            for tiers in every
        )
        verifies = max(verifies, 1)
        proposal, gives = proposed / verifies, tokens / verifies
        found.append(
            StageRun(below, above, proposal, gives, gives / (proposal + 1), alpha_of(gives, proposal))
        )
    return tuple(found)


def _measured(session: Session, setting: Setting, race: Turns[Written], place: int) -> float:
    """Tokens after the first per second, without the seconds of prompts."""
    levels = tiers_of(setting.method, len(session.costs.curves))
    prompts = sum(session.costs.prefill[level][index] for level in levels for index in range(race.prompts))
    rates = []
    for repeat in range(len(race.repeats)):
        runs = race.runs(place, repeat)
        seconds = sum(run.seconds for run in runs)
        tokens = sum(run.outcome.count() - 1 for run in runs)
        rates.append(tokens / (seconds - prompts if seconds > prompts else seconds))
    return statistics.median(rates)


def _replayed(session: Session, setting: Setting) -> float:
    """The same as the replay has it."""
    plan, levels = session.chain(setting)
    done = [replay(trace, plan, levels) for trace in session.traces]
    seconds = sum(session.costs.decoding(one, plan, levels) for one in done)
    return sum(one.committed for one in done) / seconds
