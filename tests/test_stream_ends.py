"""A stream's end, however it is left: the pyramid is free within a round, and nothing waits for the collector."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pyramid_rt
from pyramid_rt import BusyError, GenerationResult, InputError, Pyramid, running
from pyramid_rt.streaming import Stream

PROMPT = "for i in range("
OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True}
SHORT: dict[str, Any] = {"max_new_tokens": 3, "ignore_eos": True}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Objects freed here are freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def expected(tiny: Pyramid) -> list[int]:
    return tiny.generate(PROMPT, **SHORT).tokens


def free(rt: Pyramid, expected: list[int]) -> None:
    """The next call is served, in this thread and in another one."""
    assert rt._gate.holder() is None
    assert rt.generate(PROMPT, **SHORT).tokens == expected
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: rt.generate(PROMPT, **SHORT).tokens).result(20) == expected


def by_break(rt: Pyramid) -> None:
    for _ in rt.stream(PROMPT, **OPTIONS):
        break


def by_return(rt: Pyramid) -> str:
    for piece in rt.stream(PROMPT, **OPTIONS):
        return piece
    return ""


def by_exception(rt: Pyramid) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_while_reading(rt)


def fail_while_reading(rt: Pyramid) -> None:
    for _ in rt.stream(PROMPT, **OPTIONS):
        raise ZeroDivisionError


def by_a_generator_that_is_dropped(rt: Pyramid) -> None:
    def pieces() -> Iterator[str]:
        yield from rt.stream(PROMPT, **OPTIONS)

    next(pieces())


def by_del(rt: Pyramid) -> None:
    stream = rt.stream(PROMPT, **OPTIONS)
    next(stream)
    del stream


WAYS = (by_break, by_return, by_exception, by_a_generator_that_is_dropped, by_del)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threaded", [False, True])
def test_leaving_a_loop(
    tiny: Pyramid, expected: list[int], way: Callable[[Pyramid], Any], threaded: bool
) -> None:
    if threaded:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(way, tiny).result(20)
    else:
        way(tiny)
    free(tiny, expected)


async def until_free(rt: Pyramid) -> None:
    """An asynchronous stream that was left ends in its own thread, after its round."""
    end = time.monotonic() + 10
    while rt._gate.holder() is not None:
        assert time.monotonic() < end, "the pyramid is still taken"
        await asyncio.sleep(0.002)


async def async_break(rt: Pyramid) -> None:
    async for _ in rt.astream(PROMPT, **OPTIONS):
        break


async def async_return(rt: Pyramid) -> str:
    async for piece in rt.astream(PROMPT, **OPTIONS):
        return piece
    return ""


async def async_exception(rt: Pyramid) -> None:
    async def read() -> None:
        async for _ in rt.astream(PROMPT, **OPTIONS):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await read()


async def async_generator_closed(rt: Pyramid) -> None:
    """As a web server closes a response's body when its client goes away."""

    async def body() -> AsyncIterator[str]:
        async for piece in rt.astream(PROMPT, **OPTIONS):
            yield piece

    pieces = body()
    await anext(pieces)
    await pieces.aclose()  # type: ignore[attr-defined]


async def task_cancelled_between_pieces(rt: Pyramid) -> None:
    reading = asyncio.Event()

    async def read() -> None:
        async for _ in rt.astream(PROMPT, **OPTIONS):
            reading.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def task_cancelled_while_it_waits(rt: Pyramid) -> None:
    async def read() -> None:
        async for _ in rt.astream(PROMPT, **{**OPTIONS, "max_new_tokens": 230}):
            pass

    task = asyncio.create_task(read())
    while rt._gate.holder() is None:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def agenerate_cancelled(rt: Pyramid) -> None:
    task = asyncio.create_task(rt.agenerate(PROMPT, **{**OPTIONS, "max_new_tokens": 230}))
    while rt._gate.holder() is None:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "way",
    [
        async_break,
        async_return,
        async_exception,
        async_generator_closed,
        task_cancelled_between_pieces,
        task_cancelled_while_it_waits,
        agenerate_cancelled,
    ],
)
def test_leaving_an_asynchronous_loop(
    tiny: Pyramid, expected: list[int], way: Callable[[Pyramid], Any]
) -> None:
    async def main() -> None:
        await way(tiny)
        found = await asyncio.wait_for(tiny.agenerate(PROMPT, **SHORT), 20)
        assert found.tokens == expected
        await until_free(tiny)

    asyncio.run(main())
    free(tiny, expected)


def test_a_cancelled_task_goes_on_at_once_and_decodes_again(tiny: Pyramid, expected: list[int]) -> None:
    """As an editor does on every keystroke: the next call of the same task queues behind the round that ends."""

    async def main() -> None:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(
                    tiny.agenerate(PROMPT, **{**OPTIONS, "max_new_tokens": 230}), timeout=0.02
                )
            stream = tiny.astream(PROMPT, **{**OPTIONS, "max_new_tokens": 230})
            await anext(stream)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read_all(stream), timeout=0.02)
        assert (await tiny.agenerate(PROMPT, **SHORT)).tokens == expected

    async def read_all(stream: AsyncIterator[str]) -> None:
        async for _ in stream:
            pass

    asyncio.run(main())


def test_a_held_stream_queues_other_threads_and_refuses_its_own(tiny: Pyramid, expected: list[int]) -> None:
    stream = tiny.stream(PROMPT, **OPTIONS)
    for _ in stream:
        break
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(lambda: tiny.generate(PROMPT, **SHORT).tokens)
        with pytest.raises(BusyError, match="own stream"):
            tiny.generate(PROMPT, **SHORT)
        assert not waits.done()
        stream.close()
        assert waits.result(20) == expected
    assert stream.result.finish_reason == "cancelled"


def test_a_stream_moves_from_thread_to_thread(tiny: Pyramid) -> None:
    full = tiny.generate(PROMPT, **OPTIONS)
    pools = [ThreadPoolExecutor(1) for _ in range(3)]
    stream, pieces, turn = tiny.stream(PROMPT, **OPTIONS), [], 0
    queued = None
    while (piece := pools[turn % 3].submit(next, stream, None).result(20)) is not None:
        pieces.append(piece)
        if turn == 0:  # its first reader gets another request meanwhile, which waits its turn
            queued = pools[0].submit(lambda: tiny.generate(PROMPT, **SHORT).tokens)
            pools.append(pools.pop(0))
            pools = [pools[0], pools[1], pools[0]]
        turn += 1
    assert queued is not None
    assert queued.result(20) == full.tokens[:3]
    assert "".join(pieces) == full.text
    assert stream.result.tokens == full.tokens


def test_the_stream_holds_neither_pyramid_nor_request_when_it_is_over(tiny_dir: Path) -> None:
    rt = pyramid_rt.load(tiny_dir, device="cpu")
    tier = weakref.ref(rt.tiers[-1])
    finished, closed, unstarted = (rt.stream(PROMPT, **SHORT) for _ in range(3))
    list(finished)
    next(closed)
    closed.close()
    rt.close()
    assert tier() is None, "a stream that is held keeps the weights"
    assert finished.result.tokens
    assert closed.result.finish_reason == "cancelled"
    with pytest.raises(BusyError, match="closed"):
        next(unstarted)


# The end of `with load(...)`


def test_an_error_of_the_application_comes_through(tiny_dir: Path) -> None:
    rt = pyramid_rt.load(tiny_dir, device="cpu")
    stream = rt.stream(PROMPT, **OPTIONS)

    def application() -> None:
        with rt:
            for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        application()
    with pytest.raises(BusyError, match="closed"):
        rt.generate(PROMPT)
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []


def test_the_end_of_with_ends_a_stream_of_another_thread_and_refuses_who_waits(tiny_dir: Path) -> None:
    reading, leave = threading.Event(), threading.Event()
    streams: list[Stream] = []

    def read(rt: Pyramid) -> list[str]:
        streams.append(rt.stream(PROMPT, **OPTIONS))
        pieces = [next(streams[0])]
        reading.set()
        leave.wait(20)
        return pieces + list(streams[0])

    with ThreadPoolExecutor(2) as pool:
        with pyramid_rt.load(tiny_dir, device="cpu") as rt:
            reader = pool.submit(read, rt)
            reading.wait(20)
            waits = pool.submit(rt.generate, PROMPT)
            while not rt._gate._waiting:
                time.sleep(0.001)
        with pytest.raises(BusyError, match="closed"):
            waits.result(20)
        leave.set()
        assert len(reader.result(20)) == 1
    assert streams[0].result.finish_reason == "cancelled"


def test_the_end_of_with_ends_an_asynchronous_stream(tiny_dir: Path) -> None:
    async def main() -> None:
        with pyramid_rt.load(tiny_dir, device="cpu") as rt:
            stream = rt.astream(PROMPT, **OPTIONS)
            await anext(stream)
        assert [piece async for piece in stream] == []
        assert stream.result.finish_reason == "cancelled"

    asyncio.run(main())


def test_closing_lets_the_calls_before_it_finish(tiny_dir: Path) -> None:
    rt = pyramid_rt.load(tiny_dir, device="cpu")
    with ThreadPoolExecutor(4) as pool:
        first = rt.stream(PROMPT, **OPTIONS)
        pool.submit(next, first).result(20)
        queued = [pool.submit(rt.generate, PROMPT, **SHORT) for _ in range(2)]
        while len(rt._gate._waiting) < 2:
            time.sleep(0.001)
        closing = pool.submit(rt.close)
        while len(rt._gate._waiting) < 3:
            time.sleep(0.001)
        first.close()
        assert [len(call.result(20).tokens) for call in queued] == [3, 3]
        closing.result(20)
    with pytest.raises(BusyError, match="closed"):
        rt.generate(PROMPT)


# Time


def test_a_running_call_ends_in_time(tiny: Pyramid) -> None:
    long = tiny.generate(PROMPT, max_new_tokens=230, ignore_eos=True)
    result = tiny.generate(PROMPT, max_new_tokens=230, ignore_eos=True, max_time=1e-4)
    assert result.finish_reason == "timeout"
    assert len(result.tokens) < 230
    assert result.tokens == long.tokens[: len(result.tokens)]
    assert long.text.startswith(result.text)
    assert tiny.generate(PROMPT, **SHORT, max_time=60).finish_reason == "length"


def test_time_ends_a_stream_after_the_round_it_is_in(tiny: Pyramid, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pyramid_rt.streaming.time.monotonic", lambda: now[0])
    stream = tiny.stream(PROMPT, **OPTIONS, max_time=10.0)
    pieces = [next(stream), next(stream)]
    now[0] = 10.0
    pieces += list(stream)
    assert stream.result.finish_reason == "timeout"
    assert "".join(pieces) == stream.result.text
    assert 0 < len(stream.result.tokens) < 60


def test_the_wait_counts_and_ends_in_time(tiny: Pyramid, expected: list[int]) -> None:
    first = tiny.stream(PROMPT, **OPTIONS)
    next(first)
    with ThreadPoolExecutor(1) as pool:
        begin = time.monotonic()
        waited = pool.submit(tiny.generate, PROMPT, **OPTIONS, max_time=0.2, logprobs=1).result(20)
        took = time.monotonic() - begin
    assert 0.2 <= took < 5
    assert (waited.text, waited.tokens, waited.finish_reason) == ("", [], "timeout")
    assert waited.logprobs == []
    assert waited.stats.seconds == 0.0
    assert [tier.name for tier in waited.stats.tiers] == ["draft", "qualifier", "target"]
    first.close()
    free(tiny, expected)


def test_a_waiting_call_is_cancelled_at_once(tiny: Pyramid, expected: list[int]) -> None:
    first, second = tiny.stream(PROMPT, **OPTIONS), tiny.stream(PROMPT, **OPTIONS)
    next(first)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(list, second)
        while not tiny._gate._waiting:
            time.sleep(0.001)
        begin = time.monotonic()
        second.close()
        assert waits.result(20) == []
        assert time.monotonic() - begin < 5
    assert second.result.finish_reason == "cancelled"
    assert second.result.tokens == []

    async def main() -> None:
        task = asyncio.create_task(tiny.agenerate(PROMPT, **OPTIONS))
        while not tiny._gate._waiting:
            await asyncio.sleep(0.001)
        begin = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while tiny._gate._waiting:
            await asyncio.sleep(0.001)
        assert time.monotonic() - begin < 5

    asyncio.run(main())
    first.close()
    free(tiny, expected)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_wrong_time_is_refused(tiny: Pyramid, value: Any) -> None:
    with pytest.raises(InputError, match="max_time must be a number"):
        tiny.generate(PROMPT, max_time=value)


def test_a_long_prompt_ends_between_its_parts(tiny: Pyramid, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt may take longer than the time there is: it is given up, and what was processed stands."""
    monkeypatch.setattr("pyramid_rt.decoding.engine.PREFILL_CHUNK", 8)
    prompt = list(range(100, 160))
    expected = tiny.generate(prompt, **SHORT).tokens
    tiny.generate([1, 2, 3], **SHORT)
    asked = iter(range(1000))
    stream = tiny.stream(prompt, **SHORT)
    monkeypatch.setattr(stream._ending, "reason", lambda: "timeout" if next(asked) > 3 else None)
    assert list(stream) == []
    result: GenerationResult = stream.result
    assert (result.tokens, result.finish_reason, result.stats.time_to_first_token) == ([], "timeout", None)
    monkeypatch.undo()
    assert tiny.generate(prompt, **SHORT).tokens == expected


def test_the_last_text_comes_before_the_device_is_waited_for(
    tiny: Pyramid, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str) -> Callable[[running.Run], Any]:
        method = getattr(running.Run, name)

        def run(self: running.Run) -> Any:
            order.append(name)
            return method(self)

        return run

    monkeypatch.setattr(running.Run, "flush", noted("flush"))
    monkeypatch.setattr(running.Run, "close", noted("close"))
    # A stop string that never comes keeps the last characters back.
    text = tiny.generate(PROMPT, **SHORT).text
    order.clear()
    stream = tiny.stream(PROMPT, **SHORT, stop=[text[-1] + "\0"])
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if piece == text[-1]:
            assert order == ["flush"]
    assert "".join(pieces) == text
    assert order == ["flush", "close"]
