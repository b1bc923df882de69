"""The one recursion behind every method: tier i asks tier i - 1 for proposals and verifies them.

The steps themselves are a `Steps`: `torch_steps` computes, `kernel_steps` writes down launches, and the replay of the
tuner counts passes over recorded answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from pyramid_rt.decoding.observing import Observer
from pyramid_rt.decoding.state import MAX_WINDOW, RoundPlan

_BOUND_STEP = 256  # device control looks at the cache up to a multiple of this


class TierTimer(Protocol):
    """Measures the time spent in a tier's forwards."""

    def measure(self, level: int) -> AbstractContextManager[None]: ...


def timing(clock: TierTimer | None, level: int | None) -> AbstractContextManager[None]:
    """Time what runs inside as a forward of this tier, where there are a clock and a tier."""
    return nullcontext() if clock is None or level is None else clock.measure(level)


class AnyRound(Protocol):
    """A round that is open at a tier."""

    @property
    def level(self) -> int: ...


R = TypeVar("R", bound=AnyRound)


class Steps(Protocol[R]):
    """The steps that the recursion is made of."""

    def begin(self, known_end: int | None) -> R | None:
        """Open an outer round at the end of the sequence; None where it is known to be finished."""
        ...

    def inner(self, outer: R) -> R | None:
        """Open a round at the tier below `outer`'s, towards the proposal that `outer` judges; None: no more."""
        ...

    def sample(self, opened: R) -> None:
        """The lowest tier draws its tokens."""
        ...

    def verify(self, opened: R) -> None:
        """The round's tier judges what the tier below proposed."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of some work on the device that can be run, captured and timed by itself.

    Attributes:
        name: sections of a work that have one name do the same, on what they find on the device.
        level: the tier whose forward passes it holds; None where it holds none.
        run: does it; reads no device value on the host.
    """

    name: str
    level: int | None
    run: Callable[[], None]


class RoundRunner(Protocol):
    """Outer rounds on a state, however they are run.

    Attributes:
        clock: times every forward pass where there is one.
        moved: what `park` moves besides the state, for whoever puts it back.
    """

    clock: TierTimer | None
    moved: Sequence[Tensor]

    def restart(self, clock: TierTimer | None) -> None:
        """A new request, with a seed of its own, begins; its forwards are timed by this clock."""
        ...

    def watched_by(self, observer: Observer) -> None:
        """From now on the observer sees every verify; rounds are then not captured."""
        ...

    def park(self, context: int) -> None:
        """Everything that runs next begins at the end of the context: for captures, which must change nothing.

        Called after the state was set so.
        """
        ...

    def launches(self) -> int | None:
        """Kernel launches of an outer round; None on the torch path."""
        ...

    def outer_round(self, known_end: int | None = None) -> None:
        """Commit at least one token, unless the sequence is finished already.

        Args:
            known_end: host knowledge of `state.end`, or an upper bound of it; limits the cache rows that device
                control looks at. None looks at all of them.
        """
        ...

    def sections(self, known_end: int) -> Sequence[Segment]:
        """The parts of an `outer_round` under device control, run in this order: bursts, verifies."""
        ...

    def first_token(self, row: Tensor, kv_bound: int, window: Tensor, start: Tensor) -> None:
        """The end of the target's prefill: run the last window, commit the target's own token after it.

        Args:
            row: int64 [1], the window row of the prompt's last token, which is the window's last.
            kv_bound, window, start: as in `Tier.forward`.
        """
        ...


class Recursion(Generic[R]):
    """The order of steps in an outer round by `plan`."""

    def __init__(self, plan: RoundPlan, steps: Steps[R]) -> None:
        self.plan, self.steps = plan, steps

    def outer_round(self, known_end: int | None = None) -> None:
        """One outer round; see `RoundRunner`."""
        opened = self.steps.begin(known_end)
        if opened is not None:
            self._round(opened)

    def _round(self, opened: R) -> None:
        """The tier below the round's makes a proposal, and the round's tier judges it."""
        below = opened.level - 1
        if below <= 0:
            self.steps.sample(opened)
        else:
            for _ in range(self.plan.inner_rounds or self.plan.lengths[below]):
                inner = self.steps.inner(opened)
                if inner is None:
                    break
                self._round(inner)
        if below >= 0:
            self.steps.verify(opened)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A round in a script, which `Script` keeps by its level."""

    level: int


class Script(Generic[R]):
    """Steps that are written down instead of taken: `sections` takes those of `steps` later.

    A round under device control is the same list of steps whatever happens in it. What a step opens is kept for
    the steps after it, by level: no two rounds are open at one.

    Args:
        steps: of device control. names: of the tiers, small to large.
    """

    def __init__(self, steps: Steps[R], names: Sequence[str]) -> None:
        self._steps, self._names = steps, names
        self._opened: dict[int, R] = {}
        self.sections: list[Segment] = []

    def begin(self, known_end: int | None) -> _Opened:
        """See `Steps`."""
        top = len(self._names) - 1
        self._write("start", None, lambda: self._keep(top, self._steps.begin(known_end)))
        return _Opened(top)

    def inner(self, outer: _Opened) -> _Opened:
        """See `Steps`."""
        above, level = outer.level, outer.level - 1
        name = f"start of a round of {self._names[level]!r}"
        self._write(name, None, lambda: self._keep(level, self._steps.inner(self._opened[above])))
        return _Opened(level)

    def sample(self, opened: _Opened) -> None:
        """See `Steps`."""
        at = opened.level
        self._write(burst_name(self._names), 0, lambda: self._steps.sample(self._opened[at]))

    def verify(self, opened: _Opened) -> None:
        """See `Steps`."""
        at = opened.level
        self._write(verify_name(self._names, at), at, lambda: self._steps.verify(self._opened[at]))

    def _write(self, name: str, level: int | None, run: Callable[[], None]) -> None:
        self.sections.append(Segment(name, level, run))

    def _keep(self, level: int, opened: R | None) -> None:
        assert opened is not None, "under device control every round is opened"
        self._opened[level] = opened


def burst_name(names: Sequence[str]) -> str:
    """The section in which the lowest tier draws tokens."""
    return f"burst of {names[0]!r}"


def verify_name(names: Sequence[str], level: int) -> str:
    """The section in which a tier judges a proposal."""
    return f"verify of {names[level]!r}"


def horizon(known_end: int, plan: RoundPlan, capacity: int) -> int:
    """Cache rows that a round of device control may look at when the sequence ends at `known_end` or before."""
    furthest = known_end + plan.longest_commit + MAX_WINDOW
    return min(capacity, -(-furthest // _BOUND_STEP) * _BOUND_STEP)
