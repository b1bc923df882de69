"""Streams: text as it is committed, for threads and for asyncio; and the gate that queues calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pyramid_rt.errors import BusyError

if TYPE_CHECKING:
    from pyramid_rt.result import GenerationResult

Work = Generator[str, None, "GenerationResult"]


class Gate:
    """One caller at a time; others queue. A caller that already holds it gets an error, not a deadlock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: object | None = None
        self.closed = False

    def enter(self, owner: object) -> None:
        """Wait for the turn of `owner`. Raises BusyError when it holds the gate, or when the gate is closed."""
        if self._owner is not None and self._owner == owner:
            raise BusyError(
                "this thread's own stream is still open: finish or close it before decoding again"
            )
        self._lock.acquire()
        if self.closed:
            self._lock.release()
            raise BusyError("the pyramid is closed")
        self._owner = owner

    def leave(self) -> None:
        """Let the next one in. May be called from another thread than `enter`."""
        self._owner = None
        self._lock.release()


class Stream(Iterator[str]):
    """Pieces of text as they are committed; never part of a UTF-8 character, never part of a stop string.

    Nothing runs before the first piece is asked for. Closing it (also by `with`, or by dropping the last
    reference) stops the work and lets the next call in. `result` is there once it has ended or was closed.
    """

    def __init__(
        self, work: Callable[[Callable[[], bool]], Work], gate: Gate, owner: object | None = None
    ) -> None:
        self._make, self._gate, self._owner = work, gate, owner
        self._work: Work | None = None
        self._turn = threading.RLock()  # another thread may close what this one reads
        self._over = False
        self._cancelled = False
        self._result: GenerationResult | None = None

    @property
    def result(self) -> GenerationResult:
        """The finished generation. Raises BusyError while it runs, or where it failed before any result."""
        if self._result is None:
            raise BusyError("the stream has no result: it has not ended, was never started, or failed")
        return self._result

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._turn:
            if self._over:
                raise StopIteration
            if self._work is None:
                self._gate.enter(self._owner or threading.get_ident())
                self._work = self._make(lambda: self._cancelled)
            try:
                return next(self._work)
            except StopIteration as end:
                self._result = end.value
                self._finish()
                raise StopIteration from None
            except BaseException:
                self._finish()
                raise

    def cancel(self) -> None:
        """From any thread: let the generation end after the round it is in. Returns at once."""
        self._cancelled = True

    def close(self) -> None:
        """Stop the work and wait until it has stopped. The result then covers what had been committed."""
        self.cancel()
        with self._turn:
            if self._work is None:
                self._over = True
            # The work sees the flag, yields nothing more and returns its result.
            for _ in self:
                pass

    def _finish(self) -> None:
        self._over = True
        if self._work is not None:
            self._work.close()
        self._gate.leave()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._over and self._work is not None:
            self.close()


class AsyncStream(AsyncIterator[str]):
    """The same for asyncio: the work runs in a thread of its own, the event loop stays free."""

    def __init__(self, make: Callable[[object], Stream]) -> None:
        self._make = make
        self._stream: Stream | None = None
        self._thread: ThreadPoolExecutor | None = None

    @property
    def result(self) -> GenerationResult:
        """As `Stream.result`."""
        if self._stream is None:
            raise BusyError("the stream has no result: it was never started")
        return self._stream.result

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        if self._stream is None:
            # The task, not the pool's thread, is who would wait for itself.
            self._stream = self._make(asyncio.current_task())
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="pyramid-rt")
        if self._thread is None:
            raise StopAsyncIteration
        try:
            piece = await asyncio.get_running_loop().run_in_executor(self._thread, self._next)
        except Exception:
            self._release()
            raise
        if piece is None:
            self._release()
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Stop the work and wait until it has stopped."""
        if self._thread is not None and self._stream is not None:
            self._stream.cancel()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._stream.close)
            self._release()

    def _next(self) -> str | None:
        assert self._stream is not None
        return next(self._stream, None)

    def _release(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
