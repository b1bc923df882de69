"""The table of a profile: spans of one kind and place merged into a row, as a tree, with a line for each tier."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from pyramid_rt.profiling.spans import BETWEEN_OPS, Span

WIDTH = 80
# The deepest name of our own: five levels down, "attention (skipped)".
NAME_WIDTH = 29


@dataclass(frozen=True, slots=True)
class Row:
    """All spans of one name at one place of the tree; layers of a pass are merged into one row.

    Attributes:
        depth: in the tree, 0 for the call.
        kind, name, tier: of the spans; kind "gap" is the time of passes and layers outside of their ops.
        calls: the number of spans.
        median, p10, p90: of their durations, microseconds.
        total: of all, microseconds. share: of the call's.
        bytes: that one must move by the formulas, on average; None where no formula is known.
        gb_s: all their bytes by all their time, 10^9 bytes a second. percent: of the copy bandwidth, of this run.
    """

    depth: int
    kind: str
    name: str
    tier: str | None
    calls: int
    median: float
    p10: float
    p90: float
    total: float
    share: float
    bytes: float | None
    gb_s: float | None
    percent: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TierLine:
    """A tier's forward passes in rounds, against what the memory allows.

    Attributes:
        tier: its name.
        passes: that ran in rounds. skipped: that returned at once.
        step: microseconds of a pass, median. floor: of its bytes at the copy bandwidth; None without formulas.
        launches: ops of a pass, median.
        gaps: share of the passes' time outside of their ops.
    """

    tier: str
    passes: int
    skipped: int
    step: float
    floor: float | None
    launches: float
    gaps: float

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        words = f"{self.tier}: a pass takes {_microseconds(self.step)}"
        if self.floor is not None and self.floor > 0:
            words += f", its bytes alone {_microseconds(self.floor)} ({self.step / self.floor:.1f} x)"
        words += f"; {self.launches:g} ops, {100 * self.gaps:.0f}% of it between them; {self.passes} passes"
        return words + (f", {self.skipped} more skipped" if self.skipped else "")


@dataclass(slots=True)
class _Node:
    """Spans that become a row, and the rows below it."""

    span: Span
    durations: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)


def rows(root: Span, bandwidth: float) -> list[Row]:
    """The rows of a call, each before those below it. `bandwidth` in bytes per second."""
    top = _Node(root)
    _merge(top, root)
    return list(_rows(top, 0, root.duration, bandwidth))


def _merge(node: _Node, span: Span) -> None:
    node.durations.append(span.duration)
    if "bytes" in span.args:
        node.bytes.append(span.args["bytes"])
    if span.kind in ("forward", "layer") and span.children:
        node.gaps.append(max(0.0, span.duration - sum(child.duration for child in span.children)))
    for child in span.children:
        label = _label(child)
        if label not in node.children:
            node.children[label] = _Node(child)
        _merge(node.children[label], child)


def _label(span: Span) -> str:
    name = "layer" if span.kind == "layer" else span.name
    return f"{name} (skipped)" if span.args.get("skipped") else name


def _rows(node: _Node, depth: int, whole: float, bandwidth: float) -> Iterator[Row]:
    span = node.span
    yield _row(depth, span.kind, _label(span), span.tier, node.durations, node.bytes, whole, bandwidth)
    for child in node.children.values():
        yield from _rows(child, depth + 1, whole, bandwidth)
    if node.gaps:
        name = BETWEEN_OPS if span.kind == "layer" else "between layers"
        yield _row(depth + 1, "gap", name, span.tier, node.gaps, [], whole, bandwidth)


def _row(
    depth: int,
    kind: str,
    name: str,
    tier: str | None,
    durations: Sequence[float],
    moved: Sequence[int],
    whole: float,
    bandwidth: float,
) -> Row:
    total = sum(durations)
    speed = sum(moved) * 1e6 / total if moved and total > 0 else None
    return Row(
        depth=depth,
        kind=kind,
        name=name,
        tier=tier,
        calls=len(durations),
        median=median(durations),
        p10=percentile(durations, 10),
        p90=percentile(durations, 90),
        total=total,
        share=total / whole if whole else 0.0,
        bytes=sum(moved) / len(moved) if moved else None,
        gb_s=None if speed is None else speed / 1e9,
        percent=None if speed is None else 100 * speed / bandwidth,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The least value that so many percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def tier_lines(root: Span, tiers: Sequence[str], bandwidth: float) -> list[TierLine]:
    """A line for each tier that made a pass in a round, small to large."""
    passes: dict[str, list[Span]] = {tier: [] for tier in tiers}
    for part in root.walk():
        if part.kind == "round":
            for span in part.walk():
                if span.kind == "forward" and span.tier in passes:
                    passes[span.tier].append(span)
    return [_tier_line(tier, spans, bandwidth) for tier, spans in passes.items() if spans]


def _tier_line(tier: str, spans: Sequence[Span], bandwidth: float) -> TierLine:
    ran = [span for span in spans if not span.args.get("skipped")] or list(spans)
    ops = [[op for op in span.walk() if op.kind == "op"] for span in ran]
    time = sum(span.duration for span in ran)
    busy = sum(op.duration for listed in ops for op in listed)
    moved = [span.args["bytes"] for span in ran if "bytes" in span.args]
    return TierLine(
        tier=tier,
        passes=len(ran),
        skipped=len(spans) - len(ran),
        step=median(span.duration for span in ran),
        floor=1e6 * median(moved) / bandwidth if moved else None,
        launches=median(len(listed) for listed in ops),
        gaps=1 - busy / time if time and any(ops) else 0.0,
    )


def text(found: Sequence[Row], tiers: Sequence[TierLine], about: Sequence[str]) -> str:
    """The table for a terminal of 80 columns, in plain characters.

    Args:
        found: rows. tiers: lines. about: what stands above them.
    """
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, highlight=False, markup=False, emoji=False, color_system=None)
    for line in about:
        console.print(line)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for header in ("calls", "us", "p10-p90", "share", "MB", "GB/s", "% copy"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in found:
        table.add_row(
            "  " * row.depth + _clipped(row.name, NAME_WIDTH - 2 * row.depth),
            str(row.calls),
            _short(row.median),
            "" if row.calls == 1 else f"{_short(row.p10)}-{_short(row.p90)}",
            f"{100 * row.share:.1f}%",
            "" if row.bytes is None else _short(row.bytes / 1e6),
            "" if row.gb_s is None else _short(row.gb_s),
            "" if row.percent is None else f"{row.percent:.0f}%",
        )
    console.print(table)
    if tiers:
        console.print()
    for tier in tiers:
        console.print(str(tier))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _clipped(name: str, width: int) -> str:
    """A name in so many characters at most; of a library's kernel the end says less than the beginning."""
    return name if len(name) <= width else name[: width - 2] + ".."


def _short(value: float) -> str:
    """A number in about three digits, from ten thousand on in thousands: five characters up to a million."""
    if value >= 10_000:
        return f"{value / 1000:.1f}k" if value < 99_950 else f"{value / 1000:,.0f}k"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _microseconds(value: float) -> str:
    return f"{value / 1000:.2f} ms" if value >= 1000 else f"{value:.0f} us"
