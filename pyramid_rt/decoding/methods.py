"""Every decoding method is a configuration of one recursion: which tiers, and which rule between each pair."""

from __future__ import annotations

from dataclasses import dataclass

from pyramid_rt.decoding.rules import Fuzzy, Match, Rejection, Rule
from pyramid_rt.errors import InputError

METHODS = ("ar", "sd", "fsd", "psd_a", "psd_f", "psd")
TIERS_NEEDED = {"ar": 1, "sd": 2, "fsd": 2, "psd_a": 3, "psd_f": 3, "psd": 3}
LOSSLESS_METHODS = ("ar", "sd", "psd")
LOSSLESS_RULES = ("match", "rejection")


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """The options that the rules of a named method are made of; see `SamplingParams` for the fields."""

    qualifier_threshold: float
    target_threshold: float
    divergence: str
    divergence_on: str
    lossless_rule: str


def best_method(tiers: int) -> str:
    """The default of a call that names none: the lossless method that uses the most of `tiers` tiers."""
    return "ar" if tiers == 1 else "sd" if tiers == 2 else "psd"


def methods_for(tiers: int) -> tuple[str, ...]:
    """The named methods that a pyramid of `tiers` tiers can run."""
    return tuple(method for method in METHODS if TIERS_NEEDED[method] <= tiers)


def tiers_of(method: str, available: int) -> tuple[int, ...]:
    """Indices (small to large) of the tiers a method runs on: the smallest, the next, and always the target."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    needed = TIERS_NEEDED[method]
    if needed > available:
        allowed = ", ".join(methods_for(available))
        raise InputError(
            f"method {method!r} needs {needed} tiers and the pyramid has {available}; it can run {allowed}"
        )
    return (*range(needed - 1), available - 1)


def rules_of(method: str, options: RuleOptions) -> tuple[Rule, ...]:
    """The rules between the tiers of a method, lowest stage first."""
    lossless: Rule = Match() if options.lossless_rule == "match" else Rejection()
    kind, on = options.divergence, options.divergence_on
    upper = Fuzzy(options.target_threshold, kind, on)
    lower = Fuzzy(options.qualifier_threshold, kind, on)
    return {
        "ar": (),
        "sd": (lossless,),
        "fsd": (upper,),
        "psd_a": (lossless, upper),
        "psd_f": (lower, upper),
        "psd": (Fuzzy(options.qualifier_threshold, kind, on, or_match=True), lossless),
    }[method]
