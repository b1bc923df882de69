"""The settings that ``tune`` looks at, and those of them that it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

from pyramid_rt.decoding.methods import methods_for
from pyramid_rt.tuning.compare import BASELINE
from pyramid_rt.tuning.replay import Prediction, Setting, Trace

# Lengths beyond these pay only where nearly every token stands.
DRAFT_LENGTHS_OF_TWO = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
DRAFT_LENGTHS_OF_THREE = (1, 2, 3, 4, 5, 6, 8)
QUALIFIER_LENGTHS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20)
# Thresholds are those that let these shares of all positions stand: a number that suits one kind of divergence, or
# one pair of models, says nothing about another. With the last one nothing that was seen falls; how many tokens may
# change is a limit of its own.
SHARES = (0.3, 0.5, 0.65, 0.8, 0.9, 0.97, 1.0)
# Finalists of a method besides its best, and the share of the best of all that they must promise: a measurement on
# a busy machine misprices neighbours by as much.
SPARES = 2
SPARE_CHANCE = 0.8

# The options that each method depends on.
DEPENDS_ON = {
    "ar": (),
    "sd": ("draft_length",),
    "fsd": ("draft_length", "target_threshold"),
    "psd": ("draft_length", "qualifier_length", "qualifier_threshold"),
    "psd_a": ("draft_length", "qualifier_length", "target_threshold"),
    "psd_f": ("draft_length", "qualifier_length", "qualifier_threshold", "target_threshold"),
}


def settings(traces: Sequence[Trace], lossy: bool) -> Iterator[Setting]:
    """Every setting that the model is to price, for a pyramid of as many tiers as the traces have."""
    tiers = len(traces[0].own)
    last = tiers - 1
    upper = thresholds(traces, (1, last)) if tiers > 2 else []
    lower = thresholds(traces, (0, 1)) if tiers > 2 else []
    two, three = DRAFT_LENGTHS_OF_TWO, tuple(product(DRAFT_LENGTHS_OF_THREE, QUALIFIER_LENGTHS))
    for method in methods_for(tiers):
        if method == BASELINE:
            yield Setting(method)
        elif method == "sd":
            yield from (Setting(method, draft) for draft in two)
        elif method == "psd":
            # At threshold 0 only matches stand (and tokens of equal distributions).
            for (draft, qualifier), low in product(three, [0.0, *lower]):
                yield Setting(method, draft, qualifier, low)
        elif not lossy:
            continue
        elif method == "fsd":
            for draft, high in product(two, thresholds(traces, (0, last))):
                yield Setting(method, draft, target_threshold=high)
        elif method == "psd_a":
            for (draft, qualifier), high in product(three, upper):
                yield Setting(method, draft, qualifier, target_threshold=high)
        else:
            for (draft, qualifier), low, high in product(three, lower, upper):
                yield Setting(method, draft, qualifier, low, high)


def thresholds(traces: Sequence[Trace], pair: tuple[int, int]) -> list[float]:
    """Thresholds of two digits that let `SHARES` of the positions stand, or a little more; ascending."""
    values = sorted(value for trace in traces for value in trace.divergence[pair])
    found = {_rounded_up(values[math.ceil(share * len(values)) - 1]) for share in SHARES}
    return sorted(value for value in found if 0 < value < math.inf)


def standing_share(traces: Sequence[Trace], pair: tuple[int, int], threshold: float) -> float:
    """The share of positions where two tiers are no further apart than a threshold."""
    values = [value for trace in traces for value in trace.divergence[pair]]
    return sum(value <= threshold for value in values) / len(values)


def agreement(traces: Sequence[Trace], pair: tuple[int, int]) -> float:
    """The share of positions where two tiers have the same own token: what a match lets stand."""
    low, high = pair
    same = [a == b for trace in traces for a, b in zip(trace.own[low], trace.own[high], strict=True)]
    return sum(same) / len(same)


def widest(tiers: int) -> tuple[int, ...]:
    """Per tier, the widest window that any of the settings makes it run."""
    two, three = max(DRAFT_LENGTHS_OF_TWO) + 1, max(QUALIFIER_LENGTHS) + max(DRAFT_LENGTHS_OF_THREE) + 1
    if tiers == 2:
        return tiers, two
    # Tiers between the second and the last, in a pyramid of more than three, are in no named method.
    between = [max(DRAFT_LENGTHS_OF_THREE) + tiers - 1] * (tiers - 2)
    return tiers, *between, max(two, three)


def finalists(
    considered: Sequence[Prediction], current: Prediction | None, lossy_limit: float
) -> list[Prediction]:
    """The settings worth running, the most important first: they may not all be affordable.

    The baseline; the best of each method, fastest first; what is set now; then `SPARES` more of each method that
    promise enough, each with another draft length, and for a lossy method with half the share of foreign tokens:
    there the model is only an estimate.

    Args:
        considered: all predictions, fastest first.
        lossy_limit: the largest share of tokens that may not be the target's own.
    """
    baseline = next(one for one in considered if one.setting.method == BASELINE)
    promising = SPARE_CHANCE * considered[0].tokens_per_second
    chosen: dict[str, list[Prediction]] = {}
    for one in considered:
        setting = one.setting
        if setting.method == BASELINE or one.differs > lossy_limit:
            continue
        mine = chosen.setdefault(setting.method, [])
        if mine and (
            len(mine) > SPARES
            or one.tokens_per_second < promising
            or one.differs > lossy_limit / 2
            or setting.draft_length in [other.setting.draft_length for other in mine]
        ):
            continue
        mine.append(one)
    best = [mine[0] for mine in chosen.values()]
    spares = [one for one in considered if any(one in mine[1:] for mine in chosen.values())]
    ordered = [baseline, *best, *([current] if current else []), *spares]
    return list({one.setting: one for one in ordered}.values())


def _rounded_up(value: float) -> float:
    """To two digits, never below the value."""
    if not 0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    digits = round(-math.log10(unit))
    return round(math.ceil(value / unit) * unit, max(digits, 0))
