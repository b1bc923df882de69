"""Acceptance rules: what decides how long a prefix of a proposal stands .

A rule is a small frozen object with no state. `judge` sees one verify: R proposed tokens, the verifying tier's
raw and processed rows for them, and what the proposing tier handed up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyramid_rt import checks
from pyramid_rt.errors import InputError
from pyramid_rt.kernels.reference import sampling as ops


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a rule may look at, for the m proposed positions of one verify.

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
    """Which proposed tokens stand on their own merit, before the prefix is cut.

    `inherited` marks the positions whose token keeps the distribution it had below; elsewhere the token that
    ends up there is distributed as the verifying tier's p. None means nowhere.
    """

    stands: Tensor  # bool [m]
    inherited: Tensor | None  # bool [m]


@dataclass(frozen=True, slots=True)
class Match:
    """A token stands iff it is the verifying tier's own token. Lossless, and equal to plain decoding."""

    name: ClassVar[str] = "match"
    lossless: ClassVar[bool] = True
    needs_own_rows: ClassVar[bool] = False
    needs_effective: ClassVar[bool] = False
    residual: ClassVar[bool] = False

    def judge(self, evidence: Evidence) -> Verdict:
        return Verdict(evidence.proposed == evidence.own, None)


@dataclass(frozen=True, slots=True)
class Rejection:
    """Speculative sampling (arXiv:2211.17192, 2302.01318) against the effective distribution. Lossless."""

    name: ClassVar[str] = "rejection"
    lossless: ClassVar[bool] = True
    needs_own_rows: ClassVar[bool] = False
    needs_effective: ClassVar[bool] = True
    residual: ClassVar[bool] = True

    def judge(self, evidence: Evidence) -> Verdict:
        assert evidence.processed is not None
        assert evidence.effective is not None
        assert evidence.uniform is not None
        token = evidence.proposed.unsqueeze(-1)
        p = evidence.processed.gather(-1, token).squeeze(-1).exp()
        q = evidence.effective.gather(-1, token).squeeze(-1).exp()
        return Verdict(evidence.uniform * q < p, None)


@dataclass(frozen=True, slots=True)
class Fuzzy:
    """A token stands while the two tiers' distributions are close (arXiv:2510.12966, 2502.20704). Lossy.

    Attributes:
        threshold: nats (total variation for `tv`); a token stands when divergence <= threshold. Thresholds are
            not comparable between kinds of divergence: `js` is at most ln 2, `js_fsd` and `kl` have no bound.
        divergence: one of `kernels.sampling_reference.DIVERGENCES`.
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
    residual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        threshold = checks.number("threshold", self.threshold, 0.0, infinite=True)
        if checks.FLOAT32_MAX < threshold < math.inf:
            raise InputError(f"threshold must be a number >= 0 that float32 can hold, found {threshold!r}")
        object.__setattr__(self, "threshold", threshold)
        if self.divergence not in ops.DIVERGENCES:
            known = ", ".join(ops.DIVERGENCES)
            raise InputError(f"unknown divergence {self.divergence!r}; expected one of {known}")
        if self.divergence_on not in ("raw", "processed"):
            raise InputError(f"divergence_on must be 'raw' or 'processed', found {self.divergence_on!r}")

    def judge(self, evidence: Evidence) -> Verdict:
        if self.divergence_on == "raw":
            p, q = evidence.raw, evidence.below_raw
        else:
            assert evidence.processed is not None
            p, q = evidence.processed, evidence.below_processed
        assert q is not None
        distance = ops.divergence(self.divergence, p, q)
        close = (distance <= evidence.threshold) & (distance < math.inf)
        if not self.or_match:
            return Verdict(close, close)
        return Verdict(torch.logical_or(close, evidence.proposed == evidence.own), close)


Rule = Match | Rejection | Fuzzy


def rows_needed(rules: tuple[Rule, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each proposing tier: must it keep its own raw rows, and must it hand up effective distributions?

    Rejection reads the effective rows below it; a fuzzy rule that must hand up effective rows itself needs
    those it receives. Match hands up p and needs nothing.
    """
    own = tuple(rule.needs_own_rows for rule in rules)
    effective = [False] * len(rules)
    for stage in reversed(range(len(rules))):
        above = stage + 1 < len(rules) and effective[stage + 1]
        effective[stage] = rules[stage].needs_effective or (isinstance(rules[stage], Fuzzy) and above)
    return own, tuple(effective)
