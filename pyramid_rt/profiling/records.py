"""Records of kernels as a device's profiler writes them down, and which launch of a list each one is.

Works of an engine (a part of the prompt, a round) run one after the other on one stream, each behind a mark, and each
is a list of launches that is known beforehand, captured in a graph or not. So the n-th record behind a mark is the
n-th launch of its work: `match` takes them apart, and refuses records that are not that list.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pyramid_rt.decoding.tiers import Runnable
from pyramid_rt.errors import PyramidError

MARK = "mark_kernel"


@dataclass(frozen=True, slots=True)
class Expected:
    """One launch of a work as it is known beforehand.

    Attributes:
        section: the burst or verify it belongs to; empty for a prompt's.
        tier: whose forward pass it is part of; None for decisions.
        step: the number of that pass in the round.
        layer: of an op in the layers; None elsewhere.
        op: of `models.traffic.STEP_OPS`, or the kernel's name for a decision.
        kernel: the name of its kernel.
    """

    section: str
    tier: str | None
    step: int
    layer: int | None
    op: str
    kernel: str


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """One kernel as the device's profiler recorded it: microseconds, and the number of its stream."""

    name: str
    begin: float
    end: float
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Attributed:
    """A record and the launch it is; `skipped`: the launch's active flag was 0, and it returned at once."""

    launch: Expected
    record: KernelRecord
    skipped: bool


class MatchError(PyramidError):
    """Records of kernels that are not those of the list of launches."""


def match(
    expected: Sequence[Expected], records: Sequence[KernelRecord], active: Sequence[bool] | None = None
) -> list[Attributed]:
    """Tell the kernels of a work apart by the list that it was captured from.

    Args:
        expected: the launches of the work, in order.
        records: of the work's kernels, of one stream, in any order.
        active: of each launch, its active flag was 1; None: all were.

    Raises:
        MatchError: there are more or fewer records than launches, or one has another kernel's name: nothing is
            guessed.
    """
    if len(records) != len(expected):
        raise MatchError(
            f"{len(records)} kernels were recorded and the round has {len(expected)} launches: "
            "they cannot be told apart"
        )
    if active is not None and len(active) != len(expected):
        raise MatchError(f"{len(active)} active flags were given for {len(expected)} launches")
    ordered = sorted(records, key=lambda record: (record.begin, record.end))
    for at, (launch, record) in enumerate(zip(expected, ordered, strict=True)):
        if launch.kernel not in record.name:
            raise MatchError(
                f"kernel {at} of {len(expected)} was recorded as {record.name!r}, and launch {at} is "
                f"{launch.kernel!r} ({launch.op} in the {launch.section or 'prefill'})"
            )
    flags = [True] * len(expected) if active is None else active
    return [
        Attributed(launch, record, not ran)
        for launch, record, ran in zip(expected, ordered, flags, strict=True)
    ]


def kernel_name(launch: Runnable) -> str:
    """The name of a launch's kernel; of what stands for one, its type's."""
    return getattr(launch, "name", type(launch).__name__)


def works(records: Sequence[KernelRecord]) -> list[list[KernelRecord]]:
    """The records of each work, which begins behind a mark, in time; those of the marks' stream alone.

    Raises:
        MatchError: there is no mark, or marks are on several streams (another profile was running).
    """
    marks = [record for record in records if MARK in record.name]
    streams = {record.stream for record in marks}
    if len(streams) != 1:
        raise MatchError(
            f"marks were recorded on {len(streams)} streams, expected one: "
            + (
                "is another profile running?"
                if streams
                else "the device's profiler recorded no kernel of the call"
            )
        )
    found: list[list[KernelRecord]] = []
    for record in sorted(records, key=lambda record: (record.begin, record.end)):
        if record.stream not in streams:
            continue
        if MARK in record.name:
            found.append([])
        elif found:
            found[-1].append(record)
    return found


class Recording(Protocol):
    """Takes the records of all kernels that run inside; they are there when it is over."""

    records: list[KernelRecord]

    @contextmanager
    def taking(self) -> Iterator[None]: ...


class TorchRecording:
    """Records by torch's profiler, which has CUPTI write down every kernel, those of graphs too.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.records: list[KernelRecord] = []

    @contextmanager
    def taking(self) -> Iterator[None]:
        """See `Recording`."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize(self._device)
        # Kept until they are read: torch warns of what it would forget otherwise.
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            yield
            torch.cuda.synchronize(self._device)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            self.records = read_records(file)


def read_records(file: Path) -> list[KernelRecord]:
    """The kernels of a trace file as torch's profiler writes it."""
    events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return [
        KernelRecord(event["name"], event["ts"], event["ts"] + event["dur"], event["args"]["stream"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") == "kernel"
    ]


def recording_for(device: torch.device) -> Recording | None:
    """The taker of records on a device; None where there is nothing but the host's clock."""
    return TorchRecording(device) if device.type == "cuda" else None
