"""Contenders taking turns: the order, the seconds, and when no further turn begins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.positions import FakeClock

from pyramid_rt.tuning.turns import Timed, Turns, take_turns


def of_pace(clock: FakeClock, seconds: float, seen: list[str], name: str) -> Callable[[str], list[int]]:
    """A contender that takes so long for a token, and writes as many tokens as a prompt has letters."""

    def run(prompt: str) -> list[int]:
        seen.append(f"{name} {prompt}")
        clock.now += seconds * len(prompt)
        return [0] * len(prompt)

    return run


def race(
    clock: FakeClock, repeats: int, seen: list[str], goes_on: Callable[[int, int, float], bool] | None = None
) -> Turns[list[int]]:
    contenders = [of_pace(clock, 1.0, seen, "a"), of_pace(clock, 0.25, seen, "b")]
    return take_turns(
        contenders,
        ["pp", "qqqq"],
        repeats,
        tokens=len,
        clock=clock,
        before=lambda repeat, place, prompt: seen.append(f"{repeat}{place}"),
        goes_on=goes_on,
    )


def test_turns_are_taken_within_a_prompt() -> None:
    clock, seen = FakeClock(), list[str]()
    turns = race(clock, 2, seen)
    turn = ["{r}0", "a pp", "{r}1", "b pp", "{r}0", "a qqqq", "{r}1", "b qqqq"]
    assert seen == [word.format(r=repeat) for repeat in range(2) for word in turn]
    assert [run.seconds for run in turns.runs(0)] == [2.0, 4.0]
    assert [run.outcome for run in turns.runs(1, -1)] == [[0, 0], [0, 0, 0, 0]]
    assert turns.rates(0) == [1.0, 1.0]
    assert (turns.rate(1), turns.ratio(1, 0), turns.prompts) == (4.0, 4.0, 2)


def test_rates_are_over_all_prompts_and_ratios_within_a_repeat() -> None:
    """A repeat in which the machine is slow changes rates, and no ratio."""
    turns = Turns[int](tokens=int)
    for slow in (1.0, 3.0, 1.0):
        seconds = ((1.0, 0.5), (3.0, 0.5))  # by prompt and contender, for ten tokens each
        turns.repeats.append([[Timed(10, slow * one) for one in turn] for turn in seconds])
    assert turns.rates(0) == pytest.approx([5.0, 5 / 3, 5.0])
    assert turns.ratios(1, 0) == pytest.approx([4.0, 4.0, 4.0])


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (0.0, [1]),  # one turn is there to look at, whatever happens
        (7.0, [1]),  # the first turn ends at 2.5, the second at 7.5
        (14.0, [2]),  # the third at 10, the fourth at 15
        (20.0, [2, 2]),
    ],
)
def test_an_incomplete_repeat_is_dropped_but_for_the_first(budget: float, kept: list[int]) -> None:
    clock, seen = FakeClock(), list[str]()
    turns = race(clock, 2, seen, lambda repeat, index, longest: clock.now + 5.0 <= budget)
    assert [len(repeat) for repeat in turns.repeats] == kept


def test_the_longest_turn_so_far_is_told() -> None:
    clock, seen, told = FakeClock(), list[str](), list[float]()

    def goes_on(repeat: int, index: int, longest: float) -> bool:
        told.append(longest)
        return True

    race(clock, 2, seen, goes_on)
    assert told == [2.5, 5.0, 5.0]


def test_later_repeats_go_over_the_prompts_of_the_first() -> None:
    clock, seen = FakeClock(), list[str]()
    turns = race(clock, 3, seen, lambda repeat, index, longest: index == 0)
    assert [len(repeat) for repeat in turns.repeats] == [1, 1, 1]
    assert len(turns.ratios(1, 0)) == 3
