"""The session of one profiled call: an engine that writes spans down, backends that do, and the profile of it all."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from pyramid_rt.decoding.place import Place
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import InputError
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.shapes import Shape
from pyramid_rt.profiling.backend import RecordingBackend
from pyramid_rt.profiling.engine import ProfiledEngine
from pyramid_rt.profiling.floors import copy_bandwidth, note_bytes
from pyramid_rt.profiling.profile import Profile
from pyramid_rt.profiling.spans import NvtxRanges, Ranges, Recorder, clock_for
from pyramid_rt.result import GenerationResult
from pyramid_rt.streaming import Work

_LAUNCH_BY_LAUNCH = (
    "Rounds ran launch by launch here and run as graphs otherwise: the time between ops differs."
)
_IN_CACHE = "More than 100% of the copy: what is read fits into the processor's caches."
_UNMEASURED = "Times come from CUDA events; this way of taking them was not yet checked on a GPU."


class Session:
    """One profiled call: the engine and the recorder it needs, and the profile it leaves.

    Args:
        place: of the pyramid.
        nvtx: name NVTX ranges too.
        graphs: rounds of other calls run as graphs.

    Raises:
        InputError: `nvtx` without a CUDA device.
    """

    def __init__(self, place: Place, *, nvtx: bool, graphs: bool) -> None:
        if nvtx and place.device.type != "cuda":
            raise InputError(f"nvtx=True needs a CUDA device, found {str(place.device)!r}")
        ranges: Ranges | None = NvtxRanges() if nvtx else None
        self._place, self._graphs = place, graphs
        self._recorder = Recorder(clock_for(place.device), ranges)
        self._tiers: tuple[Tier, ...] = ()
        self._bandwidth = 0.0
        self._began = False

    def engine(self, tiers: Sequence[Tier], plan: RoundPlan, vocab_size: int, max_seq: int) -> ProfiledEngine:
        """The engine of the call; arguments as of `Engine`."""
        self._tiers = tuple(tiers)
        return ProfiledEngine(tiers, plan, vocab_size, max_seq, self._place, self._recorder)

    def over(self, engine: ProfiledEngine, work: Work) -> Work:
        """The same work, its ops written down; the tiers' backends are put back at its end, whatever happens."""
        self._bandwidth = copy_bandwidth(self._place.device)
        with ExitStack() as stack:
            if not engine.by_kernels:
                for tier in self._tiers:
                    if isinstance(tier, ModelTier):
                        stack.enter_context(tier.computed_by(partial(self._recording, tier.name)))
            stack.enter_context(self._recorder.span("call", "call"))
            self._began = True
            return (yield from work)

    def _recording(self, name: str, backend: Backend) -> Backend:
        return RecordingBackend(backend, self._recorder, name)

    def profile(self, result: GenerationResult) -> Profile:
        """The profile of the call that is over, with its result.

        Raises:
            InputError: nothing had run when the call's time was over.
        """
        if not self._began:
            raise InputError("max_time was over before anything ran: there is nothing to profile")
        with self._place.work():
            root = self._recorder.finish()
        shapes = {
            tier.name: (Shape.of(tier.name, tier.config), tier.cache.buffer.dtype.itemsize)
            for tier in self._tiers
            if isinstance(tier, ModelTier)
        }
        note_bytes(root, shapes)
        names = tuple(tier.name for tier in self._tiers)
        profile = Profile(result, root, names, self._bandwidth, self._machine(), ())
        notes = [_LAUNCH_BY_LAUNCH] if self._graphs else []
        if self._place.device.type == "cuda":
            notes.append(_UNMEASURED)
        if any(row.percent is not None and row.percent > 100 for row in profile.rows):
            notes.append(_IN_CACHE)
        return Profile(result, root, names, self._bandwidth, profile.machine, tuple(notes))

    def _machine(self) -> str:
        device = self._place.device
        kinds = {str(tier.cache.buffer.dtype) for tier in self._tiers if isinstance(tier, ModelTier)}
        where = f"{platform.machine()} CPU"
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        parts = [where, *sorted(kind.removeprefix("torch.") for kind in kinds), f"torch {torch.__version__}"]
        return " · ".join(parts)
