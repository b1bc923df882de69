"""`Profile`: what a profiled call gives back, in all its forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pyramid_rt import checks
from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.json_files import whole_file
from pyramid_rt.profiling import drawing, picture, table
from pyramid_rt.profiling.picture import RoundPicture
from pyramid_rt.profiling.spans import Span
from pyramid_rt.profiling.trace_file import chrome_trace
from pyramid_rt.result import GenerationResult

FORMATS = (".json", ".svg", ".png")
ROUNDS_DRAWN = 4
# More would be a picture of hundreds of megabytes.
MOST_DRAWN = 64


@dataclass(frozen=True)
class Profile:
    """One profiled call; `str` of it is the table.

    Attributes:
        result: of the call, with `trace`: who proposed what, and what the rules said.
        spans: the call, everything inside it, and the rest of each part's time labelled.
        tiers: names, small to large.
        bandwidth: bytes per second of a large copy on this device, read and written, measured in the same run.
        machine: what it ran on, in a line.
        notes: what a reader must know of the figures.
    """

    result: GenerationResult
    spans: Span
    tiers: tuple[str, ...]
    bandwidth: float
    machine: str
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def rows(self) -> list[table.Row]:
        """The table: a row for all spans of one name at one place of the tree, layers merged."""
        return table.rows(self.spans, self.bandwidth)

    @cached_property
    def tier_lines(self) -> list[table.TierLine]:
        """A line for each tier: a pass against its floor, and the time between its ops."""
        return table.tier_lines(self.spans, self.tiers, self.bandwidth)

    def rounds(self, count: int = ROUNDS_DRAWN, first: int = 0) -> list[RoundPicture]:
        """The data of the picture: `count` rounds from round `first` on, fewer where the call had fewer.

        Raises InputError: a count below 1, or a negative first.
        """
        count, first = checks.whole("count", count, 1), checks.whole("first", first, 0)
        return picture.rounds(self.spans, self.tiers, self.result.trace, count, first)

    def _drawn(self, count: int, first: int) -> list[RoundPicture]:
        """The rounds of a picture; raises InputError where there is none, or too many."""
        if count > MOST_DRAWN:
            raise InputError(f"rounds is {count}, and a picture has {MOST_DRAWN} at most; first= says which")
        drawn = self.rounds(count, first)
        if not drawn:
            had = len([span for span in self.spans.children if span.kind == "round"])
            raise InputError(
                f"first={first} is beyond the call's last round: it had {had}, counted from 0"
                if had
                else "the call had no round to draw: it ended with the prompt's first token, or before"
            )
        return drawn

    def to_trace(self) -> dict[str, Any]:
        """The object of a trace file that Perfetto and Chrome open."""
        about = {
            "machine": self.machine,
            "copy bandwidth, bytes/s": self.bandwidth,
            "notes": list(self.notes),
        }
        return chrome_trace(self.spans, self.tiers, about)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and numbers, for JSON; times in microseconds."""
        return {
            "machine": self.machine,
            "bandwidth": self.bandwidth,
            "notes": list(self.notes),
            "tiers": [line.to_dict() for line in self.tier_lines],
            "rows": [row.to_dict() for row in self.rows],
            "spans": self.spans.to_dict(),
            "result": self.result.to_dict(),
        }

    def save(self, path: str | Path, rounds: int = ROUNDS_DRAWN, first: int = 0) -> Path:
        """Write a file of the kind that its name ends in; returns where it is.

        Args:
            path: `.json` is a trace for Perfetto or Chrome; `.svg` and `.png` are the picture of a few rounds.
            rounds, first: which ones, for a picture.

        Raises:
            InputError: another ending, a place that cannot be written; for a picture no such round, or no matplotlib.
        """
        file = checks.path("path", path)
        rounds, first = checks.whole("rounds", rounds, 1), checks.whole("first", first, 0)
        kind = file.suffix.lower()
        if kind not in FORMATS:
            raise InputError(f"path is {file.name!r}, expected a name that ends in {', '.join(FORMATS)}")
        if kind == ".json":
            content = json.dumps(self.to_trace()).encode()
        else:
            content = drawing.draw(
                self._drawn(rounds, first), self.tiers, self.machine, kind.removeprefix(".")
            )
        try:
            with whole_file(file) as part:
                part.write_bytes(content)
        except WeightsError as error:  # which names the file and the reason
            raise InputError(str(error)) from error
        return file

    @property
    def about(self) -> Sequence[str]:
        """The lines above the table."""
        stats = self.result.stats
        lines = [
            self.machine,
            f"{stats.method}: {stats.prompt_tokens} tokens of prompt, {stats.new_tokens} new; "
            f"a large copy moves {self.bandwidth / 1e9:.1f} GB/s, read and written",
        ]
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return table.text(self.rows, self.tier_lines, self.about)

    def __repr__(self) -> str:
        rounds = sum(span.kind == "round" for span in self.spans.children)
        return f"Profile({self.result!r}, {rounds} rounds, {self.spans.duration / 1000:.1f} ms)"
