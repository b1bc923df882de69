"""Streams of places, used again: the next pyramid gets that of one that was closed.

cuBLAS keeps a workspace of tens of MiB for each stream that it ever worked on. Letting go of them is a matter of all
streams of the process at once, and captured graphs hold their addresses: those of another pyramid, or of the
application, would go on with memory that is somebody else's. So they stay, and their number is that of the pyramids
that were open at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

S = TypeVar("S")


class StreamPool(Generic[S]):
    """Streams that nobody uses, by the number of their device.

    Args:
        make: a new stream on a device.
    """

    def __init__(self, make: Callable[[int], S]) -> None:
        self._make = make
        self._free: dict[int, list[S]] = {}
        self._lock = threading.Lock()

    def take(self, device: int) -> S:
        """A stream for one place alone: one that was given back, or a new one."""
        with self._lock:
            free = self._free.get(device)
            if free:
                return free.pop()
        return self._make(device)

    def give(self, device: int, stream: S) -> None:
        """A stream that has no work any more and gets none from whoever took it."""
        with self._lock:
            self._free.setdefault(device, []).append(stream)
