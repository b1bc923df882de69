"""The queue in front of a pyramid: order, giving up, closing, and who would wait for itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyramid_rt import BusyError
from pyramid_rt.gate import Caller, Gate, Visit, held_elsewhere

SOON = 0.05  # seconds within which a call that gives up is back


def started(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def waiting(gate: Gate, count: int) -> None:
    """Wait until this many visits are in the queue."""
    end = time.monotonic() + 10
    while len(gate._waiting) != count:
        assert time.monotonic() < end, f"{len(gate._waiting)} wait, expected {count}"
        time.sleep(0.001)


class Reader:
    """Stands for a stream: what somebody must go on asking."""


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_first_come_first_served(gate: Gate) -> None:
    order: list[int] = []
    first = Visit()
    assert gate.enter(first, Caller.current())

    def work(number: int) -> None:
        visit = Visit()
        assert gate.enter(visit, Caller.current())
        order.append(number)
        gate.leave(visit)

    threads = []
    for number in range(8):
        threads.append(started(lambda number=number: work(number)))  # type: ignore[misc]
        waiting(gate, number + 1)
    gate.leave(first)
    for thread in threads:
        thread.join(10)
    assert order == list(range(8))


def test_who_leaves_the_queue_does_not_hold_up_the_others(gate: Gate) -> None:
    first, third = Visit(), Visit()
    gate.enter(first, Caller.current())
    found: dict[str, bool] = {}
    last = started(lambda: found.update(third=gate.enter(third, Caller.current())))
    waiting(gate, 1)
    gate._waiting.clear()  # it stays in line behind those that come now
    took = []
    for _ in range(5):
        second = Visit()
        thread = started(lambda second=second: found.update(second=gate.enter(second, Caller.current())))  # type: ignore[misc]
        waiting(gate, 1)
        gate._waiting.append(third)
        begin = time.monotonic()
        gate.withdraw(second)
        thread.join(10)
        took.append(time.monotonic() - begin)
        assert found == {"second": False}
        gate._waiting.remove(third)
    assert min(took) < SOON  # the others may be the machine's
    gate._waiting.append(third)
    gate.leave(first)
    last.join(10)
    assert found == {"second": False, "third": True}
    assert gate.holder() is third


def test_a_turn_that_does_not_come_in_time(gate: Gate) -> None:
    gate.enter(Visit(), Caller.current())
    late = []
    for _ in range(5):
        until = time.monotonic() + 0.05
        assert not gate.enter(Visit(), Caller.current(), until=until)
        late.append(time.monotonic() - until)
    assert min(late) >= 0
    assert min(late) < SOON
    assert not gate._waiting


def test_a_free_gate_asks_for_no_time(gate: Gate) -> None:
    visit = Visit()
    assert gate.enter(visit, Caller.current(), until=time.monotonic() - 1)
    assert gate.holder() is visit


def test_shutting_refuses_who_waits_and_lets_the_last_one_in(gate: Gate) -> None:
    first, last = Visit(), Visit()
    gate.enter(first, Caller.current())
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            gate.enter(Visit(), Caller.current())
        except BusyError as error:
            errors.append(error)

    threads = [started(wait) for _ in range(3)]
    waiting(gate, 3)
    assert gate.shut(last)
    assert not gate.shut()
    for thread in threads:
        thread.join(10)
    assert [str(error) for error in errors] == ["the pyramid is closed"] * 3
    with pytest.raises(BusyError, match="closed"):
        gate.enter(Visit(), Caller.current())
    gate.leave(first)
    gate.wait(last, Caller.current())
    assert gate.holder() is last


def test_leaving_while_another_enters_loses_nobody(gate: Gate) -> None:
    """A visit may leave at any instant of another's coming: a dropped stream does, in whatever thread."""

    class Leaving(Visit):
        def wake(self) -> None:
            gate.leave(first)
            super().wake()

    first = Visit()
    gate.enter(first, Caller.current())
    queue, real = gate._waiting, gate._queue

    def queued(visit: Visit) -> None:
        gate.leave(first)  # between the look at the closed gate and the place in the queue
        real(visit)

    gate._queue = queued  # type: ignore[method-assign]
    second = Visit()
    assert gate.enter(second, Caller.current())
    assert not queue


def test_many_threads_and_no_two_inside(gate: Gate) -> None:
    within, most, done = [], [0], []

    def work() -> None:
        for turn in range(50):
            visit = Visit()
            until = time.monotonic() + 0.002 if turn % 5 == 0 else None
            if not gate.enter(visit, Caller.current(), until=until):
                continue
            within.append(1)
            most[0] = max(most[0], len(within))
            within.pop()
            gate.leave(visit)
            gate.leave(visit)  # of no effect
        done.append(1)

    threads = [started(work) for _ in range(8)]
    for thread in threads:
        thread.join(60)
    assert (len(done), most, within) == (8, [1], [])
    assert gate.holder() is None


# Who would wait for itself


def own(gate: Gate, stream: object) -> Visit:
    """A visit of this thread's own stream, half read."""
    visit = Visit()
    visit.read_by(stream)
    gate.enter(visit, Caller.current())
    visit.reader = Caller.current()
    return visit


def test_the_own_stream_is_an_error_in_its_thread_and_a_turn_in_others(gate: Gate) -> None:
    stream = Reader()
    visit = own(gate, stream)
    pool = ThreadPoolExecutor(1)
    idle = pool.submit(threading.get_ident).result()  # there is another thread, which knows nothing of it
    assert idle != threading.get_ident()
    with pytest.raises(BusyError, match="own stream"):
        gate.enter(Visit(), Caller.current())
    assert not gate._waiting
    other = pool.submit(lambda: gate.enter(Visit(), Caller.current()))
    waiting(gate, 1)
    gate.leave(visit)
    assert other.result(10)
    pool.shutdown()


def test_a_stream_that_another_thread_read_last_is_waited_for(gate: Gate) -> None:
    stream = Reader()
    visit = own(gate, stream)

    def read() -> None:
        visit.reader = Caller.current()
        waiting(gate, 1)
        gate.leave(visit)

    thread = started(read)
    while visit.reader is not None and visit.reader.thread() is threading.current_thread():
        time.sleep(0.001)
    assert gate.enter(Visit(), Caller.current())
    thread.join(10)


def test_a_stream_that_another_thread_holds_is_waited_for(gate: Gate) -> None:
    stream = Reader()
    visit = own(gate, stream)
    go_on = threading.Event()

    def take_over(handed: Reader) -> None:
        go_on.wait(10)
        waiting(gate, 1)
        assert handed is not None
        gate.leave(visit)

    thread = threading.Thread(target=take_over, args=(stream,), daemon=True)
    thread.start()
    go_on.set()
    assert gate.enter(Visit(), Caller.current())
    thread.join(10)


def test_the_patience_for_a_stream_that_nobody_takes_over_ends(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyramid_rt.gate.PATIENCE_SECONDS", 0.2)
    stop = threading.Event()
    stream = Reader()
    holder = [stream]
    thread = threading.Thread(target=lambda kept: stop.wait(10), args=(holder,), daemon=True)
    thread.start()
    own(gate, stream)
    begin = time.monotonic()
    with pytest.raises(BusyError, match="own stream"):
        gate.enter(Visit(), Caller.current())
    assert time.monotonic() - begin >= 0.2
    stop.set()
    thread.join(10)


def test_work_that_calls_back_is_an_error(gate: Gate) -> None:
    visit = Visit()
    gate.enter(visit, Caller.current())
    visit.reader = Caller.current()
    with pytest.raises(BusyError, match="own stream"):
        gate.enter(Visit(), Caller.current())


def test_a_blocking_call_in_the_thread_of_an_event_loop(gate: Gate) -> None:
    """It would keep the loop from ever going on with the other task's stream."""

    async def main() -> None:
        stream = Reader()

        async def read() -> None:
            visit = Visit()
            visit.read_by(stream)
            gate.enter(visit, Caller.current())
            visit.reader = Caller.current()

        await asyncio.create_task(read())
        with pytest.raises(BusyError, match="own stream"):
            gate.enter(Visit(), Caller.current())
        gate.refuse_deadlock(Caller.current(), blocking=False)  # this task may wait for the other

    asyncio.run(main())


class Box:
    def __init__(self, thing: object) -> None:
        self.thing = thing


KEPT: list[object] = []


def test_what_only_running_functions_hold_is_not_held_elsewhere() -> None:
    thing = Reader()
    wrapped = [enumerate([]), contextlib.closing(thing)]  # type: ignore[type-var]
    bound = Box(thing)
    assert bound.thing is thing
    assert wrapped
    gc.collect()
    assert not held_elsewhere(thing)


def test_what_others_hold_is_held_elsewhere() -> None:
    thing = Reader()
    KEPT.append(Box(thing))
    assert held_elsewhere(thing)
    KEPT.clear()
    assert not held_elsewhere(thing)

    def generator(kept: object) -> Generator[int, None, None]:
        yield 1
        yield 2
        assert kept

    suspended = generator(thing)
    next(suspended)
    assert held_elsewhere(thing)
    suspended.close()
    assert not held_elsewhere(thing)
    go_on = threading.Event()

    def hold(kept: object) -> None:
        go_on.wait(10)
        assert kept

    pool = ThreadPoolExecutor(1)
    work = pool.submit(hold, thing)
    while not work.running():
        time.sleep(0.001)
    assert held_elsewhere(thing)
    go_on.set()
    work.result()
    del work
    pool.shutdown()
    assert not held_elsewhere(thing)
