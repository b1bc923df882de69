"""The bench of threads: its ratios and goals, and that a contender serves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import threads
from bench.threads import DEFAULT, SPINNING, Rates


def test_ratios_are_of_one_repeat() -> None:
    """A machine that slows down as a whole from repeat to repeat changes no ratio."""
    rates = Rates(
        quiet={DEFAULT: [100.0, 50.0, 10.0], SPINNING: [110.0, 55.0, 11.0]},
        beside={DEFAULT: [80.0, 40.0, 8.0], SPINNING: [11.0, 5.5, 1.1]},
    )
    assert rates.kept(DEFAULT) == pytest.approx(0.8)
    assert rates.kept(SPINNING) == pytest.approx(0.1)
    assert rates.against(DEFAULT, SPINNING) == pytest.approx(1 / 1.1)
    assert rates.misses() == []


def test_missed_goals_are_named() -> None:
    rates = Rates(quiet={DEFAULT: [80.0], SPINNING: [100.0]}, beside={DEFAULT: [30.0], SPINNING: [5.0]})
    assert rates.misses() == [
        "beside the loop 38% of its speed, goal 50%",
        "quiet 80% of the speed of 'spinning', goal 90%",
    ]


@pytest.mark.usefixtures("children_find_bench")
def test_contenders_take_turns(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setattr(threads, "_counts", lambda: [1])
    rates = threads.measure(tiny_dir, 4, 2)
    assert list(rates.quiet) == list(rates.beside) == [DEFAULT, SPINNING, "1 thread"]
    assert all(
        len(found) == 2 and min(found) > 0 for found in (*rates.quiet.values(), *rates.beside.values())
    )
    row = threads.report("tiny", rates)["rows"][0]
    assert row["contender"] == DEFAULT
    assert row["kept"] == rates.kept(DEFAULT)
    assert "beside a loop" in capsys.readouterr().out
