"""Fast beside slow: two methods type the same text in a terminal, each at the speed it was measured at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyramid_rt.decoding.methods import LOSSLESS_METHODS
from pyramid_rt.tuning.compare import BASELINE, WARM_UP_TOKENS

if TYPE_CHECKING:
    from pyramid_rt.params import SamplingParams
    from pyramid_rt.pyramid import Pyramid
    from pyramid_rt.result import GenerationResult

FRAMES_PER_SECOND = 30
_FRAME_LINES = 8  # of a terminal, that are not the text: borders, titles, what stands above and below


@dataclass(frozen=True, slots=True)
class Recording:
    """One generation, as it came.

    Attributes:
        method: its name.
        pieces: seconds since the call and the text that came then.
        result: what it gave.
    """

    method: str
    pieces: tuple[tuple[float, str], ...]
    result: GenerationResult

    @property
    def seconds(self) -> float:
        return self.pieces[-1][0] if self.pieces else 0.0

    def shown(self, elapsed: float) -> str:
        """The text that was there after so many seconds."""
        return "".join(text for when, text in self.pieces if when <= elapsed)


def record(
    pyramid: Pyramid,
    prompt: str,
    method: str,
    params: SamplingParams,
    clock: Callable[[], float] = time.perf_counter,
) -> Recording:
    """Run one method alone, from the prompt's first token, and note when each piece of text came."""
    kept, pyramid.prefix_reuse = pyramid.prefix_reuse, False
    try:
        pyramid.generate(prompt, params, method=method, max_new_tokens=WARM_UP_TOKENS)
        begin = clock()
        with pyramid.stream(prompt, params, method=method) as stream:
            pieces = tuple((clock() - begin, piece) for piece in stream if piece)
        return Recording(method, pieces, stream.result)
    finally:
        pyramid.prefix_reuse = kept


def contenders(pyramid: Pyramid) -> list[str]:
    """Plain decoding and the lossless methods beside it that these tiers can run."""
    return [method for method in pyramid.methods if method in LOSSLESS_METHODS]


def fastest(recordings: Sequence[Recording]) -> Recording:
    """The one that was done first, the baseline left out."""
    return min((one for one in recordings if one.method != BASELINE), key=lambda one: one.seconds)


def play(
    console: Console,
    prompt: str,
    slow: Recording,
    fast: Recording,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show two recordings side by side, in the time they took."""
    begin = clock()
    last = max(slow.seconds, fast.seconds)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        elapsed = 0.0
        while elapsed < last:
            elapsed = clock() - begin
            live.update(frame(console, prompt, slow, fast, elapsed), refresh=True)
            sleep(1 / FRAMES_PER_SECOND)
        live.update(frame(console, prompt, slow, fast, last), refresh=True)
    console.print(verdict(slow, fast), style="dim")


def frame(console: Console, prompt: str, slow: Recording, fast: Recording, elapsed: float) -> Group:
    """Both texts as they stood after so many seconds, and a bar for each."""
    panes = Table.grid(expand=True)
    panes.add_column(ratio=1)
    panes.add_column(ratio=1)
    width = console.width // 2 - 4  # borders and a blank on each side
    lines = max(4, console.height - _FRAME_LINES)
    height = min(lines, max(_height(console, prompt, one, width) for one in (slow, fast)))
    panes.add_row(
        _pane(console, prompt, slow, elapsed, width, height, "plain decoding"),
        _pane(console, prompt, fast, elapsed, width, height, f"the {_sameness(slow, fast)} text"),
    )
    return Group(panes)


def verdict(slow: Recording, fast: Recording) -> str:
    """The comparison of the two, in a sentence."""
    ratio = slow.seconds / fast.seconds if fast.seconds else 1.0
    return (
        f"{fast.method} was done in {fast.seconds:.2f} s, {slow.method} in {slow.seconds:.2f} s: {ratio:.2f}x, "
        f"the {_sameness(slow, fast)} tokens. Each ran alone, and is shown at its own speed."
    )


def _sameness(slow: Recording, fast: Recording) -> str:
    return "same" if slow.result.tokens == fast.result.tokens else "NOT same"


def _height(console: Console, prompt: str, one: Recording, width: int) -> int:
    return len(Text(prompt + one.shown(one.seconds)).wrap(console, width))


def _pane(
    console: Console, prompt: str, one: Recording, elapsed: float, width: int, height: int, what: str
) -> Panel:
    typed = one.shown(elapsed)
    lines = Text.assemble((prompt, "dim"), typed).wrap(console, width)
    visible = lines[-height:]
    visible.extend(Text("") for _ in range(height - len(visible)))
    over = elapsed >= one.seconds
    seconds = min(elapsed, one.seconds)
    speed = one.result.stats.new_tokens / one.seconds if one.seconds else 0.0
    status = f"{seconds:.2f} s" + (f", {speed:.0f} tokens/s" if over else "")
    return Panel(
        Group(*visible, _bar(seconds / one.seconds if one.seconds else 1.0, width)),
        title=f"[bold]{one.method}[/bold]: {what}",
        subtitle=status,
        border_style="green" if over else "dim",
        padding=(0, 1),
    )


def _bar(share: float, width: int) -> Text:
    """A bar filled as far as the text is written; in the characters that every terminal has."""
    full = round(share * width)
    return Text.assemble(("=" * full, "green"), ("-" * (width - full), "dim"))
