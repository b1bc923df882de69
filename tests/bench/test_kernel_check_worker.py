"""Processes and timing of bench.kernel_check: children that die, compilers, the order around a capture."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.kernel_check import runtime as gpu_runtime
from bench.kernel_check import worker as gpu_worker
from bench.kernel_check.cases import llama_sizes
from bench.kernel_check.problems.base import Case
from bench.kernel_check.runtime import Sample
from bench.kernel_check.tasks import Row, Task
from pyramid_rt.models.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("children_find_bench")


class FakeHands:
    """A child's hands that do what a task's op says."""

    def __init__(self, device: str) -> None:
        if device == "none":
            raise RuntimeError("no such device")
        self.lost = False

    def perform(self, task: Task) -> Iterator[Row]:
        yield {"kind": "check", "ok": True, "pid": os.getpid()}
        if task.op == "raise":
            raise ValueError("planted")
        if task.op == "lose":
            self.lost = True
            raise RuntimeError("illegal memory access")
        if task.op == "exit":
            os._exit(7)
        if task.op == "hang":
            time.sleep(60)

    def broken(self) -> bool:
        return self.lost

    def release(self) -> None:
        pass


def test_a_worker_outlives_its_children() -> None:
    worker, rows = gpu_worker.Worker(FakeHands, "any"), list[Row]()
    try:
        for op, error, lost in (
            ("", "", False),
            ("raise", "ValueError: planted", False),
            ("lose", "illegal memory access", True),
            ("exit", "exit status 7", True),
            ("", "", False),
            ("hang", "no answer within 2 s", True),
        ):
            outcome = worker.run(Task("check", op=op), rows.append, limit=2.0 if op == "hang" else 60.0)
            assert error in outcome.error
            assert bool(outcome.error) == bool(error)
            assert outcome.lost == lost
    finally:
        worker.close()
    assert len(rows) == 6, "what a task yields before it fails is kept"
    pids = [row["pid"] for row in rows]
    assert pids[0] == pids[1] == pids[2]
    assert len({pids[2], pids[3], pids[4]}) == 3
    assert pids[4] == pids[5]


def test_a_worker_without_a_device_says_so() -> None:
    outcome = gpu_worker.Worker(FakeHands, "none").run(Task("describe"), lambda row: None)
    assert outcome == gpu_worker.Outcome("RuntimeError: no such device", lost=True)


def fake_compile(task: Task, capability: int, launchers: bool) -> int:
    if task.op == "raise":
        raise ValueError(f"sm_{capability} refuses")
    return 1


def test_compilers_work_once_per_binary_and_report_errors() -> None:
    tasks = [
        Task("time", op="qkv", shape=SHAPES[0], lengths=(1,)),
        Task("time", op="qkv", shape=SHAPES[0], lengths=(2,), context=8192),
        Task("time", op="raise", shape=SHAPES[0]),
        Task("copy"),
    ]
    compilers = gpu_worker.Compilers(1, 90, launchers=False, work=fake_compile)
    try:
        assert compilers.ask(tasks) == 2
        assert compilers.wait(tasks[1], 60.0) == ""
        assert "sm_90 refuses" in compilers.wait(tasks[2], 60.0)
        assert compilers.wait(tasks[3], 0.0) == ""
        assert compilers.progress() == (2, 2)
    finally:
        compilers.close()


def test_compiling_ahead_fills_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a device that is not there, of another architecture than any default."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tasks = [
        Task("check", Case("compact", "float16", "llama", llama_sizes("compact", SHAPES[0], 8))),
        Task("time", op="embed", shape=SHAPES[0]),
    ]
    compilers = gpu_worker.Compilers(1, 90, launchers=False)
    try:
        assert compilers.ask(tasks) == 2
        assert [compilers.wait(task, 250.0) for task in tasks] == ["", ""]
    finally:
        compilers.close()
    assert len(list(tmp_path.rglob("compact_kernel.cubin"))) == 2, "with the tokens and without"
    assert len(list(tmp_path.rglob("embed_kernel.cubin"))) == 1


def test_percentiles() -> None:
    assert Sample.of([5.0]) == Sample(5.0, 5.0, 5.0)
    assert Sample.of([float(i) for i in range(11)]) == Sample(2.0, 5.0, 8.0)


class FakeCuda:
    """The calls of CudaRuntime to torch.cuda, noted down in order."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.now = "outer"
        self.millis = 0.0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.millis

            def elapsed_time(self, later: Event) -> float:
                return later.at - self.at

        class CUDAGraph:
            def replay(self) -> None:
                outer.notes.append("replay")
                outer.millis += 0.8

            def reset(self) -> None:
                outer.notes.append("reset")

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def Stream(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(name="side", wait_stream=lambda other: self.notes.append("side waits"))

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.now, wait_stream=lambda other: self.notes.append("outer waits"))

    def set_stream(self, stream: SimpleNamespace) -> None:
        self.now = stream.name

    def stream(self, stream: SimpleNamespace) -> Any:
        return self._within(stream.name)

    def graph(self, graph: object, stream: SimpleNamespace) -> Any:
        self.notes.append("capture")
        return self._within(stream.name)

    def _within(self, name: str) -> Any:
        fake = self

        class Within:
            def __enter__(self) -> None:
                self.before, fake.now = fake.now, name

            def __exit__(self, kind: object, *_: object) -> None:
                if kind is None:
                    fake.now = self.before

        return Within()

    def synchronize(self, device: object = None) -> None:
        self.notes.append("sync")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=60 * 2**20)

    def get_device_capability(self, device: object) -> tuple[int, int]:
        return 9, 0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_every_kernel_runs_before_the_capture(fake_cuda: FakeCuda) -> None:
    runtime = gpu_runtime.CudaRuntime()
    assert runtime.place.capability == 90
    calls = [lambda i=i: fake_cuda.notes.append(f"call {i} on {fake_cuda.now}") for i in range(4)]
    sample = runtime.time(calls, replays=5)
    assert sample.median == pytest.approx(0.8e3 / 4)
    captured = fake_cuda.notes.index("capture")
    before, after = fake_cuda.notes[:captured], fake_cuda.notes[captured + 1 :]
    assert before == ["side waits", "call 0 on side", "call 1 on side", "outer waits", "sync"]
    assert after[:4] == [f"call {i} on side" for i in range(4)]
    assert after[4:] == ["replay"] * 8 + ["sync", "reset"], "three replays are not counted"
    assert fake_cuda.now == "outer"


def test_a_failed_capture_gives_the_stream_back(fake_cuda: FakeCuda) -> None:
    def fail() -> None:
        if "capture" in fake_cuda.notes:
            raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while"):
        gpu_runtime.CudaRuntime().time([fail, fail])
    assert fake_cuda.now == "outer"
