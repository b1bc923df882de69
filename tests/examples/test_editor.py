"""The editor example: what is suggested is what the text before the cursor gives, and keystrokes cancel."""

from __future__ import annotations

import asyncio
import time

from helpers.examples import example

from pyramid_rt import Pyramid, demo_weights, load

editor = example("editor")


def test_a_keystroke_cancels_what_runs_and_the_last_one_is_answered(tiny: Pyramid) -> None:
    shown: list[tuple[str, str]] = []

    async def type_it() -> float:
        completer = editor.Completer(
            tiny, lambda *state: shown.append(state), pause=0.0, stop=(), max_new_tokens=200, ignore_eos=True
        )
        text = ""
        for key in "The quick brown":
            text += key
            completer.keystroke(text)
            await asyncio.sleep(0.01)
        begin = time.monotonic()
        await completer.close()
        freed = time.monotonic() - begin
        completer.keystroke("The end")
        await completer.settled()
        return freed

    assert (
        asyncio.run(type_it()) < 5.0
    )  # a generation of 200 tokens or fifteen of them would have to end first
    same = {"max_new_tokens": 200, "ignore_eos": True, **editor.HEALING}
    assert shown[-1] == ("The end", tiny.generate("The end", **same).text)
    begun = {before for before, suggestion in shown if not suggestion}
    assert len(begun) == 16
    whole = [before for before, suggestion in shown if len(suggestion) >= 200]
    assert set(whole) <= {"The end"}


def test_the_pyramid_is_free_after_the_editor_closed(tiny: Pyramid) -> None:
    async def open_and_close() -> None:
        completer = editor.Completer(tiny, lambda *_: None, pause=0.0, max_new_tokens=200, ignore_eos=True)
        completer.keystroke("The")
        await asyncio.sleep(0.05)
        await completer.close()

    asyncio.run(open_and_close())
    assert len(tiny.generate("The", max_new_tokens=2, ignore_eos=True).tokens) == 2


def test_the_script_types_itself() -> None:
    with load(demo_weights()) as rt:
        suggestions = asyncio.run(editor.type_script(rt, lambda *_: None, between=0.0))
        options = {"max_new_tokens": 40, "stop": "\n", **editor.HEALING}
        text = ""
        for part, suggestion in zip(editor.SCRIPT, suggestions, strict=True):
            text += part
            assert suggestion == rt.generate(text, **options).text
    assert any(suggestions)
