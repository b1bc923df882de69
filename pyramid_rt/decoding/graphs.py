"""Works on the device captured as CUDA graphs, per plan and bound of the cache, all in one memory pool.

An outer round is one graph, or stepwise a graph for the burst and one for each tier's verify, which are repeated
as often as the round has them: then every step can be timed, at the price of a launch from the host for each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pyramid_rt.decoding.place import Callback, CudaPlace
from pyramid_rt.decoding.remedies import remedy
from pyramid_rt.decoding.rounds.recursion import RoundRunner, Segment, TierTimer, timing
from pyramid_rt.decoding.state import MAX_WINDOW, RoundPlan, State
from pyramid_rt.errors import GraphCaptureError

# A graph looks at one number of cache rows; a short text takes the first of these that holds it.
_SMALLEST_HORIZON = 512
_WARM_UP_RUNS = 2

# One capture at a time in the process: beginning one waits for the device, which a running one does not survive.
_CAPTURES = threading.Lock()
# The parts of a work on cache rows that hold a text up to this end, in order.
Capture = Callable[[int], Sequence[Segment]]


class Recorder(Protocol):
    """Turns work on the device into something that repeats it."""

    def capture(self, work: Callback) -> Callback:
        """Record `work`, which reads nothing back; what is returned repeats it. Does not run it."""
        ...


class CudaRecorder:
    """CUDA graphs of one place. All share one pool: they never run at the same time."""

    def __init__(self, place: CudaPlace) -> None:
        self._place = place
        with place.work():
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callback) -> Callback:
        """Warm up, so that libraries and kernels are loaded, then record, both on the place's own stream.

        Other threads may allocate and launch meanwhile: only what this one does wrong spoils its capture.
        Raises whatever the work or CUDA raises; the stream is out of capture mode then.
        """
        with _CAPTURES, self._place.work():
            for _ in range(_WARM_UP_RUNS):
                work()
            self._place.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._place.stream, capture_error_mode="thread_local"
            ):
                work()
        return graph.replay


@contextmanager
def parked(rounds: RoundRunner, state: State, others: Sequence[Tensor], context: int) -> Iterator[None]:
    """Rounds that run inside find nothing to do, and what they write lands in the slack past the context.

    But for one row: the steps of a burst after its first write at end - 1, the context's last position. Nobody
    reads what a draft holds there, since a draft's cache ends before the last token of a text.

    The scalars and counters that a round may change, and `others`, are put back afterwards.
    """
    changed = [
        state.end,
        state.limit,
        state.ended,
        state.counters,
        state.bad,
        *state.cached,
        *others,
        *rounds.moved,
    ]
    if state.decode_state is not None:
        changed.append(state.decode_state.control)
    before = [value.clone() for value in changed]
    state.end.fill_(context)
    state.limit.fill_(0)
    state.ended.fill_(True)
    for cached in state.cached:
        cached.fill_(context)
    rounds.park(context)
    try:
        yield
    finally:
        for value, old in zip(changed, before, strict=True):
            value.copy_(old)


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured part of a work; `level` is the tier it is timed for, None for none."""

    level: int | None
    run: Callback


class Graphs:
    """Works on the device, captured once per name and bound of the cache, and repeated.

    Args:
        rounds: which they are; their buffers must outlive the graphs.
        state: what the rounds work on. others: what else works change and a capture must not.
        plan: of the rounds.
        context: positions of the caches, slack excluded.
        names: of the tiers, for errors.
        recorder: what captures.
        stepwise: a graph for every section of a work, instead of one for all.
    """

    def __init__(
        self,
        rounds: RoundRunner,
        state: State,
        others: Sequence[Tensor],
        plan: RoundPlan,
        context: int,
        names: tuple[str, ...],
        recorder: Recorder,
        *,
        stepwise: bool = False,
    ) -> None:
        self._rounds, self._context = rounds, context
        self._state, self._others, self._plan = state, others, plan
        self._names, self._recorder = names, recorder
        self.stepwise = stepwise
        self._captured: dict[tuple[str, int], tuple[_Replay, ...]] = {}

    def run(self, name: str, known_end: int, work: Capture, clock: TierTimer | None = None) -> None:
        """Repeat a work; captured first where this name and bound have not come up yet.

        Args:
            name: of the work, for errors too.
            known_end: an upper bound of the text's end; decides how many cache rows the work looks at.
            work: what to capture.
            clock: times the sections that are a tier's, where they are graphs of their own.
        """
        horizon = self.horizon(known_end)
        self.prepare(name, horizon, work)
        for replay in self._captured[name, horizon]:
            with timing(clock, replay.level):
                replay.run()

    def horizons(self) -> list[int]:
        """All that can come up, ascending; the last is the whole cache."""
        ends = (*range(0, self._context, _SMALLEST_HORIZON // 2), self._context)
        return sorted({self.horizon(end) for end in ends})

    def prepare(self, name: str, horizon: int, work: Capture) -> int:
        """Capture a work for this many cache rows, unless that was done; how many graphs were new."""
        if (name, horizon) in self._captured:
            return 0
        replays = self._capture(name, horizon, work)
        self._captured[name, horizon] = replays
        return len({id(replay) for replay in replays})

    def horizon(self, known_end: int) -> int:
        """Cache rows that a graph for this end looks at: a power of two, or all there are."""
        needed = known_end + self._plan.longest_commit + MAX_WINDOW
        rows = max(_SMALLEST_HORIZON, 1 << (needed - 1).bit_length())
        return min(rows, self._context + MAX_WINDOW)

    def _capture(self, name: str, horizon: int, work: Capture) -> tuple[_Replay, ...]:
        """Parts that are captured separately run once after it: a part finds what those before it leave."""
        kept, self._rounds.clock = self._rounds.clock, None
        where = "before its first step"
        made: dict[str, _Replay] = {}
        try:
            sections = work(horizon - self._plan.longest_commit - MAX_WINDOW)

            def run(parts: Sequence[Segment]) -> None:
                nonlocal where
                for section in parts:
                    where = f"in the {section.name}"
                    section.run()

            with parked(self._rounds, self._state, self._others, self._context):
                if not self.stepwise:
                    return (_Replay(None, self._recorder.capture(lambda: run(sections))),)
                for section in sections:
                    if section.name not in made:
                        step = self._recorder.capture(partial(run, (section,)))
                        made[section.name] = _Replay(section.level, step)
                        step()
            return tuple(made[section.name] for section in sections)
        except Exception as error:
            raise GraphCaptureError(
                f"capturing '{name}' of {'/'.join(self._names)} for {horizon} cache rows failed {where}: "
                f"{error}; {remedy(error)}"
            ) from error
        finally:
            self._rounds.clock = kept
