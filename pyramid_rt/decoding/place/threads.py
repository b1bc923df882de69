"""Threads of one operation on a CPU: how many, and nobody else's setting touched.

OpenMP keeps the number of threads per calling thread, so it can be set for the runtime's own work alone;
`torch.set_num_threads` besides changes what every thread that is new to torch begins with.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pyramid_rt import checks
from pyramid_rt.errors import InputError

# Below this many bytes of weights, a token's matrices are so small that a second thread brings little when quiet and
# costs half the speed beside another program. Measured on two CPUs: one thread over two, quiet and beside a loop,
# with 9 MiB 0.9x and 1.4x, with 42 MiB 0.9x and 1.2x. A fixed figure: two runs on one machine take the same path.
ONE_THREAD_BYTES = 2**24


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


def processor() -> str:
    """Name and cores of the CPU, for whoever notes what a figure was measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


@contextmanager
def intra_op_threads(count: int | None) -> Iterator[None]:
    """Operations of the calling thread run on `count` threads inside; None leaves them as they are."""
    before = torch.get_num_threads()  # which also lets torch set the calling thread's number, where it is new
    if count is None or count == before:
        yield
        return
    library = openmp()
    if library is None:
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
        return
    library.omp_set_num_threads(count)
    # What a thread told MKL by torch stands above OpenMP's number.
    mkl = None if _mkl() is None else _mkl()(count)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
        if mkl is not None:
            _mkl()(mkl)


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
def openmp() -> Any:
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


def is_gnu() -> bool:
    """True where that OpenMP is GNU's; others bring its entry points too, and names of their own."""
    library = _torch_library()
    return hasattr(library, "GOMP_parallel") and not hasattr(library, "kmp_set_blocktime")
