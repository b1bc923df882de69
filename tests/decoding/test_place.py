"""Everything that touches the device happens inside the pyramid's place, whoever calls and in whatever mode."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyramid_rt
from pyramid_rt import Pyramid, api
from pyramid_rt.decoding.place import HostPlace, inside
from pyramid_rt.params import SamplingParams
from pyramid_rt.tuning.measuring import device_clock, record, time_passes

PROMPT = "def f(x):"
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "draft_length": 2, "qualifier_length": 3}


class RecordingPlace(HostPlace):
    """Notes who comes in, and for what."""

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        super().__init__(device, threads)
        self.entries: list[tuple[str, int]] = []
        self.within = 0
        self.most = 0

    @contextmanager
    def work(self) -> Iterator[None]:
        with super().work():
            self.entries.append(("work", threading.get_ident()))
            self.within += 1
            self.most = max(self.most, self.within)
            try:
                yield
            finally:
                self.within -= 1

    @contextmanager
    def allocation(self) -> Iterator[None]:
        self.entries.append(("allocation", threading.get_ident()))
        with super().allocation():
            yield

    def trim(self) -> None:
        self.entries.append(("trim", threading.get_ident()))
        super().trim()


class Touches(TorchDispatchMode):
    """Notes torch's operations on memory that this thread runs outside a place."""

    def __init__(self, place: Callable[[], RecordingPlace | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place = place
        self.outside: list[str] = []
        self.inside = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        place = self._place()
        if place is not None and place.within:
            self.inside += 1
        elif not (isinstance(result, Tensor) and result.is_meta):
            self.outside.append(str(func))
        return result


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[RecordingPlace]:
    """The places that `load` makes."""
    places: list[RecordingPlace] = []

    def place_for(device: torch.device, threads: int | None = None) -> RecordingPlace:
        places.append(RecordingPlace(device, threads))
        return places[-1]

    monkeypatch.setattr(api, "place_for", place_for)
    return places


class Calls:
    """Warms up as CUDA's recorder does, and keeps the call."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        work()
        return work


@pytest.mark.parametrize("control", ["host", "device"])
def test_every_entry_of_a_pyramid_stays_inside(
    tiny_dir: Path, made: list[RecordingPlace], control: str
) -> None:
    touches = Touches(lambda: made[-1] if made else None)

    def check(what: str, runs: bool = True) -> None:
        assert not touches.outside, f"{what} runs {sorted(set(touches.outside))} outside the place"
        assert (touches.inside > 0) == runs, what
        touches.inside = 0

    with touches:
        rt = pyramid_rt.load(tiny_dir, device="cpu", control=control)
        check("load")
        rt.prepare(**OPTIONS)
        check("prepare")
        rt.generate(PROMPT, **OPTIONS, temperature=0.5, top_k=4, seed=1)
        check("generate")
        rt.generate(PROMPT, **OPTIONS, logprobs=2)
        check("generate with logprobs")
        with rt.stream(PROMPT, **OPTIONS) as stream:
            next(stream)
            check("a stream's first piece")
        check("a stream's end")
        list(rt.stream(PROMPT, **OPTIONS, stop=["q"]))
        check("a whole stream")
        rt.close()
        check("close", runs=False)
    assert {kind for kind, _ in made[0].entries} == {"work", "allocation", "trim"}


def test_captures_stay_inside(tiny_dir: Path, made: list[RecordingPlace]) -> None:
    base = pyramid_rt.load(tiny_dir, device="cpu", control="device")
    place = made[0]
    rt = Pyramid(
        base.tiers, tokenizer=base.tokenizer, control="device", recorder=Calls(), graphs="step", place=place
    )
    touches = Touches(lambda: place)
    with touches:
        assert rt.prepare(**OPTIONS) > 0
        rt.generate(PROMPT, **OPTIONS)
    assert touches.inside
    assert not touches.outside


def test_what_tune_measures_stays_inside(tiny_dir: Path, made: list[RecordingPlace]) -> None:
    rt = pyramid_rt.load(tiny_dir, device="cpu")
    clock, touches = device_clock(rt.place), Touches(lambda: made[0])
    text = list(range(20))
    with touches:
        record(rt, [1, 2, 3], text, SamplingParams.build({"temperature": 0.5, "seed": 1}), clock)
        assert touches.inside
        before, touches.inside = touches.inside, 0
        time_passes(rt, text, [2, 4, 4], clock, clock())
    assert before
    assert touches.inside
    assert not touches.outside


def test_asyncio_works_in_the_place_of_the_pyramid_in_another_thread(
    tiny_dir: Path, made: list[RecordingPlace]
) -> None:
    rt = pyramid_rt.load(tiny_dir, device="cpu")

    async def main() -> None:
        await rt.agenerate(PROMPT, **OPTIONS)
        async for _ in rt.astream(PROMPT, **OPTIONS):
            pass

    made[0].entries.clear()
    asyncio.run(main())
    assert made[0].entries
    assert threading.get_ident() not in {ident for _, ident in made[0].entries}


def test_a_whole_call_comes_in_once(
    tiny_dir: Path, made: list[RecordingPlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The surroundings of an entry (streams, threads, settings) are then paid for once a call, not once a round."""
    rt = pyramid_rt.load(tiny_dir, device="cpu")
    rt.prepare(**OPTIONS)
    outermost: list[int] = []
    enter = made[0]._enter

    def entered(stack: ExitStack) -> None:
        outermost.append(1)
        enter(stack)

    monkeypatch.setattr(made[0], "_enter", entered)
    rt.generate(PROMPT, **OPTIONS)
    assert len(outermost) == 1


@pytest.mark.parametrize("order", ["load", "first call", "both", "second call"])
def test_inference_mode_of_the_caller_changes_nothing(tiny_dir: Path, tiny: Pyramid, order: str) -> None:
    expected = tiny.generate(PROMPT, **OPTIONS).tokens
    with torch.inference_mode(order in ("load", "both")):
        rt = pyramid_rt.load(tiny_dir, device="cpu")
    with torch.inference_mode(order in ("first call", "both")):
        assert rt.generate(PROMPT, **OPTIONS).tokens == expected
    with torch.inference_mode(order == "second call"):
        assert rt.generate(PROMPT, **OPTIONS).tokens == expected
        assert rt.generate(PROMPT, **OPTIONS, logprobs=1).tokens == expected
    for tier in rt.tiers:
        assert not tier.cache.buffer.is_inference()  # type: ignore[attr-defined]
    assert not next(iter(rt._kept.values())).state.tokens.is_inference()


def test_threads_take_turns_inside_and_may_come_in_again() -> None:
    place = HostPlace(torch.device("cpu"))
    seen: list[str] = []
    came_in = threading.Event()

    def other() -> None:
        came_in.set()
        with place.work():
            seen.append("other")

    thread = threading.Thread(target=other)
    with place.work():
        thread.start()
        came_in.wait()
        with place.work(), place.allocation():
            seen.append("first")
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
    thread.join()
    assert seen == ["first", "other"]
    assert not torch.is_inference_mode_enabled()


def test_an_error_inside_leaves_the_place_open() -> None:
    class Owner:
        def __init__(self) -> None:
            self.place = HostPlace(torch.device("cpu"))

        @inside
        def fail(self) -> None:
            raise ZeroDivisionError

    owner = Owner()
    with pytest.raises(ZeroDivisionError):
        owner.fail()
    entered = threading.Event()

    def enter() -> None:
        with owner.place.work():
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(5)
    assert entered.is_set()
