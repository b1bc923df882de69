"""Records of a trace: for every token which tier proposed it, and what each rule said of it.

Made by a call with `trace=True`; `result.GenerationTrace` holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

Reason = Literal["match", "close", "accepted", "stands", "mismatch", "far", "rejected", "falls", "behind"]
How = Literal["proposed", "correction", "bonus", "plain", "first", "healed"]


def told_apart(first: float, second: float, least: int = 3) -> tuple[str, str]:
    """Two numbers in `least` digits, or in as many as show that they are not equal."""
    for digits in range(least, 18):
        shown = f"{first:.{digits}g}", f"{second:.{digits}g}"
        if shown[0] != shown[1] or first == second:
            break
    return shown


@dataclass(frozen=True, slots=True)
class JudgedToken:
    """One proposed token before one rule.

    Attributes:
        position: in the sequence, prompt included.
        token: its id. text: what it stands for, parts of characters as U+FFFD; empty without a tokenizer.
        proposed_by: the tier that put it there. judged_by: the tier whose rule looked at it.
        rule: the rule's name.
        stood: it was let through.
        reason: it stood as the judging tier's own token ("match"), by a divergence up to the threshold ("close"), by
            probability ("accepted"), or by a rule of the caller's own ("stands"); it fell as another token than that
            ("mismatch"), by a divergence above the threshold ("far"), by probability ("rejected"), by a rule of the
            caller's own ("falls"), or because one before it fell ("behind").
        own: the judging tier's own token there. Of a token that is behind, after text that was not kept.
        divergence, threshold: of a fuzzy rule, in its unit; None elsewhere.
        p, q: of a rejection, the probability of the token at the judging tier and where it was drawn; None elsewhere.
        uniform: of a rejection, the number u in [0, 1) that lets the token stand where u q < p; None elsewhere.
    """

    position: int
    token: int
    proposed_by: str
    judged_by: str
    rule: str
    stood: bool
    reason: Reason
    own: int
    divergence: float | None = None
    threshold: float | None = None
    p: float | None = None
    q: float | None = None
    uniform: float | None = None
    text: str = ""

    @property
    def ratio(self) -> float | None:
        """p / q of a rejection; None elsewhere, and where q is 0."""
        return self.p / self.q if self.p is not None and self.q else None

    @property
    def said(self) -> str:
        """The judgement in a few words, as "target: js 0.21 > 0.1"."""
        if self.reason == "behind":
            return f"{self.judged_by}: behind one that fell"
        if self.p is not None and self.q is not None and self.uniform is not None:
            sign = "<" if self.stood else ">="
            drawn, needed = told_apart(self.uniform * self.q, self.p)
            return f"{self.judged_by}: u q {drawn} {sign} p {needed}"
        if self.reason in ("close", "far") and self.divergence is not None and self.threshold is not None:
            sign = "<=" if self.stood else ">"
            found, limit = told_apart(self.divergence, self.threshold)
            return f"{self.judged_by}: divergence {found} {sign} {limit}"
        if self.reason in ("match", "mismatch"):
            beside = "" if self.divergence is None else f" (divergence {self.divergence:.3g})"
            return f"{self.judged_by}: {'its own token' if self.stood else 'another token'}{beside}"
        return f"{self.judged_by}: {self.reason} by {self.rule}"

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, with `ratio`; an infinite divergence or threshold as the text "inf"."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _json_number(value) for name, value in {**found, "ratio": self.ratio}.items()}


@dataclass(frozen=True, slots=True)
class VerifyRecord:
    """One verify: a tier judged a proposal of the tier below.

    Attributes:
        round: the outer round, from 1 on.
        level, tier: of the tier that judged, its place in the chain and its name.
        rule: the rule's name.
        position: where the proposal begins in the sequence, prompt included.
        proposed: its tokens, in order; none where a stop token or the limit left nothing to propose.
        accepted: how many of them stood.
        replacement: the token that the judging tier put after those that stood; None where the text ended there.
        replaces: it stands in for a token that fell (a correction); else it comes after a whole proposal (a bonus).
        replacement_text: of it; empty without a tokenizer.
    """

    round: int
    level: int
    tier: str
    rule: str
    position: int
    proposed: tuple[JudgedToken, ...]
    accepted: int
    replacement: int | None
    replaces: bool
    replacement_text: str = ""

    @property
    def fell(self) -> tuple[JudgedToken, ...]:
        """The tokens that did not stand."""
        return self.proposed[self.accepted :]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "proposed": [token.to_dict() for token in self.proposed]}


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One committed token.

    Attributes:
        token, text: its id, and what it stands for (empty without a tokenizer).
        position: in the sequence, prompt included.
        round: the outer round that committed it; None before the first.
        proposed_by: the tier that put it there.
        accepted_by: the tiers above that let it stand, lowest first.
        how: "proposed" by a lower tier; the target's "correction" of a token that fell, or its "bonus" after a whole
            proposal; its own token of "plain" decoding, or the "first" after the prompt; or "healed", drawn so that
            the text begins as the prompt ends.
        judgements: what the rules of `accepted_by` said of it.
        fell: tokens that were proposed at its position in its round and fell there, those behind others left out.
    """

    token: int
    text: str
    position: int
    round: int | None
    proposed_by: str
    accepted_by: tuple[str, ...]
    how: How
    judgements: tuple[JudgedToken, ...] = ()
    fell: tuple[JudgedToken, ...] = ()

    @property
    def said(self) -> str:
        """The rules' words on it, or how it came about where none has seen it."""
        return "; ".join(one.said for one in self.judgements) or self.how

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **own,
            "judgements": [one.to_dict() for one in self.judgements],
            "fell": [one.to_dict() for one in self.fell],
        }


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
