"""Threads of one operation on a CPU: how many, for how long they spin, and nobody else's setting touched.

OpenMP keeps the number of threads per calling thread, so it can be set for the runtime's own work alone;
`torch.set_num_threads` besides changes what every thread that is new to torch begins with.

GNU OpenMP, which torch's wheels for Linux bring along, lets a thread that waits for work spin for milliseconds.
Beside one other busy process the waiting threads then hold the very CPU that the last thread of the operation needs.
Its spin count can only be set by variables that are read when the library is loaded; but where it counts more threads
than CPUs it lets them spin some microseconds only and then sleep (GOMP_SPINCOUNT in its manual). An idle second team
makes it count so: see `wait_briefly`.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pyramid_rt import checks
from pyramid_rt.errors import InputError

# Below this many bytes of weights, a token's matrices are so small that dividing one saves no more than waking a
# sleeping thread for it costs, some ten microseconds. A fixed figure: two runs on one machine take the same path.
ONE_THREAD_BYTES = 2**26
_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# torch divides elementwise work into parts of 2^15 elements.
_ENOUGH_FOR_A_TEAM = 2**18

_team_lock = threading.Lock()
_team_started = False


def check_threads(threads: Any) -> int | None:
    """None, or a number of threads from 1 to the CPUs that this process may use. Raises InputError."""
    if threads is None:
        return None
    most = available_cpus()
    try:
        return checks.whole("threads", threads, 1, most)
    except InputError as error:
        raise InputError(f"{error}; {most} is the number of CPUs this process may use") from None


def default_threads(bytes_per_token: int) -> int:
    """Threads for a pyramid whose largest tier reads this many bytes of weights for a token."""
    return 1 if bytes_per_token < ONE_THREAD_BYTES else torch.get_num_threads()


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def intra_op_threads(count: int | None) -> Iterator[None]:
    """Operations of the calling thread run on `count` threads inside; None leaves them as they are."""
    before = torch.get_num_threads()  # which also lets torch set the calling thread's number, where it is new
    if count is None or count == before:
        yield
        return
    openmp = _openmp()
    if openmp is None:
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
        return
    openmp.omp_set_num_threads(count)
    mkl = (
        None if _mkl() is None else _mkl()(count)
    )  # what a thread told MKL by torch stands above OpenMP's number
    try:
        yield
    finally:
        openmp.omp_set_num_threads(before)
        if mkl is not None:
            _mkl()(mkl)


def wait_briefly(count: int) -> bool:
    """Let OpenMP's threads of this process sleep soon when they wait; whether that is arranged, for `count` threads.

    Nothing is done for one thread, which waits for nobody; where the user has set how long threads spin; or where
    OpenMP is not GNU's. What is done lasts as long as the process: a team of threads that sleep.
    """
    global _team_started
    openmp = _openmp()
    if count < 2 or openmp is None or not _is_gnu() or any(name in os.environ for name in _SPIN_VARIABLES):
        return False
    with _team_lock:
        if not _team_started:
            ready = threading.Event()
            # Not a `threading.Thread`: an application that counts its threads should not find one more.
            _thread.start_new_thread(_keep_a_team, (openmp, max(2, available_cpus() + 2 - count), ready))
            ready.wait()
            _team_started = True
    return True


def _keep_a_team(openmp: Any, threads: int, ready: threading.Event) -> None:
    """Run one parallel operation, which makes the team, and stay, so that it stays too."""
    torch.get_num_threads()
    openmp.omp_set_num_threads(threads)
    torch.ones(_ENOUGH_FOR_A_TEAM, dtype=torch.float32, device="cpu").add_(1)
    ready.set()
    threading.Event().wait()


@cache
def _torch_library() -> Any:
    """torch's library for the CPU; names are looked up in it and in what it was linked with. None: not found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                return ctypes.CDLL(str(folder / name))
            except OSError:
                return None
    return None


@cache
def _openmp() -> Any:
    """The OpenMP that torch runs on; None where its functions cannot be called from here."""
    library = _torch_library()
    if library is None or not hasattr(library, "omp_set_num_threads"):
        return None
    library.omp_set_num_threads.argtypes = [ctypes.c_int]
    library.omp_set_num_threads.restype = None
    return library


@cache
def _mkl() -> Any:
    """MKL's number of threads for the calling thread, set; gives the one before, 0 where none was. None: no MKL."""
    library = _torch_library()
    if library is None or not hasattr(library, "MKL_Set_Num_Threads_Local"):
        return None
    function = library.MKL_Set_Num_Threads_Local
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    return function


def _is_gnu() -> bool:
    """True where that OpenMP is GNU's; others bring its entry points too, and names of their own."""
    library = _torch_library()
    return hasattr(library, "GOMP_parallel") and not hasattr(library, "kmp_set_blocktime")
