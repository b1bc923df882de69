"""The throughput model of the pyramid's paper (arXiv:2510.12966), with passes that may be slower the wider they are.

V is tokens per second, l a speculation length, and beta the share of the places that a verify looks at which give a
token: one that stands, a correction or a bonus.

    V_SD  = beta_TD (l_D + 1) / (l_D / V_D + 1 / V_T)
    V_PSD = beta_TQ (l_Q + 1) / (l_Q / V_QD + 1 / V_T),  V_QD as V_SD with the qualifier for the target

1 / V of a tier that verifies n tokens is here the measured time of a pass of n + 1. beta follows from alpha, the
chance that one token stands: beta (n + 1) = 1 + alpha + ... + alpha^n (arXiv:2211.17192, equation 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyramid_rt.tuning.replay import Curve


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of tiers, small to large, as the model knows it.

    Attributes:
        passes: per tier, seconds of a pass by its width, with everything that comes beside one.
        alphas: per stage, the chance that a proposed token stands, given that those before it do.
        lengths: per stage, the speculation length.
        inner_rounds: rounds within a round of the tier above, where their number is fixed; None: until the length
            of that stage stands.
    """

    passes: tuple[Curve, ...]
    alphas: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    inner_rounds: int | None = None

    def with_passes(self, level: int, curve: Curve) -> Chain:
        """The same chain with other seconds for one tier."""
        return replace(self, passes=(*self.passes[:level], curve, *self.passes[level + 1 :]))


@dataclass(frozen=True, slots=True)
class Throughput:
    """The model's word on a chain.

    Attributes:
        tokens_per_second: V of the whole chain.
        speeds: V of each tier with those below it; the last is the same number.
        betas: per stage. proposals: per stage, tokens in a proposal on average.
        shares: per tier, the part of the time that its passes take.
    """

    tokens_per_second: float
    speeds: tuple[float, ...]
    betas: tuple[float, ...]
    proposals: tuple[float, ...]
    shares: tuple[float, ...]


def throughput(chain: Chain) -> Throughput:
    """The speed of a chain.

    A proposal of more than one round has the stage's length and, where rounds go on until that stands, half of what
    a round gives beyond its first token: the last round overshoots.
    """
    each = [chain.passes[0].at(1)]  # seconds per token so far, by tier
    speeds, betas, proposals = [1 / sum(each)], [], []
    gives = 1.0  # tokens of a round of the tier below
    for stage, (alpha, length) in enumerate(zip(chain.alphas, chain.lengths, strict=True)):
        proposed = float(length)
        if stage > 0:
            fixed = chain.inner_rounds
            proposed = length + (gives - 1) / 2 if fixed is None else fixed * gives
        gives = tokens_of_a_round(alpha, proposed)
        verify = chain.passes[stage + 1].at(proposed + 1)
        each = [seconds * proposed / gives for seconds in each] + [verify / gives]
        speeds.append(1 / sum(each))
        betas.append(gives / (proposed + 1))
        proposals.append(proposed)
    total = sum(each)
    return Throughput(
        1 / total, tuple(speeds), tuple(betas), tuple(proposals), tuple(seconds / total for seconds in each)
    )


def tokens_of_a_round(alpha: float, proposed: float) -> float:
    """1 + alpha + ... + alpha^proposed: what stands, and the token after it. `proposed` may be a mean."""
    if alpha >= 1:
        return proposed + 1
    return float((1 - alpha ** (proposed + 1)) / (1 - alpha))


def alpha_of(tokens: float, proposed: float) -> float:
    """The alpha at which a round of so many proposed tokens gives `tokens`; 0 or 1 where none does."""
    low, high = 0.0, 1.0
    if tokens <= 1:
        return low
    if tokens >= proposed + 1:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        if tokens_of_a_round(middle, proposed) < tokens:
            low = middle
        else:
            high = middle
    return (low + high) / 2
