"""Streams: text as it is committed, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from pyramid_rt.errors import BusyError
from pyramid_rt.gate import Caller, Gate, Visit

if TYPE_CHECKING:
    from pyramid_rt.result import FinishReason, GenerationResult

Work = Generator[str, None, "GenerationResult"]


# Errors that do not come from the work, but ask it to end.
INTERRUPTIONS = (KeyboardInterrupt, SystemExit)


class Ending:
    """The wish that a call end before its text does. Set from any thread, looked at between rounds.

    Apart from the stream, so that the work, which the stream holds, need not hold the stream.

    Args:
        max_time: seconds from `begin` on; None for no limit.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self.cancelled = False
        self.partial: GenerationResult | None = None  # of work that was interrupted
        self._max_time = max_time
        self.deadline: float | None = None

    def begin(self) -> None:
        """The call begins: to wait, or to run."""
        if self._max_time is not None:
            self.deadline = time.monotonic() + self._max_time

    def reason(self) -> FinishReason | None:
        """Why it is to end now, or None."""
        if self.cancelled:
            return "cancelled"
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return "timeout" if late else None


class Stream(Iterator[str]):
    """Pieces of text as they are committed; never part of a UTF-8 character, never part of a stop string.

    Nothing runs before the first piece is asked for. Closing it (also by `with`, or by dropping the last
    reference) stops the work and lets the next call in. It may be handed from thread to thread. `result` is there
    once it has ended or was closed.

    Args:
        work: starts the work, once its turn has come.
        unstarted: the result of a call that ended for this reason before its turn came.
        gate: which it waits at.
        ending: which the work looks at.
        runs_alone: whoever begins it reads it to its end, and nobody else sees it.
    """

    def __init__(
        self,
        work: Callable[[], Work],
        unstarted: Callable[[FinishReason], GenerationResult],
        gate: Gate,
        ending: Ending,
        *,
        runs_alone: bool = False,
    ) -> None:
        self._make: Callable[[], Work] | None = work
        self._unstarted = unstarted
        self._gate, self._ending = gate, ending
        self._visit = Visit()
        if not runs_alone:
            self._visit.read_by(self)
        self._work: Work | None = None
        self._turn = threading.RLock()  # another thread may close what this one reads
        self._over = False
        self._result: GenerationResult | None = None

    @property
    def result(self) -> GenerationResult:
        """The finished generation. Raises BusyError while it runs, or where it failed before any result.

        What Ctrl-C interrupted has finished too: it was cancelled, and the result covers what had been committed.
        """
        if self._result is None:
            raise BusyError("the stream has no result: it has not ended, was never started, or failed")
        return self._result

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._turn:
            caller = Caller.current()
            if not self.begin(caller):
                raise StopIteration
            self._visit.reader = caller
            return self._next()

    def begin(self, caller: Caller | None = None, *, blocking: bool = True) -> bool:
        """Wait for the turn, where that has not come yet; whether there is anything to read.

        Args:
            caller: who waits; by default the caller of this.
            blocking: see `Gate.enter`.
        """
        with self._turn:
            if self._over or self._work is not None:
                return not self._over
            assert self._make is not None
            self._ending.begin()
            caller = caller or Caller.current()
            try:
                if self._gate.enter(self._visit, caller, blocking=blocking, until=self._ending.deadline):
                    self._visit.reader = caller if self._visit.needs_reader else Caller.current()
                    self._work = self._make()
                    return True
            except BaseException as error:
                self._fail(error)
                raise
            self._result = self._unstarted("cancelled" if self._ending.cancelled else "timeout")
            self._finish()
            return False

    def read(self, caller: Caller) -> str | None:
        """The next piece for a task, asked for in another thread; None at the end."""
        with self._turn:
            if not self.begin(caller, blocking=False):
                return None
            self._visit.reader = caller
            try:
                return self._next()
            except StopIteration:
                return None

    def cancel(self) -> None:
        """From any thread: let the generation end after the round it is in. Returns at once."""
        self._ending.cancelled = True
        self._gate.withdraw(self._visit)

    def read_by(self, stream: object) -> None:
        """It goes on when `stream` is read; None: by itself, from now on."""
        self._visit.read_by(stream)

    def close(self) -> None:
        """Stop the work and wait until it has stopped. The result then covers what had been committed."""
        self.cancel()
        with self._turn:
            if self._work is None:
                self._finish()
            # The work sees the flag, yields nothing more and returns its result.
            while not self._over:
                with suppress(StopIteration):
                    self._next()

    def end(self) -> None:
        """`close`, under the name that streams of both kinds have it by."""
        self.close()

    def _next(self) -> str:
        assert self._work is not None
        try:
            return next(self._work)
        except StopIteration as end:
            self._result = end.value
            self._finish()
            raise StopIteration from None
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """End by an error; work that Ctrl-C or the end of the program interrupts was cancelled, with its result."""
        if isinstance(error, INTERRUPTIONS):
            self._result = self._ending.partial or self._unstarted("cancelled")
        self._finish()

    def _finish(self) -> None:
        """Forget the work, which holds the pyramid's buffers, and let the next call in."""
        self._over = True
        work, self._work, self._make = self._work, None, None
        try:
            if work is not None:
                work.close()
        finally:
            self._gate.leave(self._visit)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_work", None) is not None:
            self.close()


class AsyncStream(AsyncIterator[str]):
    """The same for asyncio: the work runs in a thread of its own, the event loop stays free.

    A task that is cancelled while it waits for a piece ends the stream, as closing or dropping it does.
    """

    def __init__(self, stream: Stream, gate: Gate) -> None:
        self._stream, self._gate = stream, gate
        stream.read_by(self)
        self._thread: ThreadPoolExecutor | None = None
        self._over = False
        self._closing: Future[None] | None = None

    @property
    def result(self) -> GenerationResult:
        """As `Stream.result`."""
        return self._stream.result

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        if self._over:
            raise StopAsyncIteration
        caller = Caller.current()
        if self._thread is None:
            self._gate.refuse_deadlock(caller, blocking=False)
            self._thread = _thread()
        loop = asyncio.get_running_loop()
        try:
            piece = await loop.run_in_executor(self._thread, self._stream.read, caller)
        except BaseException:
            self._abandon()
            raise
        if piece is None:
            self._over = True
            self._thread.shutdown(wait=False)
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Stop the work and wait until it has stopped."""
        self._abandon()
        if self._closing is not None:
            await asyncio.shield(asyncio.wrap_future(self._closing))

    def end(self) -> None:
        """`aclose` from any thread."""
        self._abandon()
        self._stream.close()

    def _abandon(self) -> None:
        """Let the work end after its round, without waiting for it."""
        if self._over:
            return
        self._over = True
        if self._thread is None:
            self._stream.close()
            return
        self._stream.read_by(None)
        self._stream.cancel()
        try:
            self._closing = self._thread.submit(self._stream.close)
        except RuntimeError:  # the interpreter is going away
            self._stream.close()
        self._thread.shutdown(wait=False)

    def __del__(self) -> None:
        if hasattr(self, "_over"):
            self._abandon()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def run_in_thread(stream: Stream, gate: Gate, run: Callable[[Caller], None]) -> GenerationResult:
    """The result of a stream that `run`, in a thread, begins and reads to its end.

    Cancelling the task returns at once; the work then ends after the round it is in.
    """
    caller = Caller.current()
    gate.refuse_deadlock(caller, blocking=False)
    thread = _thread()
    try:
        await asyncio.get_running_loop().run_in_executor(thread, run, caller)
    except BaseException:
        stream.cancel()
        raise
    finally:
        thread.shutdown(wait=False)
    return stream.result


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="pyramid-rt")
