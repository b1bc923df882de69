"""The demo's two panes: what stands in them at which moment."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pyramid_rt import Pyramid, SamplingParams
from pyramid_rt.cli import race
from pyramid_rt.result import GenerationResult

PROMPT = "one two\n"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)


def recording(pyramid: Pyramid, method: str, seconds: float, text: str) -> race.Recording:
    step = seconds / len(text)
    pieces = tuple((step * (index + 1), letter) for index, letter in enumerate(text))
    result = pyramid.generate([5, 6, 7], method=method, max_new_tokens=4, ignore_eos=True)
    return race.Recording(method, pieces, result)


def shown(console: Console, *args: object) -> str:
    with console.capture() as capture:
        console.print(race.frame(console, *args))  # type: ignore[arg-type]
    return capture.get()


def test_each_pane_shows_what_was_there_at_that_time(console: Console, tiny: Pyramid) -> None:
    slow, fast = recording(tiny, "ar", 2.0, "abcdefgh"), recording(tiny, "sd", 1.0, "abcdefgh")
    left, right = half_way = shown(console, PROMPT, slow, fast, 0.5).splitlines()[2].split("││")
    assert len(half_way) == 2
    assert left.strip("│ ") == "ab"
    assert right.strip("│ ") == "abcd"
    done = shown(console, PROMPT, slow, fast, 2.0)
    assert "1.00 s, 4 tokens/s" in done
    assert "2.00 s, 2 tokens/s" in done
    assert max(map(len, done.splitlines())) == 80


def test_a_long_text_shows_its_end_and_fits_the_terminal(console: Console, tiny: Pyramid) -> None:
    text = "".join(f"line {number}\n" for number in range(60))
    slow, fast = recording(tiny, "ar", 2.0, text), recording(tiny, "sd", 1.0, text)
    lines = shown(console, PROMPT, slow, fast, 2.0).splitlines()
    assert len(lines) < console.height
    assert any("line 59" in line for line in lines)


def test_the_film_takes_as_long_as_the_slow_one(console: Console, tiny: Pyramid) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    slow, fast = recording(tiny, "ar", 2.0, "abcd"), recording(tiny, "sd", 1.0, "abcd")
    race.play(console, PROMPT, slow, fast, clock=lambda: now, sleep=sleep)
    assert 2.0 <= now < 2.2
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "sd was done in 1.00 s, ar in 2.00 s: 2.00x, the same tokens" in " ".join(written.split())


def test_other_tokens_are_not_called_the_same(tiny: Pyramid) -> None:
    slow, fast = recording(tiny, "ar", 2.0, "abcd"), recording(tiny, "sd", 1.0, "abce")
    other = GenerationResult("", [1], "length", fast.result.stats, 0)
    assert "NOT same" in race.verdict(slow, race.Recording("sd", fast.pieces, other))


def test_what_is_recorded_is_a_generation_of_its_own(tiny: Pyramid) -> None:
    now = iter(range(100))
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=0.8, seed=2)
    recorded = [
        race.record(tiny, "The", method, params, clock=lambda: next(now)) for method in race.contenders(tiny)
    ]
    assert [one.method for one in recorded] == ["ar", "sd", "psd"]
    assert len({tuple(one.result.tokens) for one in recorded}) == 1
    for one in recorded:
        assert one.shown(one.seconds) == one.result.text
        assert one.result.stats.reused_tokens == 0
    assert race.fastest(recorded).method in ("sd", "psd")
    assert tiny.prefix_reuse
