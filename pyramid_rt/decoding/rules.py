"""Acceptance rules: each decides how long a prefix of a proposal stands.

A rule is a small frozen object with no state. `judge` sees one verify: R proposed tokens, the verifying tier's
raw and processed rows for them, and what the proposing tier handed up. Everything else that the rest of the runtime
must know of a rule is one of its facts (`Rule`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pyramid_rt import checks
from pyramid_rt.errors import InputError
from pyramid_rt.kernels.reference import sampling as ops


@dataclass(frozen=True, slots=True)
class Evidence:
    """The rows and tokens a rule may look at, for the m proposed positions of one verify.

    Fields that no rule of the chain needs are None (see `Rule.needs_*`).
    """

    proposed: Tensor  # int64 [m] the proposed tokens
    own: Tensor  # int64 [m] the verifying tier's own tokens
    raw: Tensor  # float32 [m, V] the verifying tier's raw logits
    processed: Tensor | None  # float32 [m, V] its processed log-probabilities
    below_raw: Tensor | None  # float32 [m, V] the proposing tier's own raw logits
    below_processed: Tensor | None  # float32 [m, V] the proposing tier's own processed log-probabilities
    effective: Tensor | None  # float32 [m, V] log of the distribution each proposed token was drawn from
    threshold: Tensor  # float32 [] of this stage
    uniform: Tensor | None  # float32 [m] the acceptance uniforms of this stage


@dataclass(frozen=True, slots=True)
class Verdict:
    """The proposed tokens that stand on their own merit, before the prefix is cut.

    `inherited` marks the positions whose token keeps the distribution it had below; elsewhere the token that
    ends up there is distributed as the verifying tier's p. None means nowhere.
    """

    stands: Tensor  # bool [m]
    inherited: Tensor | None  # bool [m]


@dataclass(frozen=True, slots=True)
class Measured:
    """The numbers that a verdict came from, for those who watch; None where the rule looks at none.

    Attributes:
        divergence: float32 [m], between the two tiers' distributions.
        p, q: float32 [m], the proposed token's probability at the verifying tier, and where it was drawn.
        uniform: float32 [m], the token stands where uniform q < p.
    """

    divergence: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    uniform: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """A rule as the tuner replays it, from what the tiers would have said.

    Attributes:
        threshold: up to which divergence of the two tiers any token stands; None where the rule looks at none.
        match: the verifying tier's own token stands.
    """

    threshold: float | None
    match: bool


class Rule(Protocol):
    """A rule as everything else knows it: hashable, frozen, without state.

    Attributes:
        name: in errors.
        threshold: of the stage, a float32 on the device that may differ from call to call; 0 where it has no use.
        lossless: with this rule on top the output is the target's own.
        needs_own_rows: reads the proposing tier's own rows. needs_effective: reads the distributions that proposed
            tokens were drawn from, and acceptance uniforms. needs_processed: reads the verifying tier's processed
            rows. needs_below_processed: reads the proposing tier's own rows processed.
        inherits: a token that stands may keep the distribution that it had below.
        residual: the correction is drawn from max(p - q, 0), not the verifying tier's own token.
        kernel_name: of `kernels.decide.decision.RULES`; None for a rule that only torch decides by.
        divergence_kind: of `kernels.reference.sampling.DIVERGENCES`; None for a rule that looks at none.
        replayed: how the tuner replays it; None where it cannot.
    """

    @property
    def name(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def lossless(self) -> bool: ...
    @property
    def needs_own_rows(self) -> bool: ...
    @property
    def needs_effective(self) -> bool: ...
    @property
    def needs_processed(self) -> bool: ...
    @property
    def needs_below_processed(self) -> bool: ...
    @property
    def inherits(self) -> bool: ...
    @property
    def residual(self) -> bool: ...
    @property
    def kernel_name(self) -> str | None: ...
    @property
    def divergence_kind(self) -> str | None: ...
    @property
    def replayed(self) -> Replayed | None: ...

    def judge(self, evidence: Evidence) -> Verdict:
        """The proposed tokens that stand."""
        ...

    def measured(self, evidence: Evidence) -> Measured:
        """The numbers behind `judge`; called only where somebody watches."""
        ...

    def captured(self) -> Rule:
        """The rule as a captured round knows it: without what may differ from call to call."""
        ...


class RuleFacts:
    """The facts of a rule that asks for nothing, promises nothing and has neither kernel nor replay."""

    __slots__ = ()

    threshold: ClassVar[float] = 0.0
    lossless: ClassVar[bool] = False
    needs_own_rows: ClassVar[bool] = False
    needs_effective: ClassVar[bool] = False
    needs_processed: ClassVar[bool] = False
    needs_below_processed: ClassVar[bool] = False
    inherits: ClassVar[bool] = False
    residual: ClassVar[bool] = False
    kernel_name: ClassVar[str | None] = None
    divergence_kind: ClassVar[str | None] = None
    replayed: ClassVar[Replayed | None] = None

    def measured(self, evidence: Evidence) -> Measured:
        return Measured()


@dataclass(frozen=True, slots=True)
class Match(RuleFacts):
    """A token stands iff it is the verifying tier's own token. Lossless, and equal to plain decoding."""

    name: ClassVar[str] = "match"
    lossless: ClassVar[bool] = True
    kernel_name: ClassVar[str] = "match"
    replayed: ClassVar[Replayed] = Replayed(None, match=True)

    def judge(self, evidence: Evidence) -> Verdict:
        return Verdict(evidence.proposed == evidence.own, None)

    def captured(self) -> Match:
        return self


@dataclass(frozen=True, slots=True)
class Rejection(RuleFacts):
    """Speculative sampling (arXiv:2211.17192, 2302.01318) against the effective distribution. Lossless.

    The tuner takes it for a match, which lets a little less stand when sampling.
    """

    name: ClassVar[str] = "rejection"
    lossless: ClassVar[bool] = True
    needs_effective: ClassVar[bool] = True
    needs_processed: ClassVar[bool] = True
    residual: ClassVar[bool] = True
    kernel_name: ClassVar[str] = "rejection"
    replayed: ClassVar[Replayed] = Replayed(None, match=True)

    def judge(self, evidence: Evidence) -> Verdict:
        p, q = self._probabilities(evidence)
        assert evidence.uniform is not None
        return Verdict(evidence.uniform * q < p, None)

    def measured(self, evidence: Evidence) -> Measured:
        p, q = self._probabilities(evidence)
        return Measured(p=p, q=q, uniform=evidence.uniform)

    def _probabilities(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        assert evidence.processed is not None
        assert evidence.effective is not None
        token = evidence.proposed.unsqueeze(-1)
        p = evidence.processed.gather(-1, token).squeeze(-1).exp()
        q = evidence.effective.gather(-1, token).squeeze(-1).exp()
        return p, q

    def captured(self) -> Rejection:
        return self


@dataclass(frozen=True, slots=True)
class Fuzzy:
    """A token stands while the two tiers' distributions are close (arXiv:2510.12966, 2502.20704). Lossy.

    Attributes:
        threshold: nats (total variation for `tv`); a token stands when divergence <= threshold. Thresholds are
            not comparable between kinds of divergence: `js` is at most ln 2, `js_fsd` and `kl` have no bound.
        divergence: one of `kernels.reference.sampling.DIVERGENCES`.
        divergence_on: "raw" compares raw logits at temperature 1, "processed" compares after processing.
        or_match: the token also stands when it is the verifying tier's own token.
    """

    threshold: float
    divergence: str = "js"
    divergence_on: str = "raw"
    or_match: bool = False

    name: ClassVar[str] = "fuzzy"
    lossless: ClassVar[bool] = False
    needs_own_rows: ClassVar[bool] = True
    needs_effective: ClassVar[bool] = False
    inherits: ClassVar[bool] = True
    residual: ClassVar[bool] = False

    @property
    def needs_processed(self) -> bool:
        return self.divergence_on == "processed"

    @property
    def needs_below_processed(self) -> bool:
        return self.divergence_on == "processed"

    @property
    def kernel_name(self) -> str:
        return "fuzzy_or_match" if self.or_match else "fuzzy"

    @property
    def divergence_kind(self) -> str:
        return self.divergence

    @property
    def replayed(self) -> Replayed:
        return Replayed(self.threshold, self.or_match)

    def captured(self) -> Fuzzy:
        return replace(self, threshold=0.0)

    def __post_init__(self) -> None:
        threshold = checks.number("threshold", self.threshold, 0.0, infinite=True)
        if checks.FLOAT32_MAX < threshold < math.inf:
            raise InputError(f"threshold must be a number >= 0 that float32 can hold, found {threshold!r}")
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "or_match", checks.flag("or_match", self.or_match))
        divergence = checks.choice("divergence", self.divergence, ops.DIVERGENCES)
        object.__setattr__(self, "divergence", divergence)
        divergence_on = checks.choice("divergence_on", self.divergence_on, ("raw", "processed"))
        object.__setattr__(self, "divergence_on", divergence_on)

    def judge(self, evidence: Evidence) -> Verdict:
        distance = self._distance(evidence)
        close = (distance <= evidence.threshold) & (distance < math.inf)
        if not self.or_match:
            return Verdict(close, close)
        return Verdict(torch.logical_or(close, evidence.proposed == evidence.own), close)

    def measured(self, evidence: Evidence) -> Measured:
        return Measured(divergence=self._distance(evidence))

    def _distance(self, evidence: Evidence) -> Tensor:
        if self.divergence_on == "raw":
            p, q = evidence.raw, evidence.below_raw
        else:
            assert evidence.processed is not None
            p, q = evidence.processed, evidence.below_processed
        assert q is not None
        return ops.divergence(self.divergence, p, q)


def rows_needed(rules: tuple[Rule, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each proposing tier: must it keep its own raw rows, and must it hand up effective distributions?

    Rejection reads the effective rows below it; a rule that lets tokens keep their distributions needs those it
    receives where it must hand some up. Match hands up p and needs nothing.
    """
    own = tuple(rule.needs_own_rows for rule in rules)
    effective = [False] * len(rules)
    for stage in reversed(range(len(rules))):
        above = stage + 1 < len(rules) and effective[stage + 1]
        effective[stage] = rules[stage].needs_effective or (rules[stage].inherits and above)
    return own, tuple(effective)
