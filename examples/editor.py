"""Completion in an editor: a suggestion behind the cursor, which every keystroke takes back.

    python examples/editor.py                  # types a few lines by itself and shows what is suggested

`Completer` is what a plugin would hold. Each keystroke cancels the generation that runs, which frees the pyramid
within a round, and starts the next one once the user pauses. A prompt that begins as the last one did is not
processed again, so that typing on is cheap.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pyramid_rt
from pyramid_rt import Options, Pyramid, SamplingParams

# Token healing: the user may have stopped within a word, and the model goes on as it would have written it.
HEALING: dict[str, Any] = {"heal": True} if "heal" in Options.__annotations__ else {}
SCRIPT = ("def read_config(pa", "th):\n    with op", "en(path) as f:\n        for line in ")


class Completer:
    """Suggestions for one editor.

    Args:
        rt: the pyramid, which the whole editor may share.
        show: called with the text before the cursor and the suggestion so far; an empty one takes it back.
        pause: seconds without a keystroke before anything is run.
        options: as of `generate`, over those of an editor: a line, greedily, with token healing.
    """

    def __init__(
        self, rt: Pyramid, show: Callable[[str, str], None], *, pause: float = 0.03, **options: Any
    ) -> None:
        self._rt, self._show, self._pause = rt, show, pause
        self._params = SamplingParams(**{"max_new_tokens": 40, "stop": "\n", **HEALING, **options})
        self._task: asyncio.Task[None] | None = None

    def keystroke(self, before: str) -> None:
        """The text before the cursor has become another one."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(self._complete(before, self._task))

    async def settled(self) -> None:
        """Wait until nothing runs any more."""
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def close(self) -> None:
        """Take back what runs."""
        if self._task is not None:
            self._task.cancel()
            await self.settled()

    async def _complete(self, before: str, last: asyncio.Task[None] | None) -> None:
        self._show(before, "")
        await asyncio.sleep(self._pause)
        if last is not None:
            await asyncio.wait({last})  # its round is over in milliseconds
        suggestion = ""
        async with self._rt.astream(before, self._params) as stream:
            async for piece in stream:
                suggestion += piece
                self._show(before, suggestion)


async def type_script(rt: Pyramid, show: Callable[[str, str], None], between: float = 0.02) -> list[str]:
    """Type `SCRIPT` key by key, pausing after each part; returns what was suggested at each pause."""
    suggested: dict[str, str] = {}

    def note(before: str, suggestion: str) -> None:
        suggested[before] = suggestion
        show(before, suggestion)

    completer, text, pauses = Completer(rt, note), "", []
    for part in SCRIPT:
        for key in part:
            text += key
            completer.keystroke(text)
            await asyncio.sleep(between)
        await completer.settled()
        pauses.append(text)
    await completer.close()
    return [suggested[before] for before in pauses]


def main() -> None:
    def show(before: str, suggestion: str) -> None:
        line = before.rpartition("\n")[2]
        sys.stdout.write(f"\r\x1b[K{line}\x1b[2m{suggestion}\x1b[0m")
        if before.endswith("\n") and not suggestion:
            sys.stdout.write("\n")
        sys.stdout.flush()

    with pyramid_rt.load(pyramid_rt.demo_weights()) as rt:
        asyncio.run(type_script(rt, show, between=0.08))
    print()


if __name__ == "__main__":
    main()
