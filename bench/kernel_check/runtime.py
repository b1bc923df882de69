"""The differences between a GPU and the interpreter: the device, graphs, events, other work alongside.

Everything that only CUDA can do is in `CudaRuntime`; the rest of the kernel check goes through `Runtime`.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from bench.kernel_check.problems.base import Place

Call = Callable[[], object]
REPLAYS = 20


@dataclass(frozen=True, slots=True)
class Sample:
    """Microseconds of one call: percentiles over the replays of a graph."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """The 20th, 50th and 80th percentile."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(values), cuts[7])


class Runtime(Protocol):
    """A device and how to time on it.

    Attributes:
        place: of tensors.
        exact: results may be compared bit by bit.
        l2_bytes: of the cache that timings must not profit from.
    """

    place: Place
    exact: bool
    l2_bytes: int

    def describe(self) -> dict[str, Any]:
        """Device and driver, for the result file."""
        ...

    def synchronize(self) -> None:
        """Wait for the device; raises what earlier launches did wrong."""
        ...

    def disturb(self, turn: int) -> None:
        """Start other work beside what comes next, of a size that differs from turn to turn."""
        ...

    def time(self, calls: Sequence[Call], replays: int = REPLAYS) -> Sample:
        """Microseconds of one of `calls`, which run one after another."""
        ...

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a large copy within the device."""
        ...

    def release(self) -> None:
        """Give cached memory back."""
        ...


class CudaRuntime:
    """The current CUDA device. Timings are replays of one captured graph."""

    exact = True

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device: use --device interpreter for a dry run")
        device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability(device)
        self.place = Place(device, 10 * major + minor)
        # An attribute since torch 2.3; 64 MB is more than any card of before has.
        self.l2_bytes = int(getattr(self._properties, "L2_cache_size", 0)) or 64 * 2**20
        # The reference of a dtype must not round more than the dtype asks.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # Warm-up and capture share a stream, so that libraries' per-stream workspaces exist before a capture.
        self._capture = torch.cuda.Stream(device)
        self._beside = torch.cuda.Stream(device)
        self._ballast: torch.Tensor | None = None

    def describe(self) -> dict[str, Any]:
        """Device, memory, multiprocessors, driver and versions."""
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            driver = ""
        return {
            "device": torch.cuda.get_device_name(self.place.device),
            "capability": self.place.capability,
            "multiprocessors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "driver": driver.strip().splitlines()[0] if driver.strip() else "unknown",
            "cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        """See `Runtime`."""
        torch.cuda.synchronize(self.place.device)

    def disturb(self, turn: int) -> None:
        """A copy or a product on a second stream: they take bandwidth, L2 and multiprocessors in turn."""
        if self._ballast is None:
            self._ballast = torch.randn(64 * 2**20, device=self.place.device, dtype=torch.bfloat16)
            self._beside.wait_stream(torch.cuda.current_stream())
        half = self._ballast.numel() // 2
        with torch.cuda.stream(self._beside):
            if turn % 3 == 2:
                side = 512 * (1 + turn % 4)
                square = self._ballast[: side * side].view(side, side)
                torch.mm(square, square, out=self._ballast[half : half + side * side].view(side, side))
            else:
                size = half // (1 + turn % 7)
                self._ballast[half : half + size].copy_(self._ballast[:size])

    def capture(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        """One graph of all calls. Each kernel runs before the capture, so that none is compiled or loaded in it."""
        self._capture.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._capture):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(self._capture)
        torch.cuda.synchronize()
        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self._capture):
                for call in calls:
                    call()
        except BaseException:
            # A capture that cannot be ended leaves its stream current.
            torch.cuda.set_stream(outer)
            raise
        return graph

    def time(self, calls: Sequence[Call], replays: int = REPLAYS) -> Sample:
        """Replays back to back between events, after three that are not counted."""
        graph = self.capture(calls)
        for _ in range(3):
            graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        spent = [a.elapsed_time(b) * 1e3 / len(calls) for a, b in pairwise(marks)]
        graph.reset()
        return Sample.of(spent)

    def copy_bandwidth(self) -> float:
        """Of copies of up to 2 GiB of random bytes, median of ten; clocks rise during those before them."""
        free, _ = torch.cuda.mem_get_info(self.place.device)
        size = min(2**31, free // 8)
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.place.device)
        target = torch.empty_like(source)
        begin = time.monotonic()
        while time.monotonic() - begin < 0.3:
            target.copy_(source)
            torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        marks[0].record()
        for mark in marks[1:]:
            target.copy_(source)
            mark.record()
        torch.cuda.synchronize()
        spent = [a.elapsed_time(b) for a, b in pairwise(marks)]
        return float(2e3 * size / statistics.median(spent))

    def release(self) -> None:
        """See `Runtime`."""
        torch.cuda.empty_cache()


class InterpreterRuntime:
    """Triton's interpreter on the CPU: the same flow at tiny sizes. Its times say nothing about kernels.

    Args:
        clock: seconds; tests give their own.
    """

    exact = False

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.place = Place(torch.device("cpu"), 80)
        self.l2_bytes = 2**16
        self._clock = clock

    def describe(self) -> dict[str, Any]:
        """As `CudaRuntime`, without a driver."""
        return {
            "device": "interpreter",
            "capability": self.place.capability,
            "multiprocessors": 1,
            "memory_bytes": 0,
            "l2_bytes": self.l2_bytes,
            "driver": "none",
            "cuda": None,
        }

    def synchronize(self) -> None:
        """Nothing runs alongside."""

    def disturb(self, turn: int) -> None:
        """Programs run one after another here."""

    def time(self, calls: Sequence[Call], replays: int = REPLAYS) -> Sample:
        """Two passes over the calls."""
        spent = []
        for _ in range(min(replays, 2)):
            begin = self._clock()
            for call in calls:
                call()
            spent.append((self._clock() - begin) * 1e6 / len(calls))
        return Sample.of(spent)

    def copy_bandwidth(self) -> float:
        """One small copy."""
        source = torch.ones(2**20)
        begin = self._clock()
        source.clone()
        return 8.0 * 2**20 / (self._clock() - begin)

    def release(self) -> None:
        """Nothing is cached."""


def make_runtime(device: str) -> Runtime:
    """cuda or interpreter."""
    return CudaRuntime() if device == "cuda" else InterpreterRuntime()
