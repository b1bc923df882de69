"""The session of one profiled call: engines and backends that write down what they do, and the profile of it all."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from pyramid_rt.decoding.engine import Engine
from pyramid_rt.decoding.graphs import Recorder as GraphRecorder
from pyramid_rt.decoding.place import Place, threads_in
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import InputError
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.shapes import Shape
from pyramid_rt.profiling.backend import RecordingBackend
from pyramid_rt.profiling.captured import MarkedEngine, retimed
from pyramid_rt.profiling.engine import ProfiledEngine
from pyramid_rt.profiling.floors import copy_bandwidth, note_bytes
from pyramid_rt.profiling.profile import Profile
from pyramid_rt.profiling.records import recording_for, works
from pyramid_rt.profiling.spans import NvtxRanges, Ranges, Recorder, clock_for
from pyramid_rt.result import GenerationResult, GenerationTrace
from pyramid_rt.streaming import Work

_LAUNCH_BY_LAUNCH = "Rounds ran op by op here and run as graphs otherwise: the time between ops differs."
_IN_CACHE = "More than 100% of the copy: what is read lies in a cache already."
_RECORDED = "Times are the device's own records of its kernels, in rounds as other calls run them."


class Session:
    """One profiled call: the engine and the recorder it needs, and the profile it leaves.

    Args:
        place: of the pyramid.
        nvtx: name NVTX ranges too.
        graphs: captures the rounds of other calls; None where they are not captured.
        stepwise: in steps.

    Raises:
        InputError: `nvtx` without a CUDA device.
    """

    def __init__(
        self, place: Place, *, nvtx: bool, graphs: GraphRecorder | None, stepwise: bool = False
    ) -> None:
        if nvtx and place.device.type != "cuda":
            raise InputError(f"nvtx=True needs a CUDA device, found {str(place.device)!r}")
        ranges: Ranges | None = NvtxRanges() if nvtx else None
        self._place, self._graphs, self._stepwise = place, graphs, stepwise
        self._recorder = Recorder(clock_for(place.device), ranges)
        self._tiers: tuple[Tier, ...] = ()
        self._by_kernels = False
        self._bandwidth = 0.0
        self._began = False
        self._recording = recording_for(place.device)
        self._marked: MarkedEngine | None = None
        self._results: list[GenerationResult] = []

    @property
    def runs_again(self) -> bool:
        """True while the call is to run once more: op by op first, then as it is, to warm up and to be recorded."""
        recorded = self._recording is not None and self._by_kernels
        return len(self._results) < (3 if recorded else 1)

    def ran(self, result: GenerationResult) -> None:
        """A run is over.

        Raises:
            InputError: nothing had run when the call's time was over, or less than in the run before.
        """
        if not self._began:
            raise InputError("max_time was over before anything ran: there is nothing to profile")
        if self._results and result.tokens != self._results[0].tokens:
            raise InputError(
                f"a profile's runs wrote {len(self._results[0].tokens)} and {len(result.tokens)} tokens, and not the "
                "same ones: they cannot be compared (max_time= ends each at another place)"
            )
        self._results.append(result)

    @property
    def result(self) -> GenerationResult:
        """Of the run whose times the profile has."""
        return self._results[-1]

    def engine(self, tiers: Sequence[Tier], plan: RoundPlan, vocab_size: int, max_seq: int) -> Engine:
        """The engine of the next run; arguments as of `Engine`."""
        self._tiers = tuple(tiers)
        if not self._results:
            made = ProfiledEngine(tiers, plan, vocab_size, max_seq, self._place, self._recorder)
            self._by_kernels = made.by_kernels
            return made
        if self._marked is None:
            self._marked = MarkedEngine(
                tiers, plan, vocab_size, max_seq, self._place, self._graphs, stepwise=self._stepwise
            )
        return self._marked

    def over(self, engine: Engine, work: Work) -> Work:
        """The same work, written down; the tiers' backends are put back at its end, whatever happens."""
        if isinstance(engine, ProfiledEngine):
            return self._written(engine, work)
        return self._recorded(work)

    def _recorded(self, work: Work) -> Work:
        assert self._recording is not None
        with self._recording.taking():
            return (yield from work)

    def _written(self, engine: ProfiledEngine, work: Work) -> Work:
        with ExitStack() as stack:
            if not engine.by_kernels:
                for tier in self._tiers:
                    if isinstance(tier, ModelTier):
                        stack.enter_context(tier.computed_by(partial(self._recording_backend, tier.name)))
            stack.enter_context(self._recorder.span("call", "call"))
            self._began = True
            result = yield from work
        # Afterwards: before it, max_time would be spent on copies, and the call come to nothing.
        self._bandwidth = copy_bandwidth(self._place.device)
        return result

    def _recording_backend(self, name: str, backend: Backend) -> Backend:
        return RecordingBackend(backend, self._recorder, name)

    def profile(self, trace: GenerationTrace | None) -> Profile:
        """The profile of the call, which is over, its result with a trace.

        Raises:
            MatchError: what the device recorded is not what the call launches.
        """
        result = replace(self.result, trace=trace)
        with self._place.work():
            root = self._recorder.finish()
        shapes = {
            tier.name: (Shape.of(tier.name, tier.config), tier.cache.buffer.dtype.itemsize)
            for tier in self._tiers
            if isinstance(tier, ModelTier)
        }
        note_bytes(root, shapes)
        recorded = len(self._results) > 1
        if recorded:
            assert self._recording is not None
            root = retimed(root, works(self._recording.records))
        names = tuple(tier.name for tier in self._tiers)
        profile = Profile(result, root, names, self._bandwidth, self._machine(), ())
        notes = [_RECORDED] if recorded else []
        if self._graphs is not None and not recorded:
            notes.append(_LAUNCH_BY_LAUNCH)
        if any(row.percent is not None and row.percent > 100 for row in profile.rows):
            notes.append(_IN_CACHE)
        return Profile(result, root, names, self._bandwidth, profile.machine, tuple(notes))

    def _machine(self) -> str:
        device = self._place.device
        kinds = {str(tier.cache.buffer.dtype) for tier in self._tiers if isinstance(tier, ModelTier)}
        threads = threads_in(self._place)
        where = f"{platform.machine()} CPU, {threads} thread{'' if threads == 1 else 's'}"
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        parts = [where, *sorted(kind.removeprefix("torch.") for kind in kinds), f"torch {torch.__version__}"]
        return " · ".join(parts)
