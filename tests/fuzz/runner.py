"""Running cases and judging them: what may come out, how long it may take, and what may be left behind."""

from __future__ import annotations

import faulthandler
import os
import random
import re
import resource
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

import torch
from helpers.tiny import write_tiny_pyramid

import pyramid_rt
from fuzz.known import KNOWN
from pyramid_rt import Pyramid, PyramidError

CPU_SECONDS = 10.0  # most that a case may compute
WALL_SECONDS = 20.0  # most that it may take where it waits, on a loaded machine too
MEMORY_BYTES = 4 * 2**30  # most that all may take beside what was taken at the start
CHECKED_EVERY = 25
_LONGEST_MESSAGE = 20_000


class Failure(Exception):
    """A case that did what it must not."""


class Overdue(BaseException):
    """A case that does not come back; no exception that anything catches on purpose."""


@dataclass(frozen=True, slots=True)
class Case:
    """Something to run.

    Attributes:
        what: for the report.
        run: ends, or raises PyramidError; anything else is a failure.
        may_leave: files in the case's folder that it may make or change.
        apart: in a process of its own, as what it reads may end the process.
    """

    what: str
    run: Callable[[], object]
    may_leave: tuple[str, ...] = ()
    apart: bool = False


Make = Callable[[random.Random, "Workspace"], Case]


class Workspace:
    """A tiny pyramid on disk and loaded, and an empty folder for each case; gone at the end."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.tiny = write_tiny_pyramid(self._root / "tiny")
        self.folder = self._root / "case"
        self.pyramid: Pyramid = pyramid_rt.load(self.tiny, device="cpu")
        self._expected = self._decoded()

    def fresh(self) -> None:
        """An empty folder for the next case."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def check(self) -> None:
        """Raise Failure where the loaded pyramid does not decode as it did."""
        if self._decoded() != self._expected:
            raise Failure("the pyramid that was loaded before decodes something else now")

    def _decoded(self) -> list[list[int]]:
        ways = ({"method": "ar"}, {"method": "psd"}, {"temperature": 0.8, "seed": 3})
        return [self.pyramid.generate([5, 6, 7], max_new_tokens=12, **way).tokens for way in ways]

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


@dataclass
class Report:
    """The findings of a run.

    Attributes:
        cases: how many were run.
        failures: what is wrong, a line each, with the number that runs it again.
        known: how many failures were those of `known.KNOWN`.
    """

    cases: int = 0
    failures: list[str] = field(default_factory=list)
    known: int = 0


def fuzz(kind: str, make: Make, *, seed: int, seconds: float, only: int | None = None) -> Report:
    """Run cases of a kind for so many seconds, or one of them alone."""
    report = Report()
    begin, number = time.monotonic(), only or 0
    _bound_memory()
    with Workspace() as place:
        while only is None or number == only:
            if only is None and time.monotonic() - begin > seconds:
                break
            place.fresh()
            case = make(random.Random(f"{seed}/{kind}/{number}"), place)
            found = _judged_apart(case, place) if case.apart else _judge(case, place)
            if found is None and (number % CHECKED_EVERY == 0 or only is not None):
                found = _tried(place.check)
            report.cases += 1
            if found is not None and any(re.search(pattern, found) for pattern, _ in KNOWN):
                report.known += 1
            elif found is not None:
                report.failures.append(f"{kind} --seed {seed} --only {number}: {found}")
            number += 1
    return report


def _judged_apart(case: Case, place: Workspace) -> str | None:
    """The same in a child, which may hang or die."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(writing, (_judge(case, place) or "").encode("utf-8", "backslashreplace"))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], 2 * WALL_SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        found = os.read(reading, 65536).decode()
        _, status = os.waitpid(child, 0)
    finally:
        os.close(reading)
    if os.WIFSIGNALED(status):
        return f"the process died of signal {os.WTERMSIG(status)} [{case.what}]"
    return found or None


def _bound_memory() -> None:
    """A case that reads without end, or takes what a file asks for, gets a MemoryError, not the machine."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, hard))


def _judge(case: Case, place: Workspace) -> str | None:
    """The fault in what a case did; None where there is none."""
    before = _files(place.folder)
    threads, dtype = threading.active_count(), torch.get_default_dtype()
    begin = time.process_time()
    wrong = _tried(case.run)
    seconds = time.process_time() - begin
    if wrong is None and seconds > CPU_SECONDS:
        wrong = f"computed for {seconds:.0f} s"
    left = [name for name in sorted(_files(place.folder) ^ before) if name not in case.may_leave]
    if wrong is None and left:
        wrong = f"left behind, or took away: {left[:3]}"
    if wrong is None and torch.get_default_dtype() != dtype:
        wrong = "left another default dtype"
    if wrong is None and not _comes_down_to(threads):
        wrong = "left a thread"
    return None if wrong is None else f"{wrong} [{case.what}]"


def _comes_down_to(threads: int) -> bool:
    """True if no more threads are left than there were; one that has been told to end gets a moment."""
    for _ in range(100):
        if threading.active_count() <= threads:
            return True
        time.sleep(0.02)
    return False


def _tried(run: Callable[[], object]) -> str | None:
    def overdue(number: int, frame: FrameType | None) -> None:
        raise Overdue(f"not back after {WALL_SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    # For what no signal gets out of.
    faulthandler.dump_traceback_later(3 * WALL_SECONDS, exit=True)
    try:
        run()
    except PyramidError as error:
        message = str(error)
        if not message or len(message) > _LONGEST_MESSAGE:
            return f"a message of {len(message)} characters"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


def _files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}
