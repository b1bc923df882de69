"""An engine whose rounds write down what they do: the steps of the recursion, forward passes, launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar, cast

from pyramid_rt.decoding.engine import Engine, WindowRoundRunner
from pyramid_rt.decoding.graphs import Recorder as GraphRecorder
from pyramid_rt.decoding.place import Place, inside
from pyramid_rt.decoding.readback import RoundReader, Snapshot
from pyramid_rt.decoding.rounds.recursion import AnyRound, Steps, TierTimer, burst_name, verify_name
from pyramid_rt.decoding.rounds.torch_steps import OpenRound, TorchRoundRunner
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.decoding.tiers import DeviceTier, Tier
from pyramid_rt.profiling.records import kernel_name
from pyramid_rt.profiling.spans import Recorder

R = TypeVar("R", bound=AnyRound)


class RecordingSteps(Generic[R]):
    """Steps of the recursion that others take, bursts and verifies written down.

    Args:
        inner: takes them.
        recorder: takes the spans.
        names: of the tiers, small to large.
    """

    def __init__(self, inner: Steps[R], recorder: Recorder, names: Sequence[str]) -> None:
        self._inner, self._recorder, self._names = inner, recorder, names

    def begin(self, known_end: int | None) -> R | None:
        """See `Steps`."""
        return self._inner.begin(known_end)

    def inner(self, outer: R) -> R | None:
        """See `Steps`."""
        return self._inner.inner(outer)

    def sample(self, opened: R) -> None:
        """See `Steps`."""
        with self._recorder.span("burst", burst_name(self._names), self._names[0]):
            self._inner.sample(opened)

    def verify(self, opened: R) -> None:
        """See `Steps`."""
        level = opened.level
        with self._recorder.span("verify", verify_name(self._names, level), self._names[level]):
            self._inner.verify(opened)


class RecordingTimer:
    """A timer of forward passes that another is told of too."""

    def __init__(self, inner: TierTimer, recorder: Recorder, names: Sequence[str]) -> None:
        self._inner, self._recorder, self._names = inner, recorder, names

    @contextmanager
    def measure(self, level: int) -> Iterator[None]:
        """See `TierTimer`."""
        with self._recorder.span("forward", "forward", self._names[level]), self._inner.measure(level):
            yield


class RecordingReader(RoundReader):
    """A reader whose launch at a round's end, where it is one, is written down too."""

    def __init__(self, plan: RoundPlan, state: State, ahead: int, place: Place, spans: Recorder) -> None:
        super().__init__(plan, state, ahead, place)
        self._spans = spans

    @inside
    def gather(self) -> None:
        """See `RoundReader`."""
        if self._launch is None:
            super().gather()
        else:
            self._spans.op(
                "report",
                None,
                {"kernel": kernel_name(self._launch), "formula": "readback", "rows": 1},
                super().gather,
            )


class ProfiledEngine(Engine):
    """An engine of one profiled call, with buffers of its own: rounds run step by step, none is captured.

    Args:
        tiers, plan, vocab_size, max_seq, place: as of `Engine`.
        spans: takes them.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        plan: RoundPlan,
        vocab_size: int,
        max_seq: int,
        place: Place,
        spans: Recorder,
    ) -> None:
        self._spans = spans
        self._names = [tier.name for tier in tiers]
        super().__init__(tiers, plan, vocab_size, max_seq, place)

    def _allocate(self, vocab_size: int, recorder: GraphRecorder | None, stepwise: bool) -> None:
        super()._allocate(vocab_size, recorder, stepwise)
        if self.state.decode_state is None:
            rounds = cast(TorchRoundRunner, self._rounds)
            steps: RecordingSteps[OpenRound] = RecordingSteps(rounds.steps, self._spans, self._names)
            rounds.recursion.steps = steps
            return
        self._reader = RecordingReader(self.plan, self.state, self.ahead, self.place, self._spans)
        # Triton, which the kernels need, is not everywhere.
        from pyramid_rt.profiling.launches import RecordingRoundRunner

        kernels = RecordingRoundRunner(
            cast(Sequence[DeviceTier], self.tiers), self.plan, self.state, vocab_size, spans=self._spans
        )
        self._rounds, self._fillers = kernels, cast(WindowRoundRunner, kernels)

    @property
    def by_kernels(self) -> bool:
        """True where a round is a list of launches, and the tiers' backends are not asked."""
        return self.state.decode_state is not None

    @inside
    def restart(self, end: int, clock: TierTimer) -> None:
        """See `Engine`."""
        super().restart(end, clock if self.by_kernels else RecordingTimer(clock, self._spans, self._names))

    @inside
    def fill(self, level: int, begin: int, end: int) -> None:
        """See `Engine`."""
        with self._prefill(level):
            if self.by_kernels:
                super().fill(level, begin, end)
            else:
                with self._spans.span("forward", "forward", self._names[level]):
                    super().fill(level, begin, end)

    @inside
    def fill_chunk(self, level: int, begin: int) -> int:
        """See `Engine`."""
        with self._prefill(level), self._spans.span("forward", "forward", self._names[level]):
            return super().fill_chunk(level, begin)

    @inside
    def first_token(self, begin: int, end: int) -> None:
        """See `Engine`."""
        with self._prefill(len(self._names) - 1):
            super().first_token(begin, end)

    @inside
    def launch(self, known_end: int) -> None:
        """See `Engine`."""
        with self._spans.span("round", "round"):
            super().launch(known_end)

    @inside
    def read(self) -> Snapshot:
        """See `Engine`."""
        with self._spans.span("rest", "read"):
            return super().read()

    @contextmanager
    def _prefill(self, level: int) -> Iterator[None]:
        with self._spans.span("prefill", f"prefill of {self._names[level]!r}", self._names[level]):
            yield
