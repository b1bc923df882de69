"""The options of one call, validated before any work."""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, Unpack

from pyramid_rt import checks
from pyramid_rt.decoding.methods import LOSSLESS_RULES, METHODS, RuleOptions
from pyramid_rt.errors import InputError
from pyramid_rt.kernels.reference.sampling import DIVERGENCES
from pyramid_rt.text.detokenizer import check_stops


class Options(TypedDict, total=False):
    """Keyword options of `generate` and `stream`; see `SamplingParams` for what each one means."""

    max_new_tokens: int
    method: str | None
    draft_length: int
    qualifier_length: int
    lengths: Sequence[int] | None
    inner_rounds: int | None
    qualifier_threshold: float
    target_threshold: float
    divergence: str
    divergence_on: str
    lossless_rule: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    trace: bool
    add_special_tokens: bool | None
    continue_final_message: bool | None
    heal: bool
    max_time: float | None


# Names that other libraries use for what is called otherwise here.
_ALIASES = {
    "max_new_tokens": (
        "max_tokens", "max_length", "max_completion_tokens", "max_gen_len", "max_output_tokens", "n_predict",
        "num_predict", "n_tokens", "num_tokens",
    ),
    "temperature": ("temp",),
    "seed": ("random_seed", "random_state", "manual_seed"),
    "stop": ("stop_strings", "stop_sequences", "stop_words"),
    "stop_token_ids": ("eos_token_id", "eos_token_ids", "stop_token_id", "stop_tokens"),
    "ignore_eos": ("ignore_eos_token",),
    "max_time": ("timeout", "time_limit", "max_seconds", "deadline"),
    "logprobs": ("top_tokens", "top_logprobs", "n_probs", "num_logprobs", "output_scores"),
    "draft_length": (
        "num_assistant_tokens", "num_speculative_tokens", "speculative_tokens", "num_draft_tokens", "n_draft",
        "draft_max", "gamma", "lookahead",
    ),
}  # fmt: skip
_CALLED_HERE = {other: name for name, others in _ALIASES.items() for other in others}
_PENALTY = "tokens are drawn from the model's own distribution, and no penalties are offered"
_ONE = "one sequence is decoded at a time; call again with another seed for another"
_STREAM = "call stream() instead of generate()"
# Names of what is not offered, and what to do instead.
_NOT_OFFERED = {
    "do_sample": "temperature=0 is greedy, a higher temperature samples",
    "greedy": "temperature=0 is greedy, a higher temperature samples",
    "stream": _STREAM,
    "streamer": _STREAM,
    **dict.fromkeys(("n", "best_of", "num_return_sequences", "num_beams", "beam_width", "batch_size"), _ONE),
    **dict.fromkeys(
        ("repetition_penalty", "repeat_penalty", "presence_penalty", "frequency_penalty", "length_penalty"),
        _PENALTY,
    ),
    **dict.fromkeys(("no_repeat_ngram_size", "logit_bias", "bad_words_ids", "suppress_tokens"), _PENALTY),
    **dict.fromkeys(
        ("typical_p", "top_a", "tfs", "tfs_z", "mirostat", "epsilon_cutoff", "eta_cutoff"),
        "the filters are top_k, top_p and min_p",
    ),
    **dict.fromkeys(
        ("threshold", "thresholds"), "there are two, qualifier_threshold and target_threshold"
    ),
}  # fmt: skip

# Below it the temperature is 0. Noise is at most 26 wide, and float32 logits of size 1 lie 1.2e-7 apart, so that
# noise times a smaller temperature decides nothing; and logits divided by one far smaller leave float32's range.
LEAST_TEMPERATURE = 1e-9
_FLOAT32_TINY = 2.0**-126  # a smaller one may be 0 on a device


@dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """Everything that a call may ask for, checked when it is made.

    `generate(prompt, SamplingParams(temperature=0.7))` is `generate(prompt, temperature=0.7)`: what is not given
    is the pyramid's default. Raises InputError for an unknown name or a value out of its range.

    Attributes:
        max_new_tokens: most tokens to generate, >= 0.
        method: `ar`, `sd`, `fsd`, `psd_a`, `psd_f` or `psd`; None for the pyramid's default.
        draft_length: tokens the draft proposes at a time, >= 1.
        qualifier_length: tokens that must stand at the qualifier before the target verifies, >= 1.
        lengths: all speculation lengths, lowest tier first; for chains of more than three tiers. Overrides
            `draft_length` and `qualifier_length`.
        inner_rounds: a fixed number of inner rounds per outer round instead of "until qualifier_length stand".
            None: until, or under device control the number that reaches qualifier_length.
        qualifier_threshold, target_threshold: of the fuzzy rules, in the unit of `divergence`; thresholds are
            not comparable between kinds of divergence.
        divergence: one of `js`, `js_fsd`, `kl`, `kl_reversed`, `tv`, or `topk_` before one of them.
        divergence_on: `raw` (logits at temperature 1) or `processed` (after temperature and filters).
        lossless_rule: `match` or `rejection`, for the lossless stages of the named methods.
        temperature: 0 is greedy, and so is anything below `LEAST_TEMPERATURE`. top_k: 0 is off. top_p: in (0, 1].
            min_p: in [0, 1].
        seed: 64-bit; None draws one and reports it.
        stop: a string, or several, that end the text and are not part of it.
        stop_token_ids: ids that end the text as end-of-sequence does.
        ignore_eos: decode past the model's own end-of-sequence tokens.
        logprobs: report the target's log-probability of each token and this many most likely ones.
        trace: report for each token which tier proposed it and what each rule said of it; rounds are then read one by
            one, and not captured as graphs. It changes no token.
        add_special_tokens: True: a text gets what the tokenizer adds (as a BOS), a rendered chat too. False: nothing
            is added. None: a text gets it unless it begins with it already, and a chat does not.
        continue_final_message: True: the model goes on with a chat's last message. False: it answers it. None: it
            goes on with the last message where that is the assistant's.
        heal: take back the prompt's last token and let the new text begin with its characters, cut into tokens as
            the model likes it best; see "Prompts and text" in docs/options.md.
        max_time: seconds after which the call ends with what it has, at the end of a round: its wait for other calls
            and the pauses of a stream's reader count. None: as long as it takes.
    """

    max_new_tokens: int = 256
    method: str | None = None
    draft_length: int = 4
    qualifier_length: int = 10
    lengths: tuple[int, ...] | None = None
    inner_rounds: int | None = None
    qualifier_threshold: float = 0.3
    target_threshold: float = 0.4
    divergence: str = "js"
    divergence_on: str = "raw"
    lossless_rule: str = "match"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    trace: bool = False
    add_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    heal: bool = False
    max_time: float | None = None

    given: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def __init__(self, **options: Unpack[Options]) -> None:
        self._fill(options, {})

    @classmethod
    def build(cls, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Merge `options` over `defaults` over the class's own, and validate.

        Raises:
            InputError: an unknown name or a value out of its range; the message names the option.
        """
        params = cls.__new__(cls)
        params._fill(options, defaults or {})
        return params

    def options(self) -> dict[str, Any]:
        """The options that were given, defaults left out."""
        return {name: getattr(self, name) for name in _CHECKS if name in self.given}

    def _fill(self, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        for name in (*options, *defaults):
            if name not in _CHECKS:
                raise InputError(f"unknown option {checks.shown(name)}; {_hint(name)}")
        own = {item.name: item.default for item in fields(self)}
        checked = {name: _CHECKS[name](name, value) for name, value in {**defaults, **options}.items()}
        for name, value in {**own, **checked, "given": frozenset(options)}.items():
            object.__setattr__(self, name, value)

    def with_seed(self) -> int:
        """The seed, drawn now where none was given."""
        return secrets.randbits(64) if self.seed is None else self.seed

    @property
    def filters(self) -> bool:
        """True where top-k, top-p or min-p is on."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def rule_options(self) -> RuleOptions:
        return RuleOptions(
            self.qualifier_threshold,
            self.target_threshold,
            self.divergence,
            self.divergence_on,
            self.lossless_rule,
        )


# Within defaults: those of single methods, by their names.
BY_METHOD = "methods"


@dataclass(frozen=True, slots=True)
class Defaults:
    """Options that calls do not give, some for single methods alone.

    Attributes:
        common: by name, for every method.
        methods: by method, what takes the place of the common ones where it decodes.
    """

    common: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, defaults: Mapping[str, Any] | None) -> Defaults:
        """Checked, from options by name with "methods" among them.

        Raises:
            InputError: they are no such thing, name no method, or an option is unknown or out of range.
        """
        if not isinstance(defaults, Mapping | None):
            raise InputError(f"defaults must be options by name, found {checks.shown(defaults)}")
        common = {name: value for name, value in (defaults or {}).items() if name != BY_METHOD}
        methods = (defaults or {}).get(BY_METHOD, {})
        if not isinstance(methods, Mapping):
            raise InputError(f"{BY_METHOD} must be options by method, found {checks.shown(methods)}")
        made = cls(common, {name: dict(_of_method(name, options)) for name, options in methods.items()})
        SamplingParams.build({}, common)
        for name in made.methods:
            try:
                SamplingParams.build({}, made.of_method(name))
            except InputError as error:
                raise InputError(f"{BY_METHOD}, {name}: {error}") from error
        return made

    def of_method(self, method: str) -> dict[str, Any]:
        """Those of calls that this method decodes. A length of its own comes before a common `inner_rounds`."""
        own = self.methods.get(method, {})
        dropped = {"inner_rounds"} if "qualifier_length" in own else set()
        return {**{name: value for name, value in self.common.items() if name not in dropped}, **own}


def _of_method(method: Any, options: Any) -> Mapping[str, Any]:
    if method not in METHODS:
        raise InputError(f"{BY_METHOD} names {checks.shown(method)}, expected any of {', '.join(METHODS)}")
    if not isinstance(options, Mapping):
        raise InputError(f"{BY_METHOD}, {method}: expected options by name, found {checks.shown(options)}")
    if "method" in options:
        raise InputError(f"{BY_METHOD}, {method}: it sets a method of its own")
    return options


def merged_options(params: SamplingParams | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call: those of `params`, and those given beside it, which come first. Raises InputError."""
    if params is None:
        return dict(options)
    given = checks.instance(
        "params", params, SamplingParams, "SamplingParams, and options are given by name"
    ).options()
    return {**given, **options}


def _hint(name: object) -> str:
    """A hint at what may have been meant by the name of an option that there is not."""
    if name in _NOT_OFFERED:
        return _NOT_OFFERED[str(name)]
    meant = _CALLED_HERE.get(str(name))
    if meant is None:
        meant = next(iter(difflib.get_close_matches(str(name), _CHECKS, 1)), None)
    return f"known are {', '.join(_CHECKS)}" if meant is None else f"did you mean {meant!r}?"


def _integer(low: int) -> _Check:
    """Integers from `low` on that int64 can hold."""

    def check(name: str, value: Any) -> int:
        number = checks.whole(name, value, low)
        if number > checks.INT64_MAX:
            raise InputError(f"{name} must be an integer in {low}..2**63 - 1, found {checks.shown(value)}")
        return number

    return check


def _threshold(name: str, value: Any) -> float:
    number = checks.number(name, value, 0.0, infinite=True)
    if checks.FLOAT32_MAX < number < math.inf:
        raise InputError(f"{name} must be a number >= 0 that float32 can hold, found {checks.shown(value)}")
    return number


def _temperature(name: str, value: Any) -> float:
    number = checks.number(name, value, 0.0)
    if number > checks.FLOAT32_MAX:
        raise InputError(
            f"{name} must be a number finite and >= 0 that float32 can hold, found {checks.shown(value)}"
        )
    return number if number >= LEAST_TEMPERATURE else 0.0


def _top_p(name: str, value: Any) -> float:
    number = checks.number(name, value, above=0.0, high=1.0)
    if number < _FLOAT32_TINY:
        raise InputError(
            f"{name} must be a number in (0, 1] that float32 can hold, found {checks.shown(value)}"
        )
    return number


def _min_p(name: str, value: Any) -> float:
    return checks.number(name, value, 0.0, 1.0)


def _seed(name: str, value: Any) -> int:
    return checks.whole(name, value, 0, 2**64 - 1)


def _choice(choices: Sequence[str]) -> _Check:
    return lambda name, value: checks.choice(name, value, choices)


def _or_none(check: _Check) -> _Check:
    return lambda name, value: None if value is None else check(name, value)


def _integers(low: int) -> _Check:
    one = _integer(low)
    return lambda name, value: tuple(one(name, entry) for entry in checks.sequence(name, value, "integers"))


def _stops(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    given = checks.sequence(name, value, "strings, or a string")
    stops = tuple(checks.unicode_text(name, checks.text(name, stop)) for stop in given)
    check_stops(stops)
    return stops


_Check = Callable[[str, Any], Any]


def _seconds(name: str, value: Any) -> float:
    return checks.number(name, value, above=0.0)


_CHECKS: dict[str, _Check] = {
    "max_new_tokens": _integer(0),
    "method": _or_none(_choice(METHODS)),
    "draft_length": _integer(1),
    "qualifier_length": _integer(1),
    "lengths": _or_none(_integers(1)),
    "inner_rounds": _or_none(_integer(1)),
    "qualifier_threshold": _threshold,
    "target_threshold": _threshold,
    "divergence": _choice(DIVERGENCES),
    "divergence_on": _choice(("raw", "processed")),
    "lossless_rule": _choice(LOSSLESS_RULES),
    "temperature": _temperature,
    "top_k": _integer(0),
    "top_p": _top_p,
    "min_p": _min_p,
    "seed": _or_none(_seed),
    "stop": _stops,
    "stop_token_ids": _integers(0),
    "ignore_eos": checks.flag,
    "logprobs": _or_none(_integer(0)),
    "trace": checks.flag,
    "add_special_tokens": _or_none(checks.flag),
    "continue_final_message": _or_none(checks.flag),
    "heal": checks.flag,
    "max_time": _or_none(_seconds),
}
