"""Processes of the kernel check: one that holds the device and may die without harm, and many that compile ahead.

An illegal access leaves a CUDA context unusable for good, and a kernel that never ends blocks it. So tasks run
in a child; when it dies, hangs or says that its device is lost, that is the task's result, and a new child takes
the next one.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from bench.compile_gate.command import StubDriver
from bench.kernel_check.tasks import Row, Task

START_LIMIT = 120.0


class Hands(Protocol):
    """The work of a child; made in the child by a factory."""

    def perform(self, task: Task) -> Iterator[Row]:
        """Run a task."""
        ...

    def broken(self) -> bool:
        """True once the device can no longer be used."""
        ...

    def release(self) -> None:
        """After a failure: free what it left."""
        ...


class DeviceHands:
    """Tasks on a real runtime; counts the kernels that had to be compiled late, in the middle of a task."""

    def __init__(self, device: str) -> None:
        from bench.kernel_check.runtime import make_runtime

        self.runtime, self.late = make_runtime(device), 0
        if device == "cuda":
            from triton import knobs

            def listen(*, cache_hit: bool, **_: Any) -> None:
                self.late += not cache_hit

            knobs.compilation.listener = listen

    def perform(self, task: Task) -> Iterator[Row]:
        """See `gpu_tasks.perform`."""
        from bench.kernel_check.tasks import perform

        for row in perform(task, self.runtime):
            late, self.late = self.late, 0
            yield row | ({"compiled_late": late} if late else {})

    def broken(self) -> bool:
        """A sticky error shows at every call from then on."""
        try:
            self.runtime.synchronize()
        except Exception:
            return True
        return False

    def release(self) -> None:
        """Cached memory, of a task that ran out of it."""
        self.runtime.release()


def serve(connection: Connection, factory: Callable[[str], Hands], device: str) -> None:
    """A child's whole life: tasks in, ("row", row), then ("done", "") or ("failed", text) or ("lost", text) out."""
    try:
        hands = factory(device)
    except BaseException as error:
        connection.send(("lost", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", ""))
    while (task := connection.recv()) is not None:
        try:
            for row in hands.perform(task):
                connection.send(("row", row))
            connection.send(("done", ""))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"[
                :600
            ]
            # Frames hold the task's tensors.
            traceback.clear_frames(error.__traceback__)
            if hands.broken():
                connection.send(("lost", text))
                # The interpreter's own exit would touch the device again.
                connection.close()
                os._exit(1)
            hands.release()
            connection.send(("failed", text))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a task: result, error or time-out.

    Attributes:
        error: "" if it ran to its end.
        lost: the child is gone.
    """

    error: str
    lost: bool


class Worker:
    """A child that is started when it is needed and replaced when it dies.

    Args:
        factory: a function at the top of a module, called in the child with `device`.
    """

    def __init__(self, factory: Callable[[str], Hands], device: str) -> None:
        self._factory, self._device = factory, device
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, task: Task, on_row: Callable[[Row], None], limit: float | None = None) -> Outcome:
        """Run a task; every row goes to `on_row` as it comes.

        Args:
            limit: seconds without a word after which the child counts as hung; the task's own if None.
        """
        limit = task.limit if limit is None else limit
        if self._process is None:
            started = self._start()
            if started.lost:
                return started
        assert self._connection is not None
        self._connection.send(task)
        while True:
            kind, content = self._receive(limit)
            if kind == "row":
                on_row(content)
            elif kind == "lost":
                self.close()
                return Outcome(content, lost=True)
            else:
                return Outcome(content, lost=False)

    def close(self) -> None:
        """End the child, gently if it listens."""
        if self._process is None:
            return
        try:
            if self._connection is not None:
                self._connection.send(None)
        except OSError:
            pass
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Outcome:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=serve, args=(theirs, self._factory, self._device), daemon=True
        )
        self._process.start()
        theirs.close()
        kind, text = self._receive(START_LIMIT)
        if kind == "ready":
            return Outcome("", lost=False)
        self.close()
        return Outcome(text, lost=True)

    def _receive(self, limit: float) -> tuple[str, Any]:
        assert self._connection is not None
        if not self._connection.poll(limit):
            self._process.kill()
            return "lost", f"no answer within {limit:.0f} s"
        try:
            received: tuple[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return "lost", f"the process died with exit status {self._process.exitcode}"
        return received


def compile_task(task: Task, capability: int, launchers: bool) -> int:
    """In a compiling process: put a task's binaries into Triton's cache on disk. The number of them.

    Args:
        capability: of the device; none is touched.
        launchers: build the C launchers too, which needs libcuda.
    """
    import torch
    from triton.runtime import driver

    from bench.kernel_check.cases import DECISION_OPS, build
    from bench.kernel_check.problems.base import Place
    from bench.kernel_check.problems.rounds import NativeRound
    from bench.kernel_check.timed import TIMED
    from bench.kernel_check.timed_decision import TIMED_DECISIONS
    from bench.kernel_check.traffic import STEP_OPS, shape_named

    driver.set_active(StubDriver(capability))
    place = Place(torch.device("meta"), capability)
    whole = task.case is not None and task.case.op == "forward"
    if whole or task.kind == "step":
        # A whole pass. Its case is named after the shape.
        shape = shape_named(task.case.name) if task.case is not None else task.shape
        dtype = task.case.dtype if task.case is not None else task.dtype
        launches = [TIMED[op](shape, dtype, place, 1, task.context).launches(1)[0] for op in STEP_OPS]
    elif task.case is not None and task.case.op == "round":
        launches = NativeRound(task.case, place).launches()
    elif task.case is not None and task.case.op in DECISION_OPS:
        problem = build(task.case, place)
        launches = [launch for length in task.lengths for launch in problem.launches(length)]
    elif task.case is not None:
        launches = build(task.case, place).launches(1)
    elif task.op in TIMED_DECISIONS:
        timed = TIMED_DECISIONS[task.op](task.shape, task.dtype, place, 1, task.context)
        launches = [launch for length in task.lengths for launch in timed.compilable(length)]
    else:
        work = TIMED[task.op](task.shape, task.dtype, place, 1, task.context, task.config)
        launches = work.launches(1)[:1]
    for launch in launches:
        kernel = launch.warmup()
        if launchers:
            _build_launcher(kernel)
    return len(launches)


def _build_launcher(kernel: Any) -> None:
    """Triton 3.6 compiles a C module per signature at the first launch; its cache on disk can be filled here."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:  # the first launch will do it, a little later
        print(f"launcher not built ahead: {type(error).__name__}: {error}", flush=True)


class Compilers:
    """A pool that compiles for tasks in the order they are given, while others run.

    Args:
        workers: processes.
        work: `compile_task`, or a test's own function at the top of a module.
    """

    def __init__(
        self, workers: int, capability: int, launchers: bool, work: Callable[..., int] = compile_task
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context)
        self._capability, self._launchers, self._work = capability, launchers, work
        self._futures: dict[str, Future[int]] = {}

    def ask(self, tasks: list[Task]) -> int:
        """Queue what tasks need, each binary once; the number of jobs."""
        for task in tasks:
            if task.compiles and task.compiles not in self._futures:
                self._futures[task.compiles] = self._pool.submit(
                    self._work, task, self._capability, self._launchers
                )
        return len(self._futures)

    def wait(self, task: Task, limit: float) -> str:
        """Until a task's binaries are there; "" or why they are not. The task may run in any case, only slower."""
        future = self._futures.get(task.compiles)
        if future is None:
            return ""
        try:
            future.result(timeout=max(limit, 0.0))
        except TimeoutError:
            return f"not compiled within {limit:.0f} s"
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:600]
        return ""

    def ready(self, task: Task) -> bool:
        """True where waiting for a task's binaries would take no time."""
        future = self._futures.get(task.compiles)
        return future is None or future.done()

    def progress(self) -> tuple[int, int]:
        """Jobs done and asked for."""
        return sum(future.done() for future in self._futures.values()), len(self._futures)

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
