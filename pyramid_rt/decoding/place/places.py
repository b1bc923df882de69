"""`Place`: the device of a pyramid, with the stream, the lock and the threads that its work runs on.

Whatever touches the device does so inside its place: launches, copies, events, allocations, captures. The application
may then use streams, devices, threads and modes of its own, and finds them unchanged after a call.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from pyramid_rt.decoding.place.neutral import neutral_settings
from pyramid_rt.decoding.place.streams import StreamPool
from pyramid_rt.decoding.place.threads import intra_op_threads
from pyramid_rt.decoding.place.waiting import waits_for

P = ParamSpec("P")
R = TypeVar("R")
Callback = Callable[[], None]


class Mark(Protocol):
    """A point in what the device was given to do."""

    def synchronize(self) -> None:
        """Wait until the device is there."""
        ...


class Place(Protocol):
    """The place where a pyramid computes.

    Attributes:
        device: of its tensors, with an index where there are several.
    """

    @property
    def device(self) -> torch.device: ...

    def work(self) -> AbstractContextManager[None]:
        """Everything that touches the device runs inside; one thread at a time, which may enter it again.

        What the caller's stream was given before runs before what is given inside, and what it is given afterwards
        runs after it. Inside, torch is in inference mode.
        """
        ...

    def allocation(self) -> AbstractContextManager[None]:
        """`work` that takes buffers that are kept: ordinary tensors, which can be written to in any mode."""
        ...

    def mark(self) -> Mark | None:
        """A mark after what was given to the device so far; None where the host has done it itself by then."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done what was given to it here."""
        ...

    def trim(self) -> None:
        """Give memory that was freed back to the system."""
        ...


class InPlace(Protocol):
    """An object whose methods touch the device of its place."""

    @property
    def place(self) -> Place: ...


S = TypeVar("S", bound=InPlace)


def inside(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that runs inside `place.work()` of its object."""

    @wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.place.work():
            return method(self, *args, **kwargs)

    return run


def threads_in(place: Place) -> int:
    """Threads that an operation of a place has on the CPU, which need not be as many as the caller's."""
    with place.work():
        return torch.get_num_threads()


class HostPlace:
    """A CPU: a lock, the threads of an operation, and torch's settings.

    Args:
        threads: of an operation; None leaves torch's number.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self.device, self.threads = device, threads
        self._lock = threading.RLock()
        self._depth = 0
        self._waits = waits_for(threads)

    @contextmanager
    def work(self) -> Iterator[None]:
        """See `Place`."""
        with self._lock:
            if self._depth:
                yield
                return
            with ExitStack() as stack:
                self._enter(stack)
                stack.enter_context(torch.inference_mode())
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1

    @contextmanager
    def allocation(self) -> Iterator[None]:
        """See `Place`."""
        with self.work(), torch.inference_mode(False), torch.no_grad():
            yield

    def mark(self) -> Mark | None:
        """See `Place`."""
        return None

    def synchronize(self) -> None:
        """See `Place`."""

    def trim(self) -> None:
        """See `Place`. The C library keeps freed blocks; GNU's can be told to let them go."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def _enter(self, stack: ExitStack) -> None:
        """The context around the outermost entry."""
        stack.enter_context(neutral_settings(self.device.type))
        stack.enter_context(intra_op_threads(self.threads))
        if self._waits is not None and self.threads is not None:
            stack.enter_context(self._waits.watched(self.threads))


def _stream(index: int) -> torch.cuda.Stream:
    """A new stream of the higher priority."""
    return torch.cuda.Stream(torch.device("cuda", index), priority=-1)


_STREAMS: StreamPool[torch.cuda.Stream] = StreamPool(_stream)


class CudaPlace(HostPlace):
    """A GPU: besides, the current device and a stream of the pyramid's own.

    The stream has the higher of CUDA's priorities: of two things an application runs on a GPU, this is the one that
    somebody waits for.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(torch.device("cuda", index), threads)
        self.stream = _STREAMS.take(index)
        # Once: at the end of the pyramid, or of a place that no pyramid ever closed.
        self._give_back = weakref.finalize(self, _STREAMS.give, index, self.stream)

    def _enter(self, stack: ExitStack) -> None:
        super()._enter(stack)
        stack.enter_context(torch.cuda.device(self.device))
        caller = torch.cuda.current_stream(self.device)
        if caller != self.stream:
            self.stream.wait_stream(caller)
            stack.callback(caller.wait_stream, self.stream)
            stack.enter_context(torch.cuda.stream(self.stream))

    def mark(self) -> Mark | None:
        """See `Place`."""
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def synchronize(self) -> None:
        """See `Place`."""
        self.stream.synchronize()

    def trim(self) -> None:
        """See `Place`. torch keeps freed blocks of the device too. The stream is the next place's."""
        super().trim()
        with self.work():
            torch.cuda.empty_cache()
        self.synchronize()
        self._give_back()


def place_for(device: torch.device, threads: int | None = None) -> Place:
    """The place of a device of this machine."""
    return CudaPlace(device, threads) if device.type == "cuda" else HostPlace(device, threads)
