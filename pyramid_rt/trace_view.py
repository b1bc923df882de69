"""Views of a trace: coloured text with a line for each token in a terminal, and HTML in a notebook."""

from __future__ import annotations

import html
import io
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Protocol

from pyramid_rt.trace import TokenTrace, VerifyRecord

LEAST_WIDTH = 40
# By the distance of a tier from the target: the target's own first. A terminal's names, and a notebook's.
COLOURS = ("magenta", "yellow", "green", "cyan", "blue")
SHADES = ("#f3c6ec", "#fbe7a1", "#c3ebc3", "#c0e8ee", "#c9d6f7")
_SHOWN = 18  # characters of a token in its line


class Traced(Protocol):
    """A trace as its views know it; see `result.GenerationTrace`."""

    @property
    def tiers(self) -> Sequence[str]: ...

    @property
    def rounds(self) -> Sequence[VerifyRecord]: ...

    def __iter__(self) -> Iterator[TokenTrace]: ...

    def __len__(self) -> int: ...


def stdout_has_colours() -> bool:
    """True where standard output is a terminal and NO_COLOR is not set."""
    out = sys.stdout
    return out is not None and out.isatty() and not os.environ.get("NO_COLOR")


def terminal_view(trace: Traced, *, colour: bool, width: int) -> str:
    """See `GenerationTrace.view`."""
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    console = Console(
        file=out,
        width=max(width, LEAST_WIDTH),
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        emoji=False,
        markup=False,
        legacy_windows=False,
    )
    for line in _legend(trace):
        console.print(Text(line[0], style=line[1]))
    text = Text()
    for token in trace:
        text.append(
            visible(token.text, keep="\n\t") or f"<{token.token}>", style=_style(trace, token.proposed_by)
        )
    if colour and text:
        console.print()
        console.print(text)
    if trace:
        console.print()
        console.print(_table(trace))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


def html_view(trace: Traced) -> str:
    """A legend and the text; a token's mark names its tiers and says what the rules said."""
    legend = " ".join(
        f'<span style="{_css(trace, name)}">{html.escape(line)}</span>'
        for name, (line, _) in zip(trace.tiers, _legend(trace), strict=True)
    )
    tokens = "".join(
        f'<span style="{_css(trace, token.proposed_by)}" title="{html.escape(_title(token))}">'
        f"{html.escape(visible(token.text, keep=chr(10) + chr(9)) or f'<{token.token}>')}</span>"
        for token in trace
    )
    return (
        f'<div class="pyramid-rt-trace"><div>{legend}</div>'
        f'<pre style="white-space: pre-wrap">{tokens}</pre></div>'
    )


def visible(text: str, keep: str = "") -> str:
    """A text whose control characters, those of `keep` left alone, are spelt out: a terminal would obey them."""
    return "".join(
        char
        if char in keep or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else _spelt(char)
        for char in text
    )


def _spelt(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _legend(trace: Traced) -> list[tuple[str, str]]:
    """A line for each tier, and its style."""
    lines = []
    for level, name in enumerate(trace.tiers):
        committed = sum(token.proposed_by == name for token in trace)
        proposed = [one for record in trace.rounds if record.level == level + 1 for one in record.proposed]
        line = f"{name}: {committed} of {len(trace)} tokens"
        if level < len(trace.tiers) - 1:
            line += f"; {sum(one.stood for one in proposed)} of {len(proposed)} proposed stood"
        lines.append((line, _style(trace, name)))
    return lines


def _table(trace: Traced) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("token", no_wrap=True)
    table.add_column("by", no_wrap=True)
    table.add_column("what the rules said; what fell there")
    for token in trace:
        table.add_row(
            str(token.position),
            Text(_short(token.text, token.token), style=_style(trace, token.proposed_by)),
            token.proposed_by,
            Text(_words(token)),
        )
    return table


def _words(token: TokenTrace) -> str:
    fallen = [f"{_short(one.text, one.token)} of {one.proposed_by} fell ({one.said})" for one in token.fell]
    return "; ".join([token.said, *fallen])


def _title(token: TokenTrace) -> str:
    return f"{token.position}, by {token.proposed_by}: {_words(token)}"


def _short(text: str, token: int) -> str:
    shown = repr(visible(text)) if text else f"<{token}>"
    shown = shown.replace("\\\\", "\\")
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def _place(trace: Traced, name: str) -> int:
    """The distance of a tier from the target."""
    return min(len(trace.tiers) - 1 - trace.tiers.index(name), len(COLOURS) - 1)


def _style(trace: Traced, name: str) -> str:
    return COLOURS[_place(trace, name)]


def _css(trace: Traced, name: str) -> str:
    return f"background: {SHADES[_place(trace, name)]}; color: #111"
