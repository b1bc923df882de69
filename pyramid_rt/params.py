"""The options of one call, validated before any work."""

from __future__ import annotations

import difflib
import math
import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

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
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Everything that a call may ask for. `build` validates; the runtime never sees an unchecked one.

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
        temperature: 0 is greedy. top_k: 0 is off. top_p: in (0, 1]. min_p: in [0, 1].
        seed: 64-bit; None draws one and reports it.
        stop: strings that end the text and are not part of it.
        stop_token_ids: ids that end the text as end-of-sequence does.
        ignore_eos: decode past the model's own end-of-sequence tokens.
        logprobs: report the target's log-probability of each token and this many most likely ones.
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

    @classmethod
    def build(cls, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Merge `options` over `defaults` over the class's own, and validate.

        Raises:
            InputError: an unknown name or a value out of its range; the message names the option.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
                raise InputError(f"unknown option {name!r}{hint}")
        merged = {**(defaults or {}), **options}
        return cls(**_checked(merged))

    def with_seed(self) -> int:
        """The seed, drawn now where none was given."""
        return secrets.randbits(64) if self.seed is None else self.seed

    @property
    def rule_options(self) -> RuleOptions:
        return RuleOptions(
            self.qualifier_threshold,
            self.target_threshold,
            self.divergence,
            self.divergence_on,
            self.lossless_rule,
        )


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every given option in its canonical type, or InputError."""
    checks: dict[str, Callable[[str, Any], Any]] = {
        "max_new_tokens": lambda n, v: _integer(n, v, 0),
        "method": lambda n, v: v if v is None else _choice(n, v, METHODS),
        "draft_length": lambda n, v: _integer(n, v, 1),
        "qualifier_length": lambda n, v: _integer(n, v, 1),
        "lengths": lambda n, v: v if v is None else tuple(_integer(n, x, 1) for x in _sequence(n, v)),
        "inner_rounds": lambda n, v: v if v is None else _integer(n, v, 1),
        "qualifier_threshold": lambda n, v: _number(n, v, ">= 0", lambda x: x >= 0),
        "target_threshold": lambda n, v: _number(n, v, ">= 0", lambda x: x >= 0),
        "divergence": lambda n, v: _choice(n, v, DIVERGENCES),
        "divergence_on": lambda n, v: _choice(n, v, ("raw", "processed")),
        "lossless_rule": lambda n, v: _choice(n, v, LOSSLESS_RULES),
        "temperature": lambda n, v: _number(n, v, "finite and >= 0", lambda x: 0 <= x < math.inf),
        "top_k": lambda n, v: _integer(n, v, 0),
        "top_p": lambda n, v: _number(n, v, "in (0, 1]", lambda x: 0 < x <= 1),
        "min_p": lambda n, v: _number(n, v, "in [0, 1]", lambda x: 0 <= x <= 1),
        "seed": lambda n, v: v if v is None else _integer(n, v, 0, 2**64 - 1),
        "stop": _stops,
        "stop_token_ids": lambda n, v: tuple(_integer(n, x, 0) for x in _sequence(n, v)),
        "ignore_eos": _flag,
        "logprobs": lambda n, v: v if v is None else _integer(n, v, 0),
    }
    return {name: checks[name](name, value) for name, value in options.items()}


def _integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    expected = f">= {least}" if most is None else f"in {least}..{most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        raise InputError(f"{name} must be an integer {expected}, found {value!r}")
    return number


def _number(name: str, value: Any, expected: str, valid: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool | str) or not valid(number):
        raise InputError(f"{name} must be a number {expected}, found {value!r}")
    return number


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")
    return str(value)


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{name} must be a list of integers, found {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, found {value!r}")
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence):
        raise InputError(f"{name} must be a list of strings, found {value!r}")
    check_stops(value)
    return tuple(value)
