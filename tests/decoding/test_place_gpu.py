"""Places on a GPU: streams, threads, modes and devices of the application change no token."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pyramid_rt
from pyramid_rt import Pyramid
from pyramid_rt.decoding.place import CudaPlace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]
PROMPT = "def read_config(path):\n"
OPTIONS: dict[str, Any] = {"max_new_tokens": 48, "ignore_eos": True}
BACKENDS = ("triton", "torch")


def load(device: str = "cuda", **options: Any) -> Pyramid:
    """The demo pyramid, whose texts are long enough to matter; float32, where near ties are rare."""
    return pyramid_rt.load(pyramid_rt.demo_weights(), device=device, dtype="float32", max_seq=512, **options)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rt(backend: str) -> Iterator[Pyramid]:
    with load(backend=backend) as pyramid:
        yield pyramid


@pytest.fixture(scope="module")
def expected(rt: Pyramid) -> list[int]:
    return rt.generate(PROMPT, **OPTIONS).tokens


def busy(stream: torch.cuda.Stream) -> None:
    """Keep a stream at work for some ten milliseconds."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)


def test_the_place_names_its_device(rt: Pyramid) -> None:
    assert rt.place.device == torch.device("cuda", torch.cuda.current_device())
    assert isinstance(rt.place, CudaPlace)
    assert rt.place.stream != torch.cuda.current_stream()


def test_a_stream_of_the_callers_own(rt: Pyramid, expected: list[int]) -> None:
    mine = torch.cuda.Stream()
    busy(mine)
    with torch.cuda.stream(mine):
        assert rt.generate(PROMPT, **OPTIONS).tokens == expected
        assert torch.cuda.current_stream() == mine
        pieces = rt.stream(PROMPT, **OPTIONS)
        next(pieces)
    other = torch.cuda.Stream()
    busy(other)
    with torch.cuda.stream(other):
        pieces.close()
    assert rt.generate(PROMPT, **OPTIONS).tokens == expected


def test_a_stream_read_under_changing_streams_and_threads(rt: Pyramid, expected: list[int]) -> None:
    stream = rt.stream(PROMPT, **OPTIONS)
    found: list[str] = []
    over = threading.Event()

    def piece() -> None:
        own = torch.cuda.Stream()
        busy(own)
        with torch.cuda.stream(own):
            text = next(stream, None)
        if text is None:
            over.set()
        else:
            found.append(text)

    while not over.is_set():
        thread = threading.Thread(target=piece)
        thread.start()
        thread.join()
    assert stream.result.tokens == expected
    assert "".join(found) == stream.result.text


def test_another_thread(rt: Pyramid, expected: list[int]) -> None:
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(rt.generate(PROMPT, **OPTIONS).tokens)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize("where", ["load", "first call", "both"])
def test_inference_mode_around_load_or_the_first_call(backend: str, expected: list[int], where: str) -> None:
    with torch.inference_mode(where != "first call"):
        pyramid = load(backend=backend)
    with pyramid:
        with torch.inference_mode(where != "load"):
            assert pyramid.generate(PROMPT, **OPTIONS).tokens == expected
        assert pyramid.generate(PROMPT, **OPTIONS).tokens == expected


@pytest.mark.parametrize("other", ["capture", "allocate"])
def test_a_capture_beside_another_thread(rt: Pyramid, backend: str, expected: list[int], other: str) -> None:
    """A second pyramid captures, or the application allocates, while this one captures and decodes."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def capture() -> None:
        while not stop.is_set():
            with load(backend=backend) as second:
                second.prepare(method="sd", draft_length=3)
                if second.generate(PROMPT, **OPTIONS).tokens != expected:
                    raise AssertionError("the second pyramid's tokens differ")

    def allocate() -> None:
        while not stop.is_set():
            torch.empty(2**22, device="cuda").fill_(1.0)

    def run() -> None:
        try:
            capture() if other == "capture" else allocate()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for length in (2, 3, 5, 6):
            rt.prepare(method="psd", draft_length=length)
            assert rt.generate(PROMPT, **OPTIONS, draft_length=length).tokens == expected
    finally:
        stop.set()
        thread.join()
    assert errors == []


def test_closing_gives_the_device_its_memory_back(backend: str) -> None:
    # cuBLAS keeps a workspace for each stream, and a stream is used again: the second pyramid finds the first one's.
    with load(backend=backend) as first:
        first.generate(PROMPT, **OPTIONS)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    pyramid = load(backend=backend)
    stream = pyramid.stream(PROMPT, **OPTIONS)
    list(stream)
    assert torch.cuda.memory_reserved() > before
    pyramid.close()
    assert (
        torch.cuda.memory_reserved() <= before + 2**21
    )  # torch's smallest block, for what is cached for good
    assert stream.result.tokens


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend: str, expected: list[int]) -> None:
    with load("cuda:1", backend=backend) as second:
        assert torch.cuda.current_device() == 0
        assert second.generate(PROMPT, **OPTIONS).tokens == expected
        assert torch.cuda.current_device() == 0
        found: list[list[int]] = []
        thread = threading.Thread(target=lambda: found.append(second.generate(PROMPT, **OPTIONS).tokens))
        thread.start()
        thread.join()
        assert found == [expected]


def test_a_pyramid_that_closes_leaves_the_graphs_of_another_alone(rt: Pyramid, backend: str) -> None:
    """Graphs hold the addresses of what cuBLAS keeps for the stream that they were captured on."""
    options: dict[str, Any] = {**OPTIONS, "method": "psd", "draft_length": 4}
    expected = rt.generate(PROMPT, **options).tokens
    for _ in range(3):
        with load(backend=backend) as second:
            assert second.generate(PROMPT, **options).tokens == expected
        # Whoever is given the memory that was let go of writes all over it.
        filled = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(24)]
        assert rt.generate(PROMPT, **options).tokens == expected
        del filled


def test_streams_are_used_again(backend: str) -> None:
    with load(backend=backend) as first:
        assert isinstance(first.place, CudaPlace)
        with load(backend=backend) as second:
            assert isinstance(second.place, CudaPlace)
            assert second.place.stream != first.place.stream
            used = second.place.stream
    with load(backend=backend) as third:
        assert isinstance(third.place, CudaPlace)
        assert third.place.stream in (used, first.place.stream)
