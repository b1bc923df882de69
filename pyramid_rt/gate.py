"""The queue in front of a pyramid: one call at a time, first come, first served."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any

from pyramid_rt.errors import BusyError

OWN_STREAM = "this thread's own stream is still open: finish or close it before decoding again"
CLOSED = "the pyramid is closed"
# How long a call waits for a stream that its own thread began and another one may take over, but does not.
PATIENCE_SECONDS = 30.0
_SEARCH_DEPTH = 5


@dataclass(frozen=True, slots=True)
class Caller:
    """The one who asks: a thread, and where it runs an event loop, the task in it."""

    thread: weakref.ref[threading.Thread]
    task: weakref.ref[asyncio.Task[Any]] | None

    @classmethod
    def current(cls) -> Caller:
        """The one that asks for this."""
        task = None
        with suppress(RuntimeError):
            task = asyncio.current_task()
        return cls(weakref.ref(threading.current_thread()), None if task is None else weakref.ref(task))

    def same_thread(self, other: Caller) -> bool:
        """True where both are of one thread that still lives."""
        mine = self.thread()
        return mine is not None and mine is other.thread()

    def same_task(self, other: Caller) -> bool:
        """True where both are of one task that still lives."""
        mine = None if self.task is None else self.task()
        return mine is not None and other.task is not None and mine is other.task()


class Visit:
    """One call's stay: it waits, holds the pyramid, and leaves.

    Attributes:
        reader: who asked last for a piece of what it decodes, or None; that one cannot ask while it waits.
        withdrawn: its caller no longer wants its turn. refused: the gate was shut before that came.
    """

    def __init__(self) -> None:
        self._reads: weakref.ref[object] | None = None
        self.reader: Caller | None = None
        self.withdrawn = self.refused = False
        self._awake = threading.Lock()
        self._awake.acquire()

    def read_by(self, stream: object | None) -> None:
        """It goes on when somebody reads `stream`; None: by itself."""
        self._reads = None if stream is None else weakref.ref(stream)
        self.reader = None

    @property
    def needs_reader(self) -> bool:
        """True where it goes on only when it is asked to."""
        return self._reads is not None

    def stream(self) -> object | None:
        """The stream that is read, while it is there."""
        return None if self._reads is None else self._reads()

    def wake(self) -> None:
        """Let `sleep` return, now or at its next call. From any thread, and while another `wake` is interrupted."""
        with suppress(RuntimeError):  # awake already
            self._awake.release()

    def sleep(self, seconds: float | None) -> None:
        """Wait until woken, at most this long."""
        self._awake.acquire(timeout=-1 if seconds is None else max(0.0, min(seconds, threading.TIMEOUT_MAX)))


class Gate:
    """One visit at a time; the others wait in the order in which they came."""

    def __init__(self) -> None:
        # Dropping the last reference to a stream makes it leave, wherever its thread is: in here too.
        self._mutex = threading.RLock()
        self._waiting: deque[Visit] = deque()
        self._holder: Visit | None = None
        self.closed = False

    def enter(
        self, visit: Visit, caller: Caller, *, blocking: bool = True, until: float | None = None
    ) -> bool:
        """Wait for the visit's turn.

        Args:
            caller: who waits.
            blocking: its thread waits; else only its task does, and this is another thread.
            until: of `time.monotonic`; then it gives up.

        Returns: whether its turn came; False where it was withdrawn or gave up.

        Raises:
            BusyError: the pyramid is closed, or only the waiting thread could end what it waits for.
        """
        with self._mutex:
            if self.closed:
                raise BusyError(CLOSED)
            self._queue(visit)
        try:
            return self._wait(visit, caller, blocking, until)
        except BaseException:
            self.leave(visit)
            raise

    def leave(self, visit: Visit) -> None:
        """Let the next one in, or wait no longer. From any thread; of no effect where it is not here."""
        with self._mutex:
            if self._holder is visit:
                self._holder = None
            with suppress(ValueError):
                self._waiting.remove(visit)
            self._serve()

    def withdraw(self, visit: Visit) -> None:
        """Let `enter` return at once where it waits. From any thread."""
        visit.withdrawn = True
        visit.wake()

    def shut(self, last: Visit | None = None) -> bool:
        """Let nobody else in, but for `last`; who waits gets BusyError, and who is inside stays.

        Returns: whether it was open.
        """
        with self._mutex:
            was_open, self.closed = not self.closed, True
            if not was_open:
                return False
            waiting = [visit for visit in self._waiting if visit is not last]
            self._waiting.clear()
            for visit in waiting:
                visit.refused = True
                visit.wake()
            if last is not None and last is not self._holder:
                self._queue(last)
            return True

    def wait(self, last: Visit, caller: Caller) -> None:
        """Wait for the turn of the visit that a gate was shut for."""
        self._wait(last, caller, blocking=True, until=None)

    def holder(self) -> Visit | None:
        """The visit that is inside."""
        return self._holder

    def refuse_deadlock(self, caller: Caller, *, blocking: bool, patient: bool = True) -> None:
        """Raise BusyError where `caller`, if it waited, would wait for itself.

        Args:
            blocking: its thread waits; else only its task does.
            patient: another thread may still take the caller's own stream over, wherever it could.
        """
        holder = self._holder
        reader = None if holder is None else holder.reader
        if holder is None or reader is None:
            return
        if not (reader.same_thread(caller) if blocking else reader.same_task(caller)):
            return
        if not holder.needs_reader:  # this call is made by what runs inside
            raise BusyError(OWN_STREAM)
        stream = holder.stream()
        if stream is None:  # which is just being dropped
            return
        # A task can only go on in its loop's thread, and that is the one that would wait.
        stuck = blocking and (reader.task is not None or threading.active_count() == 1)
        if stuck or not patient or not held_elsewhere(stream):
            raise BusyError(OWN_STREAM)

    def _queue(self, visit: Visit) -> None:
        self._waiting.append(visit)
        # After it was put there: a visit that left in between found nobody to hand over to.
        self._serve()

    def _serve(self) -> None:
        while self._holder is None and self._waiting:
            self._holder = self._waiting.popleft()
            self._holder.wake()

    def _wait(self, visit: Visit, caller: Caller, blocking: bool, until: float | None) -> bool:
        checked: tuple[Visit, Caller | None] | None = None
        patience = 0.0
        while self._holder is not visit:
            now = time.monotonic()
            if visit.refused:
                raise BusyError(CLOSED)
            if visit.withdrawn or (until is not None and now >= until):
                self.leave(visit)
                return False
            holder = self._holder
            if holder is not None and checked != (holder, holder.reader):
                self.refuse_deadlock(caller, blocking=blocking)
                checked, patience = (holder, holder.reader), now + PATIENCE_SECONDS
            elif now >= patience:
                self.refuse_deadlock(caller, blocking=blocking, patient=False)
                patience = now + PATIENCE_SECONDS
            wait = patience - now if until is None else min(patience, until) - now
            visit.sleep(wait)
        return True


def held_elsewhere(thing: object) -> bool:
    """True where anything but the running functions of this thread seems to refer to `thing`, directly or not.

    What a running function of another thread keeps in a variable counts, and a function that is suspended, since
    another thread may go on with it. May say so wrongly, where the trail is long; never the opposite, but for what
    a library written in C holds.
    """
    elsewhere = {
        id(value)
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
        for value in _variables(frame)
    }
    seen: set[int] = set()
    found: list[object] = [thing]
    for _ in range(_SEARCH_DEPTH):
        if any(id(one) in elsewhere for one in found):
            return True
        seen.update(map(id, found))
        seen.add(id(found))
        referrers = gc.get_referrers(*found)
        seen.add(id(referrers))
        found = [one for one in referrers if id(one) not in seen and not isinstance(one, FrameType)]
        del referrers
        if any(_is_root(one) for one in found):
            return True
        found = [one for one in found if not _is_running(one)]
        if not found:
            return False
    return True


def _variables(frame: FrameType | None) -> list[object]:
    values: list[object] = []
    while frame is not None:
        values += frame.f_locals.values()
        frame = frame.f_back
    return values


def _is_running(thing: object) -> bool:
    """A generator or coroutine that runs is on a stack: what it holds, its own thread holds."""
    return bool(getattr(thing, "gi_running", False) or getattr(thing, "cr_running", False))


def _is_root(thing: object) -> bool:
    """True for what may be reached from anywhere: a module's variables, a function that is suspended."""
    if isinstance(thing, GeneratorType | CoroutineType | AsyncGeneratorType):
        return not _is_running(thing)
    return isinstance(thing, dict) and "__builtins__" in thing
