"""Contenders taking turns: the one harness behind every side-by-side measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

Now = Callable[[], float]

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Timed(Generic[R]):
    """The outcome of some work and the seconds it took."""

    outcome: R
    seconds: float


def timed(clock: Now, work: Callable[[], R]) -> Timed[R]:
    """Do some work by the clock."""
    begin = clock()
    outcome = work()
    return Timed(outcome, clock() - begin)


@dataclass
class Turns(Generic[R]):
    """Runs of contenders on the same prompts.

    Attributes:
        tokens: of an outcome, how many.
        repeats: runs by repeat, prompt and contender; all repeats have the prompts of the first.
    """

    tokens: Callable[[R], int]
    repeats: list[list[list[Timed[R]]]] = field(default_factory=list)

    @property
    def prompts(self) -> int:
        """The number of prompts that were run; 0 before the first."""
        return len(self.repeats[0]) if self.repeats else 0

    def runs(self, contender: int, repeat: int = 0) -> list[Timed[R]]:
        """Runs of a contender in one repeat, by prompt."""
        return [turn[contender] for turn in self.repeats[repeat]]

    def rates(self, contender: int) -> list[float]:
        """Tokens per second over all prompts, by repeat."""
        every = [self.runs(contender, repeat) for repeat in range(len(self.repeats))]
        return [
            sum(self.tokens(run.outcome) for run in runs) / sum(run.seconds for run in runs) for runs in every
        ]

    def ratios(self, contender: int, baseline: int) -> list[float]:
        """Its rates over another's of the same repeat."""
        pairs = zip(self.rates(contender), self.rates(baseline), strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def rate(self, contender: int) -> float:
        """The median of the rates."""
        return statistics.median(self.rates(contender))

    def ratio(self, contender: int, baseline: int) -> float:
        """The median of the ratios: what slows a repeat down slows both down."""
        return statistics.median(self.ratios(contender, baseline))


def take_turns(
    contenders: Sequence[Callable[[P], R]],
    prompts: Sequence[P],
    repeats: int,
    *,
    tokens: Callable[[R], int],
    clock: Now = time.perf_counter,
    before: Callable[[int, int, P], object] | None = None,
    goes_on: Callable[[int, int, float], bool] | None = None,
) -> Turns[R]:
    """Time every contender on every prompt, A B C, A B C, ..., so that a machine that slows down does so for all.

    Args:
        contenders: each takes a prompt, and has been warmed up. prompts: at least one.
        repeats: how often everything is measured at most.
        tokens: of an outcome, how many.
        clock: seconds.
        before: called before each timed run with repeat, contender and prompt.
        goes_on: asked before each turn but the first with repeat, the prompt's place and the seconds of the longest
            turn so far; False begins no further one. A repeat that this leaves incomplete is dropped; the first is
            kept, and the others then go over its prompts.

    Returns: at least one turn.
    """
    result = Turns(tokens)
    longest = 0.0
    for repeat in range(repeats):
        turns: list[list[Timed[R]]] = []
        for index, prompt in enumerate(prompts[: result.prompts or None]):
            if (repeat or index) and goes_on is not None and not goes_on(repeat, index, longest):
                break
            begin, turn = clock(), []
            for place, contender in enumerate(contenders):
                if before is not None:
                    before(repeat, place, prompt)
                turn.append(timed(clock, partial(contender, prompt)))
            turns.append(turn)
            longest = max(longest, clock() - begin)
        if repeat and len(turns) < result.prompts:
            break
        result.repeats.append(turns)
    return result
