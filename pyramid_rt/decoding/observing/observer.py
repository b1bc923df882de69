"""The observer of a chain's verifies: keeps what each one saw on the device, and reads it once the round is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pyramid_rt.decoding.rules import Evidence, Measured, Rule
from pyramid_rt.trace import JudgedToken, Reason, VerifyRecord

Scalar = int | bool | Tensor  # of the host, or int64 [] or bool [] on the device


@dataclass(frozen=True, slots=True)
class Verify:
    """One verify as its step saw it, m the most tokens that could have been proposed.

    Attributes:
        level: of the tier that judged.
        active: False: nothing was judged, the rest means nothing.
        position: where the proposal begins.
        count: proposed tokens, at most m. accepted: those that stood.
        replaced: a token was put after those that stood. replacement: int64 [1], that token.
        proposed, own, origin: int64 [m]: proposed tokens, the judging tier's own, the tiers that put the proposed.
        threshold: float32 [] of the stage.
        measured: by the rule.
    """

    level: int
    active: Scalar
    position: Scalar
    count: Scalar
    accepted: Scalar
    replaced: Scalar
    replacement: Tensor
    proposed: Tensor
    own: Tensor
    origin: Tensor
    threshold: Tensor
    measured: Measured

    @classmethod
    def of(
        cls,
        level: int,
        rule: Rule,
        evidence: Evidence,
        origin: Tensor,
        numbers: tuple[Scalar, Scalar, Scalar],
        flags: tuple[Scalar, Scalar],
        replacement: Tensor,
    ) -> Verify:
        """A copy of what a verify judged, taken before the round goes on and writes over it.

        Args:
            level, rule, evidence, replacement: of the verify.
            origin: int64 [m], the tiers that put the proposed tokens; a tensor that nobody writes to.
            numbers: position, proposed, stood. flags: active, replaced.
        """
        position, count, accepted = numbers
        return cls(
            level=level,
            active=_kept(flags[0]),
            position=_kept(position),
            count=_kept(count),
            accepted=_kept(accepted),
            replaced=_kept(flags[1]),
            replacement=replacement.clone(),
            proposed=evidence.proposed.clone(),
            own=evidence.own.clone(),
            origin=origin,
            threshold=evidence.threshold.clone(),
            measured=rule.measured(evidence),
        )


class Observer:
    """Collects the verifies of the round that is running.

    `saw` reads nothing on the host; `take`, after the round, reads everything.

    Args:
        rules: of the chain, lowest stage first.
        names: of its tiers, small to large.
    """

    def __init__(self, rules: Sequence[Rule], names: Sequence[str]) -> None:
        self._rules, self._names = tuple(rules), tuple(names)
        self._seen: list[Verify] = []
        self._round = 0

    def restart(self) -> None:
        """A new text begins."""
        self._seen.clear()
        self._round = 0

    def saw(self, verify: Verify) -> None:
        """One verify of the round."""
        self._seen.append(verify)

    def take(self) -> list[VerifyRecord]:
        """The verifies of the round that is over, in their order; those that were inactive are left out."""
        records = [self._record(one) for one in self._seen if bool(one.active)]
        self._seen.clear()
        self._round += 1
        return records

    def _record(self, seen: Verify) -> VerifyRecord:
        rule, judge = self._rules[seen.level - 1], self._names[seen.level]
        position, count, accepted = int(seen.position), int(seen.count), int(seen.accepted)
        proposed, own, origin = (part[:count].tolist() for part in (seen.proposed, seen.own, seen.origin))
        divergence, p, q, uniform = (
            [None] * count if column is None else column[:count].tolist()
            for column in (seen.measured.divergence, seen.measured.p, seen.measured.q, seen.measured.uniform)
        )
        threshold = None if seen.measured.divergence is None else float(seen.threshold)
        judged = [
            JudgedToken(
                position=position + place,
                token=proposed[place],
                proposed_by=self._names[origin[place]],
                judged_by=judge,
                rule=rule.name,
                stood=place < accepted,
                reason="behind",
                own=own[place],
                divergence=divergence[place],
                threshold=threshold,
                p=p[place],
                q=q[place],
                uniform=uniform[place],
            )
            for place in range(count)
        ]
        tokens = [replace(one, reason=_reason(one)) for one in judged[: accepted + 1]]
        return VerifyRecord(
            round=self._round,
            level=seen.level,
            tier=judge,
            rule=rule.name,
            position=position,
            proposed=(*tokens, *judged[accepted + 1 :]),
            accepted=accepted,
            replacement=int(seen.replacement) if bool(seen.replaced) else None,
            replaces=accepted < count,
        )


def _kept(value: Scalar) -> Scalar:
    return value.clone() if isinstance(value, Tensor) else value


def _reason(judged: JudgedToken) -> Reason:
    """The reason that a token stood, or that the first one fell, for `JudgedToken`."""
    stood, own = judged.stood, judged.token == judged.own
    if judged.p is not None:
        return "accepted" if stood else "rejected"
    if judged.divergence is not None and judged.threshold is not None:
        if not stood:
            return "far"
        return "close" if judged.divergence <= judged.threshold else "match"
    if stood:
        return "match" if own else "stands"
    return "falls" if own else "mismatch"
