"""Waits of OpenMP's threads: spinning while the CPUs are this process's, else sleeping after microseconds.

Between two operations of a forward pass a thread waits some ten microseconds. Spinning hands it the next one at
once; sleeping and waking costs as much again as a small operation. Beside one other busy process it is the other way
round: the spinning threads hold the very CPU that the last thread of the operation needs. So it is decided while
decoding, by how often the process has lost a CPU.

GNU OpenMP, which torch's wheels for Linux bring along, reads its spin count when it is loaded. But where it counts
more threads than CPUs it lets them spin some microseconds only and then sleep (GOMP_SPINCOUNT in its manual), and it
counts anew for every wait. An idle second team makes it count so, and the team's end undoes it.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pyramid_rt.decoding.place.threads import available_cpus, is_gnu, openmp

_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# torch divides elementwise work into parts of 2^15 elements.
_ENOUGH_FOR_A_TEAM = 2**18
# Time of decoding after which it is decided anew, in seconds.
WINDOW = 0.1
# Involuntary context switches a second and thread from which the CPUs count as shared. Measured with two threads on
# two CPUs: 15 to 25 when quiet, 95 beside one busy loop; where the threads sleep, at most 8 and 2,500.
SHARED = 50.0


class IdleTeam:
    """A team of OpenMP's threads that do nothing but count: while it is there, waiting threads sleep soon."""

    def __init__(self) -> None:
        self._end: threading.Event | None = None

    def start(self, threads: int) -> None:
        """Make a team of so many threads and return when it is there; nothing where there is one."""
        if self._end is None:
            self._end, ready = threading.Event(), threading.Event()
            # Not a `threading.Thread`: an application that counts its threads should not find one more.
            _thread.start_new_thread(_keep_a_team, (threads, ready, self._end))
            ready.wait()

    def stop(self) -> None:
        """Let the team go, which it does when its threads have ended."""
        if self._end is not None:
            self._end.set()
            self._end = None


def _keep_a_team(threads: int, ready: threading.Event, end: threading.Event) -> None:
    """Run one parallel operation, which makes the team, and stay, so that it stays too."""
    try:
        torch.get_num_threads()  # so that torch does not set the number of this new thread later
        openmp().omp_set_num_threads(threads)
        torch.ones(_ENOUGH_FOR_A_TEAM, dtype=torch.float32, device="cpu").add_(1)
    finally:
        ready.set()
    end.wait()


class Waits:
    """The process's way to wait, decided from what its rounds saw.

    Args:
        team: what makes waits short.
        switches: counts involuntary context switches of the process.
        now: seconds.
    """

    def __init__(
        self, team: IdleTeam, switches: Callable[[], int], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.team, self._switches, self._now = team, switches, now
        self._lock = threading.Lock()
        self._seconds, self._lost = 0.0, 0

    def shorten(self, threads: int) -> None:
        """Short waits of operations of `threads` threads."""
        with self._lock:
            self._shorten(threads)

    @contextmanager
    def watched(self, threads: int) -> Iterator[None]:
        """A round on `threads` threads, after which waits may change their length."""
        lost, begin = self._switches(), self._now()
        try:
            yield
        finally:
            self._note(self._now() - begin, self._switches() - lost, threads)

    def _note(self, seconds: float, lost: int, threads: int) -> None:
        with self._lock:
            self._seconds += seconds
            self._lost += lost
            if self._seconds < WINDOW:
                return
            shared = self._lost >= SHARED * threads * self._seconds
            self._seconds, self._lost = 0.0, 0
            if shared:
                self._shorten(threads)
            else:
                self.team.stop()

    def _shorten(self, threads: int) -> None:
        self.team.start(max(2, available_cpus() + 2 - threads))


def _involuntary_switches() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


WAITS = Waits(IdleTeam(), _involuntary_switches)


def waits_for(threads: int | None) -> Waits | None:
    """`WAITS` for operations of `threads` threads, short to begin with.

    None for one thread, which waits for nobody; where the user has set how long threads spin; and where OpenMP is not
    GNU's.
    """
    if threads is None or threads < 2 or openmp() is None or not is_gnu():
        return None
    if any(name in os.environ for name in _SPIN_VARIABLES):
        return None
    WAITS.shorten(threads)
    return WAITS
