"""Streams, threads, cancelling and asyncio."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from pathlib import Path

import pytest

import pyramid_rt
from pyramid_rt import BusyError, WeightsError
from pyramid_rt.gate import Gate
from pyramid_rt.running import Run

PROMPT = "for i in range("
OPTIONS = {"max_new_tokens": 60, "ignore_eos": True}


@pytest.fixture
def expected(tiny):
    return tiny.generate(PROMPT, **OPTIONS)


def test_pieces_add_up(tiny, expected):
    stream = tiny.stream(PROMPT, **OPTIONS)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == expected.text == stream.result.text
    assert stream.result.tokens == expected.tokens
    assert list(stream) == []


def test_options_are_checked_before_iteration(tiny):
    with pytest.raises(ValueError, match="temperature"):
        tiny.stream(PROMPT, temperature=-1)


def test_closing_a_stream_stops_the_work(tiny, expected):
    stream = tiny.stream(PROMPT, **OPTIONS)
    first = next(stream)
    with pytest.raises(BusyError, match="no result"):
        _ = stream.result
    stream.close()
    stream.close()
    result = stream.result
    assert result.finish_reason == "cancelled"
    assert 0 < len(result.tokens) < 60
    assert result.tokens == expected.tokens[: len(result.tokens)]
    assert expected.text.startswith(result.text)
    assert result.text.startswith(first)
    assert tiny.generate(PROMPT, **OPTIONS).tokens == expected.tokens


def test_a_stream_that_never_began_can_be_closed(tiny, expected):
    tiny.stream(PROMPT, **OPTIONS).close()
    assert tiny.generate(PROMPT, **OPTIONS).tokens == expected.tokens


def test_a_dropped_stream_lets_the_next_call_in(tiny, expected):
    stream = tiny.stream(PROMPT, **OPTIONS)
    next(stream)
    del stream
    gc.collect()
    assert tiny.generate(PROMPT, **OPTIONS).tokens == expected.tokens


def test_decoding_inside_the_own_stream_is_an_error_not_a_deadlock(tiny, expected):
    with tiny.stream(PROMPT, **OPTIONS) as stream:
        next(stream)
        with pytest.raises(BusyError, match="own stream"):
            tiny.generate(PROMPT)
        with pytest.raises(BusyError, match="own stream"):
            tiny.close()
        rest = list(stream)
    assert rest
    assert stream.result.tokens == expected.tokens


def test_cancel_from_another_thread(tiny):
    stream = tiny.stream(PROMPT, **OPTIONS)
    next(stream)
    helper = threading.Thread(target=stream.cancel)
    helper.start()
    helper.join()
    for _ in stream:
        pass
    assert stream.result.finish_reason == "cancelled"


def test_threads_queue(tiny):
    prompts = [f"x{i} = " for i in range(6)]
    alone = [tiny.generate(prompt, **OPTIONS).tokens for prompt in prompts]
    found: dict[int, list[int]] = {}

    def work(index):
        found[index] = tiny.generate(prompts[index], **OPTIONS).tokens

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[index] for index in range(len(prompts))] == alone


def test_asyncio(tiny, expected):
    async def main():
        stream = tiny.astream(PROMPT, **OPTIONS)
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == expected.text
        assert stream.result.tokens == expected.tokens
        results = await asyncio.gather(*(tiny.agenerate(PROMPT, **OPTIONS) for _ in range(3)))
        assert [result for result in results if result.tokens != expected.tokens] == []

    asyncio.run(main())


def test_asyncio_nested_in_one_task_is_an_error(tiny):
    async def main():
        async with tiny.astream(PROMPT, **OPTIONS) as stream:
            await anext(stream)
            with pytest.raises(BusyError, match="own stream"):
                await tiny.agenerate(PROMPT, **OPTIONS)

    asyncio.run(main())


def test_asyncio_close_and_task_cancellation(tiny, expected):
    async def main():
        stream = tiny.astream(PROMPT, **OPTIONS)
        await anext(stream)
        await stream.aclose()
        assert stream.result.finish_reason == "cancelled"
        task = asyncio.create_task(tiny.agenerate(PROMPT, **{**OPTIONS, "max_new_tokens": 200}))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        result = await asyncio.wait_for(tiny.agenerate(PROMPT, **OPTIONS), timeout=60)
        assert result.tokens == expected.tokens

    asyncio.run(main())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interruption_inside_a_round_leaves_a_result(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int
) -> None:
    """Ctrl-C strikes while a piece is awaited; nearly all of the time goes there."""
    with pyramid_rt.load(tiny_dir, device="cpu") as rt:
        whole = rt.generate("x = ", max_new_tokens=40, ignore_eos=True)
        step, calls = Run.step, 0

        def interrupted(self: Run) -> str:
            nonlocal calls
            calls += 1
            if calls > after:
                raise error
            return step(self)

        with monkeypatch.context() as context:
            context.setattr(Run, "step", interrupted)
            stream = rt.stream("x = ", max_new_tokens=40, ignore_eos=True)
            with pytest.raises(error):
                list(stream)
        stream.close()
        result = stream.result
        assert result.finish_reason == "cancelled"
        assert bool(result.tokens) == (after > 0)
        assert result.tokens == whole.tokens[: len(result.tokens)]
        assert whole.text.startswith(result.text)
        assert rt.generate("x = ", max_new_tokens=40, ignore_eos=True).tokens == whole.tokens


def test_an_interruption_while_waiting_leaves_a_result(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with pyramid_rt.load(tiny_dir, device="cpu") as rt:
        stream = rt.stream("x = ", max_new_tokens=4)
        with monkeypatch.context() as context:
            context.setattr(Gate, "enter", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.tokens == []


def test_a_start_that_fails_lets_the_next_call_in(tmp_path: Path) -> None:
    """Weights of a tier are read when a call first needs it, and may be gone by then."""
    demo = Path(shutil.copytree(pyramid_rt.demo_weights(), tmp_path / "demo"))
    with pyramid_rt.load(demo, device="cpu", max_seq=64) as rt:
        missing = demo / "qualifier" / "model.safetensors"
        missing.rename(tmp_path / "kept")
        stream = rt.stream("x = ", method="psd", max_new_tokens=4)
        with pytest.raises(WeightsError):
            next(stream)
        assert rt.generate("x = ", method="ar", max_new_tokens=4, max_time=20.0).finish_reason != "timeout"
        (tmp_path / "kept").rename(missing)
        assert rt.generate("x = ", method="psd", max_new_tokens=4, ignore_eos=True).tokens
