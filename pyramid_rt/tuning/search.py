"""The search behind ``tune``: measure, predict every setting, really run the best few, choose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pyramid_rt import checks
from pyramid_rt.decoding.methods import TIERS_NEEDED, tiers_of
from pyramid_rt.decoding.proposers import ProposerTier
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.errors import InputError
from pyramid_rt.loading.defaults import NOTHING_TO_TUNE
from pyramid_rt.params import SamplingParams
from pyramid_rt.pyramid import CHAIN, ENGINES_KEPT
from pyramid_rt.tuning.candidates import DEPENDS_ON, finalists, settings, widest
from pyramid_rt.tuning.compare import BASELINE, WARM_UP_TOKENS
from pyramid_rt.tuning.measuring import Probe, calibrated, device_clock, record, time_passes
from pyramid_rt.tuning.replay import Costs, Prediction, Setting, Trace, predict, replay
from pyramid_rt.tuning.turns import Now, Timed, Turns, take_turns, timed

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid

PROBE_PROMPTS = 3
SEARCH_TOKENS = 500
LEAST_TOKENS = 16
SPARE = 1.1  # for what the model may be wrong by when it says how long the finalists will take
LOSSY_GAIN = 1.05
# The share of the budget that one text of the target may take; texts are shortened to that.
ONE_TEXT_SHARE = 0.1
# Shares of the budget after which a stage begins nothing further.
TEXT_SHARE, PASSES_SHARE, PROBE_SHARE = 0.25, 0.35, 0.45
# Options of `generate` that are the same for all settings.
UNIT = ("divergence", "divergence_on")  # what a threshold belongs to
COMMON = (*UNIT, "lossless_rule", "temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """The extent of a search, and its time.

    Attributes:
        max_new_tokens: length of each output, >= 2; an end-of-sequence ends it earlier.
        repeats: how often the finalists are measured, >= 1.
        budget: seconds for everything, > 0. Texts are shortened, prompts, finalists and repeats left out to keep
            to it; what is then left is measured once, even if that takes longer.
        common: those of `COMMON` that are not to be the pyramid's defaults.
        lossy: consider `fsd`, `psd_a` and `psd_f` too.
        max_differs: for lossy methods, the largest share of tokens that are not the target's own, in 0..1.
    """

    max_new_tokens: int = 96
    repeats: int = 3
    budget: float = 120.0
    common: Mapping[str, Any] = field(default_factory=dict)
    lossy: bool = False
    max_differs: float = 0.1

    def __post_init__(self) -> None:
        checked = {
            "max_new_tokens": checks.whole("max_new_tokens", self.max_new_tokens),
            "repeats": checks.whole("repeats", self.repeats),
            "budget": checks.number("budget", self.budget, infinite=True),
            "lossy": checks.flag("lossy", self.lossy),
            "max_differs": checks.number("max_differs", self.max_differs, infinite=True),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        _check("common", self.common, "options by their names", isinstance(self.common, Mapping))
        _check("max_new_tokens", self.max_new_tokens, ">= 2", self.max_new_tokens >= 2)
        _check("repeats", self.repeats, ">= 1", self.repeats >= 1)
        _check("budget", self.budget, "> 0 and finite", 0 < self.budget < math.inf)
        _check("max_differs", self.max_differs, "in 0..1", 0 <= self.max_differs <= 1)


@dataclass(frozen=True, slots=True)
class Row:
    """One finalist: what the model said of it and what it did.

    Attributes:
        prediction: with the setting.
        tokens_per_second: new tokens over seconds, prompts included; the median over the repeats.
        ratio: the median over the repeats of its tokens per second over the baseline's of that repeat.
        tokens_per_target_forward: over all prompts, without the tokens that prefill gave.
        acceptance: accepted over proposed, by name of proposing tier; None where nothing was proposed.
        differs: share of tokens that are not the target's own; None for a lossless method.
        unequal: prompts whose tokens are not those of the baseline; None where they need not be.
        current: it is what the pyramid's defaults say now.
    """

    prediction: Prediction
    tokens_per_second: float
    ratio: float
    tokens_per_target_forward: float | None
    acceptance: dict[str, float | None]
    differs: float | None
    unequal: int | None
    current: bool

    @property
    def setting(self) -> Setting:
        return self.prediction.setting


@dataclass(frozen=True, slots=True)
class Tuning:
    """The outcome.

    Attributes:
        options: what was asked for.
        common: options of `generate` that all settings shared, the defaults included.
        tiers: their names, small to large.
        costs, traces: what was measured; traces by prompt that was used.
        considered: every setting the model looked at, on the first traces, fastest first.
        rows: those that were run, `ar` first.
        length: most tokens of each output, fewer than asked for where the budget is small.
        prompts: how many prompts the rows were measured on, of `prompts_given`; after `prompts_silent` of those the
            target ended its text at once.
        repeats: how often.
        chosen: the fastest row that is allowed.
    """

    options: TuneOptions
    common: Mapping[str, Any]
    tiers: tuple[str, ...]
    costs: Costs
    traces: tuple[Trace, ...]
    considered: tuple[Prediction, ...]
    rows: tuple[Row, ...]
    length: int
    prompts: int
    prompts_given: int
    prompts_silent: int
    repeats: int
    chosen: Row

    def defaults(self) -> dict[str, Any]:
        """The defaults that `pyramid.json` should hold; a threshold comes with the divergence it belongs to."""
        wanted = self.chosen.setting.options()
        if any(name.endswith("threshold") for name in wanted):
            wanted |= {name: self.common[name] for name in UNIT}
        return wanted


def tune(
    pyramid: Pyramid,
    prompts: Sequence[Sequence[int]],
    options: TuneOptions,
    *,
    clock: Now | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Tuning:
    """Find the fastest setting for a pyramid on prompts.

    Args:
        pyramid: with two tiers or more. Nobody else may use it meanwhile.
        prompts: token ids of each; at least one, all of them shorter than the context.
        options: what to search.
        clock: seconds; by default the host's, after the device has finished.
        on_step: called with what is being done.

    Raises:
        InputError: the pyramid has one tier, there is no prompt, or the target ends every text at once.
    """
    check_measurable(pyramid, prompts, "tune prices")
    kept, pyramid.prefix_reuse = pyramid.prefix_reuse, False
    try:
        return Session.begin(pyramid, options, clock, on_step).run(prompts)
    finally:
        pyramid.prefix_reuse = kept


def check_measurable(pyramid: Pyramid, prompts: Sequence[object], does: str) -> None:
    """Refuse what the model of speeds cannot price; `does` says in an error who wants it, as "tune prices".

    Raises InputError: the pyramid has one tier, or a proposer that is no model, or there is no prompt.
    """
    for tier in pyramid.tiers[:1]:
        if isinstance(tier, ProposerTier):
            raise InputError(f"{tier.name!r} is a proposer: {does} chains of models only")
    if len(pyramid.tiers) < 2:
        raise InputError(NOTHING_TO_TUNE)
    if not prompts:
        raise InputError("prompts: expected at least one, found none")


class Session:
    """One search: the pyramid, whose `prefix_reuse` must be off, the clock, and what was found so far."""

    def __init__(
        self, pyramid: Pyramid, options: TuneOptions, clock: Now, on_step: Callable[[str], None]
    ) -> None:
        self.pyramid, self.options, self.clock, self.on_step = pyramid, options, clock, on_step
        params = SamplingParams.build(options.common, pyramid.defaults)
        self.common = {name: getattr(params, name) for name in COMMON}
        self.length, self.silent = options.max_new_tokens, 0
        self.began = clock()

    @classmethod
    def begin(
        cls,
        pyramid: Pyramid,
        options: TuneOptions,
        clock: Now | None,
        on_step: Callable[[str], None] | None,
    ) -> Session:
        """A session from now on; arguments as of `tune`."""
        return cls(pyramid, options, clock or device_clock(pyramid.place), on_step or (lambda _: None))

    def measure(self, given: Sequence[Sequence[int]]) -> None:
        """Fill in prompts, traces and costs: what tiers say after prompts, and what passes take.

        Raises InputError: the target ends every text at once.
        """
        self.on_step("the target's own text")
        texts = self._texts(given)
        if not texts:
            raise InputError("prompts: the target ends every text within two tokens; nothing can be measured")
        self.prompts = [list(given[text.prompt]) for text in texts]
        self.on_step("what the tiers say")
        recorded = [
            record(self.pyramid, prompt, text.tokens, self._params(seed), self.clock)
            for seed, (prompt, text) in enumerate(zip(self.prompts, texts, strict=True))
        ]
        self.traces = tuple(trace for trace, _ in recorded)
        self.on_step("seconds of forward passes")
        curves = time_passes(
            self.pyramid,
            [*self.prompts[-1], *texts[-1].tokens],
            widest(len(self.pyramid.tiers)),
            self.clock,
            self.began + PASSES_SHARE * self.options.budget,
        )
        self.costs = Costs(curves, tuple(zip(*(seconds for _, seconds in recorded), strict=True)))
        self.costs = calibrated(self.costs, self._probes())

    def run(self, given: Sequence[Sequence[int]]) -> Tuning:
        """The whole search."""
        self.measure(given)
        self.on_step("the model")
        shown = self._some_traces()
        considered = [self._predict(s, shown) for s in settings(self.traces, self.options.lossy)]
        considered.sort(key=lambda prediction: -prediction.tokens_per_second)
        current = self._current()
        now = None if current is None else self._predict(current, shown)
        chosen = finalists(considered, now, self.options.max_differs)
        contenders = self._affordable([self._predict(one.setting, self.traces) for one in chosen])
        race = self.race([one.setting for one in contenders])
        rows = tuple(self._row(one, race, place, current) for place, one in enumerate(contenders))
        return Tuning(
            options=self.options,
            common=self.common,
            tiers=tuple(tier.name for tier in self.pyramid.tiers),
            costs=self.costs,
            traces=self.traces,
            considered=tuple(considered),
            rows=rows,
            length=self.length,
            prompts=race.prompts,
            prompts_given=len(given),
            prompts_silent=self.silent,
            repeats=len(race.repeats),
            chosen=choose(rows, self.options.max_differs),
        )

    # Running the pyramid

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams.build({**self.common, "seed": seed})

    def _run(self, prompt: Sequence[int], setting: Setting, seed: int, tokens: int | None = None) -> Written:
        """One generation; `tokens` where it is no more than a warm-up."""
        result = self.pyramid.generate(
            list(prompt),
            **{**self.common, **setting.options()},
            max_new_tokens=min(tokens or self.length, self.length),
            inner_rounds=None,
            seed=seed,
            ignore_eos=tokens is not None,  # what warms up need not make sense
        )
        return Written(result.tokens, result.stats.to_dict())

    def _turn(self, setting: Setting, place: int) -> Written:
        """A setting on the prompt at this place, whose seed that is too."""
        return self._run(self.prompts[place], setting, place)

    def _late(self, share: float, spare: float = 0.0) -> bool:
        return self.clock() - self.began + spare > share * self.options.budget

    def _texts(self, given: Sequence[Sequence[int]]) -> list[_Text]:
        """The target's texts after as many prompts as the time allows."""
        baseline = Setting(BASELINE)
        # No clock may see a tier's first pass, which compiles and fills caches.
        for setting in self._probed():
            self._run(given[0], setting, 0, WARM_UP_TOKENS)
        short = timed(self.clock, lambda: self._run(given[0], baseline, 0, WARM_UP_TOKENS))
        affordable = ONE_TEXT_SHARE * self.options.budget * len(short.outcome.tokens) / short.seconds
        self.length = min(self.length, max(LEAST_TOKENS, int(affordable)))
        texts: list[_Text] = []
        for index, prompt in enumerate(given):
            if texts and self._late(TEXT_SHARE):
                break
            run = self._run(prompt, baseline, len(texts))
            if len(run.tokens) > 1:
                texts.append(_Text(index, run.tokens))
            else:
                self.silent += 1
        return texts

    def _probed(self) -> list[Setting]:
        """A few settings that run every tier and, between them, every rule that the search is about."""
        settings = [Setting(BASELINE), Setting("sd", 2), Setting("sd", 6)]
        if len(self.pyramid.tiers) > 2:
            settings.append(Setting("psd", 3, 4, 0.0))
        elif self.options.lossy:
            settings.append(Setting("fsd", 4, target_threshold=0.0))
        return settings

    def _probes(self) -> list[Probe]:
        """Timed generations of these, taking turns, from which the costs are calibrated."""
        settings = self._probed()
        turns = take_turns(
            [partial(self._turn, setting) for setting in settings],
            range(len(self.prompts[:PROBE_PROMPTS])),
            1,
            tokens=Written.count,
            clock=self.clock,
            goes_on=lambda repeat, index, longest: not self._late(PROBE_SHARE),
        )
        return [self._probe(setting, turns.runs(place)) for place, setting in enumerate(settings)]

    def _probe(self, setting: Setting, runs: Sequence[Timed[Written]]) -> Probe:
        """The costs of a setting as its runs on the first prompts show them."""
        plan, levels = self.chain(setting)
        done = [replay(trace, plan, levels) for trace in self.traces[: len(runs)]]
        passes = [sum((one.passes[place] for one in done), Counter()) for place in range(len(levels))]
        replayed = [tier.total() for tier in passes]
        counted = replayed
        if plan.host_control:  # else the statistics leave out passes that were made and not needed
            counted = [
                sum(run.outcome.stats["tiers"][place]["forwards"] for run in runs)
                for place in range(len(levels))
            ]
        priced = zip(self.costs.forwards(passes, levels), counted, replayed, strict=True)
        prefill = sum(self.costs.prefill[level][index] for level in levels for index in range(len(runs)))
        return Probe(
            plan=plan,
            levels=levels,
            seconds=sum(run.seconds for run in runs) - prefill,
            forwards=_seconds_of_tiers(runs),
            priced=tuple(price * count / total for price, count, total in priced),
            passes=tuple(counted),
        )

    # The model

    def chain(self, setting: Setting) -> tuple[RoundPlan, tuple[int, ...]]:
        plan = setting.plan(self.common, host_control=self.pyramid.control == "host")
        return plan, tiers_of(setting.method, len(self.pyramid.tiers))

    def _predict(self, setting: Setting, traces: Sequence[Trace]) -> Prediction:
        return predict(setting, traces, self.costs, *self.chain(setting))

    def _some_traces(self) -> tuple[Trace, ...]:
        """The first traces, of `SEARCH_TOKENS` or a little more: thousands of settings are replayed on them."""
        lengths = accumulate(trace.length for trace in self.traces)
        enough = next((count for count, length in enumerate(lengths, 1) if length >= SEARCH_TOKENS), None)
        return self.traces[:enough]

    def _current(self) -> Setting | None:
        """The setting of a call without options, where the search can say it and may choose it."""
        method = self.pyramid.default_method
        defaults = self.pyramid.defaults_of(method)
        if method == CHAIN or ("inner_rounds" in defaults and TIERS_NEEDED[method] > 2):
            return None
        params = SamplingParams.build({}, defaults)
        setting = Setting(method, **{name: getattr(params, name) for name in DEPENDS_ON[method]})
        fuzzy = setting.qualifier_threshold is not None or setting.target_threshold is not None
        if fuzzy and any(getattr(params, name) != self.common[name] for name in UNIT):
            return None  # its thresholds belong to another divergence
        return setting if setting.lossless or self.options.lossy else None

    # Side by side

    def race(self, contenders: Sequence[Setting]) -> Turns[Written]:
        """Run the contenders on every prompt, taking turns, as often as asked for and the time allows."""
        for setting in contenders:
            self._run(self.prompts[0], setting, 0, WARM_UP_TOKENS)

        def before(repeat: int, place: int, prompt: int) -> None:
            self.on_step(f"{contenders[place].method}, repeat {repeat + 1}")
            if (
                len(contenders) > ENGINES_KEPT
            ):  # then its engine has to be made anew, which is not to be timed
                self._run(self.prompts[prompt], contenders[place], prompt, WARM_UP_TOKENS)

        return take_turns(
            [partial(self._turn, setting) for setting in contenders],
            range(len(self.prompts)),
            self.options.repeats,
            tokens=Written.count,
            clock=self.clock,
            before=before,
            goes_on=lambda repeat, index, longest: not self._late(1.0, longest),
        )

    def _affordable(self, contenders: Sequence[Prediction]) -> list[Prediction]:
        """The first contenders, two of them at least, that can be warmed up and run on one prompt in time."""
        turns = 1 + 2 * min(1.0, WARM_UP_TOKENS / self.traces[0].length)
        kept: list[Prediction] = []
        needed = 0.0
        for contender in contenders:
            needed += SPARE * turns * contender.seconds[0]
            if len(kept) > 1 and self._late(1.0, needed):
                break
            kept.append(contender)
        return kept

    def _row(self, prediction: Prediction, race: Turns[Written], place: int, current: Setting | None) -> Row:
        runs = [run.outcome for run in race.runs(place)]
        setting = prediction.setting
        own = setting.lossless and (
            self.common["lossless_rule"] == "match" or self.common["temperature"] == 0
        )
        baseline = [run.outcome.tokens for run in race.runs(0)]
        forwards = sum(run.stats["tiers"][-1]["forwards"] for run in runs)
        later = sum(len(run.tokens) - 1 for run in runs)
        differing = sum((run.stats["differs"] or 0.0) * (len(run.tokens) - 1) for run in runs)
        return Row(
            prediction=prediction,
            tokens_per_second=race.rate(place),
            ratio=race.ratio(place, 0),
            tokens_per_target_forward=later / forwards if forwards else None,
            acceptance=_acceptance(runs),
            differs=None if setting.lossless else differing / later if later else 0.0,
            unequal=sum(run.tokens != other for run, other in zip(runs, baseline, strict=True))
            if own
            else None,
            current=setting == current,
        )


@dataclass(frozen=True, slots=True)
class Written:
    """One generation: its new tokens and its statistics."""

    tokens: list[int]
    stats: dict[str, Any]

    def count(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class _Text:
    """The target's text after a prompt, by the prompt's place among those given."""

    prompt: int
    tokens: list[int]


def _seconds_of_tiers(runs: Sequence[Timed[Written]]) -> tuple[float, ...] | None:
    """Per tier, the seconds of its passes in all runs; None where they are not known."""
    every = [run.outcome.stats["tiers"] for run in runs]
    by_tier = [[tier["seconds"] for tier in tiers] for tiers in zip(*every, strict=True)]
    if any(seconds is None for tier in by_tier for seconds in tier):
        return None
    return tuple(map(sum, by_tier))


def _acceptance(runs: Sequence[Written]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for tiers in zip(*(run.stats["tiers"][:-1] for run in runs), strict=True):
        proposed = sum(tier["proposed"] for tier in tiers)
        found[tiers[0]["name"]] = sum(tier["accepted"] for tier in tiers) / proposed if proposed else None
    return found


def choose(rows: Sequence[Row], max_differs: float) -> Row:
    """The row with the highest ratio to the baseline.

    A lossy one must keep to `max_differs`, and be faster than the best lossless one by the factor `LOSSY_GAIN`:
    the noise of a measurement is no reason to give up the target's own text.
    """
    best = max((row for row in rows if row.differs is None), key=lambda row: row.ratio)
    lossy = [row for row in rows if row.differs is not None and row.differs <= max_differs]
    fastest = max(lossy, key=lambda row: row.ratio, default=best)
    return fastest if fastest.ratio >= LOSSY_GAIN * best.ratio else best


def _check(name: str, value: object, expected: str, valid: bool) -> None:
    if not valid:
        raise InputError(f"{name} must be {expected}, found {checks.shown(value)}")
