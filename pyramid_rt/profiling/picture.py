"""The picture of a few rounds: where their time went, what each tier proposed, what stood, and what fell and why.

This is its data; `drawing` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pyramid_rt.profiling.spans import Span
from pyramid_rt.result import GenerationTrace
from pyramid_rt.trace import JudgedToken, TokenTrace, VerifyRecord, told_apart

Fate = Literal["stood", "fell", "behind", "correction", "bonus", "plain"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of a tier's time in a round, milliseconds since the round's begin.

    `what` is "forward" for a pass; else what was done beside it: "draw", "decide".
    """

    begin: float
    end: float
    what: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One token of a proposal, or the one put after it.

    Attributes:
        column: its place, counted from the round's first position.
        text: the token's, or its id in brackets without a tokenizer.
        fate: what became of it before this rule.
        reason: why it fell, in a few words; empty elsewhere.
    """

    column: int
    text: str
    fate: Fate
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The tokens of one verify: those of a proposal, and the judging tier's own after them."""

    label: str
    judge: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class RoundPicture:
    """One outer round.

    Attributes:
        number: from 1 on. milliseconds: it took. committed: tokens that it added to the text.
        lanes: for each tier, small to large, its bars; a whole burst or verify is one run of bars.
        rows: a row of tokens for each verify, in their order; the last is the target's.
        other: milliseconds of the round that no burst and no verify took.
    """

    number: int
    milliseconds: float
    committed: int
    lanes: tuple[tuple[str, tuple[Bar, ...]], ...]
    rows: tuple[TokenRow, ...]
    other: float


def rounds(
    root: Span, tiers: Sequence[str], trace: GenerationTrace | None, count: int, first: int = 0
) -> list[RoundPicture]:
    """The data of `count` rounds from round `first` on.

    Args:
        root: spans of the call.
        tiers: names, small to large.
        trace: of the same tokens; without one there are no token rows.
    """
    spans = [span for span in root.children if span.kind == "round"]
    chosen = list(enumerate(spans))[first : first + count]
    return [_round(number, span, tiers, trace) for number, span in chosen]


def _judged(trace: GenerationTrace, number: int) -> tuple[list[VerifyRecord], list[TokenTrace]]:
    """The verifies of the round of this number, from 0 on, and the tokens that it committed.

    Plain decoding has no verifies, and a token in each round.
    """
    if not trace.rounds:
        return [], [token for token in trace if token.how == "plain"][number : number + 1]
    # However the trace numbers its rounds: each has a verify.
    called = sorted({record.round for record in trace.rounds})[number:][:1]
    records = [record for record in trace.rounds if record.round in called]
    return records, [token for token in trace if token.round in called]


def _round(number: int, span: Span, tiers: Sequence[str], trace: GenerationTrace | None) -> RoundPicture:
    parts = [part for part in span.children if part.kind in ("burst", "verify")]
    lanes = tuple(
        (tier, tuple(bar for part in parts if part.tier == tier for bar in _bars(part, span.begin)))
        for tier in tiers
    )
    found: tuple[TokenRow, ...] = ()
    committed = 0
    if trace is not None:
        records, kept = _judged(trace, number)
        committed = len(kept)
        base = min((record.position for record in records), default=kept[0].position if kept else 0)
        found = tuple(_row(record, tiers, base) for record in records)
        if not records and kept:
            cells = tuple(Cell(t.position - base, _shown(t.text, t.token), "plain") for t in kept)
            found = (TokenRow(f"{tiers[-1]} alone", tiers[-1], cells),)
    busy = sum(part.duration for part in parts)
    return RoundPicture(
        number=number + 1,
        milliseconds=span.duration / 1000,
        committed=committed,
        lanes=lanes,
        rows=found,
        other=(span.duration - busy) / 1000,
    )


def _bars(part: Span, origin: float) -> list[Bar]:
    """The passes of a burst or verify and what lies between them."""
    return [
        Bar(
            (child.begin - origin) / 1000,
            (child.end - origin) / 1000,
            "forward" if child.kind == "forward" else "decide" if child.kind == "op" else child.name,
        )
        for child in part.children
    ]


def _row(record: VerifyRecord, tiers: Sequence[str], base: int) -> TokenRow:
    cells = [
        Cell(one.position - base, _shown(one.text, one.token), _fate(one), _reason(one))
        for one in record.proposed
    ]
    if record.replacement is not None:
        column = record.position + record.accepted - base
        text = _shown(record.replacement_text, record.replacement)
        cells.append(Cell(column, text, "correction" if record.replaces else "bonus"))
    return TokenRow(f"{tiers[record.level - 1]} → {record.tier}", record.tier, tuple(cells))


def _fate(judged: JudgedToken) -> Fate:
    if judged.stood:
        return "stood"
    return "behind" if judged.reason == "behind" else "fell"


def _reason(judged: JudgedToken) -> str:
    """Why the first token fell, short enough to stand below it."""
    if judged.stood or judged.reason == "behind":
        return ""
    if judged.reason == "far" and judged.divergence is not None and judged.threshold is not None:
        found, limit = told_apart(judged.divergence, judged.threshold, 2)
        return f"divergence {found} > {limit}"
    if judged.reason == "rejected" and judged.p is not None and judged.q is not None:
        if judged.ratio is None:
            return "q is 0"
        found, drawn = told_apart(judged.ratio, judged.uniform or 0.0, 2)
        return f"p/q {found} <= u {drawn}"
    return "mismatch" if judged.reason == "mismatch" else judged.reason


_LONGEST = 11  # characters of a token in its cell


def _shown(text: str, token: int) -> str:
    """A token for people: blanks and line ends at its ends as signs."""
    if not text:
        return f"[{token}]"
    marks = {"\n": "⏎", "\t": "⇥", " ": "␣"}
    shown = text
    if text.strip() == "":
        shown = "".join(marks.get(char, char) for char in text)
        if len(shown) > 4:
            shown = f"{shown[0]}…{shown[-1]} {len(text)}"
    else:
        shown = marks.get(text[0], text[0]) + text[1:]
        shown = shown[:-1] + marks.get(shown[-1], shown[-1])
    shown = "".join(char if char.isprintable() else marks.get(char, "·") for char in shown)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
