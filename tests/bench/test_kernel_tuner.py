"""bench.kernel_tuner without a GPU: the space, the score, the search, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from bench.kernel_check import tasks as gpu_tasks
from bench.kernel_check import worker as gpu_worker
from bench.kernel_check.runtime import InterpreterRuntime
from bench.kernel_check.tasks import Task
from bench.kernel_tuner import command as tune_kernels
from bench.kernel_tuner import space as tune_space
from pyramid_rt.kernels import configs
from pyramid_rt.kernels.configs import ProjectionConfig, projection_config
from pyramid_rt.kernels.forward import attention_configs
from pyramid_rt.kernels.forward.attention_configs import AttentionConfig, Splits, config_for
from pyramid_rt.models.shapes import SHAPES, Shape

SHIPPED = projection_config("gate_up", 90, 28672, 4096, torch.bfloat16)
ATTENTION = config_for(torch.bfloat16, 128, 90)
PRODUCT = tune_space.Item("gate_up", (SHAPES[2],), (1024,))
cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


def test_items_are_what_has_a_configuration() -> None:
    found = tune_space.items(tune_kernels.OPS, [shape.name for shape in SHAPES])
    names = [item.name for item in found]
    assert len(names) == 5 * 3 + 2
    assert names[0] == "gate_up/llama-3.1-8b"
    assert "attention/llama-3.2-1b" in names
    assert "attention/llama-3.2-3b+llama-3.1-8b" in names, "one configuration per head size"
    assert [item for item in found if item.op == "attention" and item.contexts != (1024, 8192, 32768)] == []
    with pytest.raises(ValueError, match="op is 'embed'"):
        tune_space.items(["embed"], ["llama-3.2-1b"])


def differences(one: Any, other: Any) -> set[str]:
    return {name for name in one.__slots__ if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize("config", [SHIPPED, ATTENTION])
def test_neighbours_differ_by_one_step(config: tune_space.AnyConfig) -> None:
    near = tune_space.neighbours("gate_up", config, 2)
    assert len(near) == len(set(near))
    assert config not in near
    changed = [differences(config, other) for other in near]
    depth = {"block_k", "narrow_stages", "wide_stages"}
    assert [names for names in changed if not (len(names) == 1 or names == depth)] == []
    assert {name for names in changed for name in names} == set(type(config).__slots__)
    assert [
        other
        for other in near
        if isinstance(other, AttentionConfig) and config not in tune_space.neighbours("gate_up", other, 2)
    ] == []


def test_the_first_round_begins_with_what_is_shipped() -> None:
    for config in (SHIPPED, ATTENTION):
        wanted = tune_space.first_round("gate_up", config, 2)
        assert wanted[0] == config
        assert len(wanted) == len(set(wanted))
        assert 15 < len(wanted) < 40
    splits = {config.splits for config in tune_space.first_round("qkv", SHIPPED, 2)}
    assert splits == {1, 2, 4, 8}


def test_what_does_not_fit_shared_memory_is_not_compiled() -> None:
    fits = partial(tune_space.fits, PRODUCT, itemsize=2)
    assert fits(SHIPPED, arch=90)
    large = replace(SHIPPED, block_n=128, block_k=256, narrow_stages=5)
    assert tune_space.shared_bytes(large, 2) == 144 * 256 * 2 * 4
    assert not fits(large, arch=90)
    assert not fits(replace(SHIPPED, block_k=128, narrow_stages=8), arch=89)
    head = tune_space.Item("head", (SHAPES[0],), (1024,))
    assert not tune_space.fits(head, replace(SHIPPED, splits=2), arch=90, itemsize=2)
    item = tune_space.Item("attention", SHAPES[1:], (1024,))
    assert tune_space.fits(item, ATTENTION, arch=90, itemsize=2)
    assert not tune_space.fits(item, replace(ATTENTION, block_n=128, num_stages=5), arch=90, itemsize=2)


def times(one: float, wide: float) -> dict[tuple[str, int, int], float]:
    return {("a", 1024, 1): one, ("a", 1024, 64): wide}


def test_score_weighs_decoding_most() -> None:
    assert tune_space.score(times(10.0, 20.0), times(10.0, 20.0)) == 1.0
    assert tune_space.score(times(5.0, 20.0), times(10.0, 20.0)) == pytest.approx((4 * 0.5 + 1) / 5)
    assert tune_space.score(times(10.0, 40.0), times(10.0, 20.0)) == pytest.approx((4 + 2) / 5)
    with pytest.raises(ValueError, match="timed on"):
        tune_space.score({("a", 1024, 1): 1.0}, times(1.0, 1.0))


def test_a_gain_within_the_noise_changes_nothing() -> None:
    other = replace(SHIPPED, num_warps=8)
    assert tune_space.choose({SHIPPED: 1.0, other: 0.995}, SHIPPED) == SHIPPED
    assert tune_space.choose({SHIPPED: 1.0, other: 0.98}, SHIPPED) == other


def test_entries_are_source_that_the_tables_take(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"torch": torch, "ProjectionConfig": ProjectionConfig}
    names |= {"AttentionConfig": AttentionConfig, "Splits": Splits}
    tuned = replace(SHIPPED, splits=2)
    table = eval("{" + tune_space.entry(PRODUCT, tuned, 90, "bfloat16") + "}", names)
    monkeypatch.setattr(configs, "TUNED", MappingProxyType(table))
    assert projection_config("gate_up", 90, 28672, 4096, torch.bfloat16) == tuned
    down = tune_space.Item("down", (SHAPES[0],), (1024,))
    (key,) = eval("{" + tune_space.entry(down, tuned, 90, "float16") + "}", names)
    assert key == ("project", 90, 2048, 8192, torch.float16)

    split = replace(ATTENTION, splits=Splits((128, 512, 2048), (8192, 32768)))
    item = tune_space.Item("attention", SHAPES[1:], (1024,))
    table = eval("{" + tune_space.entry(item, split, 90, "bfloat16") + "}", names)
    monkeypatch.setattr(attention_configs, "TUNED", MappingProxyType(table))
    assert config_for(torch.bfloat16, 128, 90) == split
    assert config_for(torch.bfloat16, 64, 90) != split
    assert tune_space.as_sizes(split)["size1"] == 512


def by_fields(config: ProjectionConfig) -> float:
    """A smooth landscape: best at 8 stages, 2 splits, 8 warps; the shipped configuration is at 6, 1, 4."""
    return 10.0 + abs(config.narrow_stages - 8) + 3 * abs(config.splits - 2) + (config.num_warps != 8)


def run_search(measure: Any, seconds: float = 1e9, clock: Any = lambda: 0.0) -> tune_kernels.Search:
    fits = partial(tune_space.fits, PRODUCT, arch=90, itemsize=2)
    return tune_kernels.search(PRODUCT, SHIPPED, measure, fits=fits, itemsize=2, seconds=seconds, clock=clock)


def test_the_search_finds_the_best_and_rejects() -> None:
    rounds: list[list[Any]] = []

    def measure(wanted: list[Any]) -> dict[Any, Any]:
        rounds.append(wanted)
        assert not {c for earlier in rounds[:-1] for c in earlier} & set(wanted), "nothing is tried twice"
        return {
            c: "4 registers spilled" if c.block_n == 128 else times(by_fields(c), by_fields(c))
            for c in wanted
        }

    found = run_search(measure)
    best = found.best()
    assert (best.narrow_stages, best.splits, best.num_warps) == (8, 2, 8)
    assert rounds[0][0] == SHIPPED
    assert found.ended in ("no neighbour is faster", "no neighbour left")
    assert [config for config in found.rejected if config.block_n != 128] == []
    content = found.json()
    json.dumps(content, allow_nan=False)
    scores = [entry["score"] for entry in content["tried"]]
    assert scores == sorted(scores)
    assert content["score"] == scores[0]
    lines = tune_kernels.table([found])
    assert len(lines) == 3
    assert f"{by_fields(best) / by_fields(SHIPPED):.3f}" in lines[1]


def test_the_search_ends_with_its_time_and_without_a_base() -> None:
    clock = iter(range(100))
    found = run_search(
        lambda wanted: {c: times(by_fields(c), 1.0) for c in wanted[:3]}, 0.5, lambda: float(next(clock))
    )
    assert found.ended == "time used"
    assert len(found.times) == 3
    found = run_search(lambda wanted: dict.fromkeys(wanted, "OutOfResources"))
    assert found.ended == "the shipped configuration does not run: OutOfResources"
    assert found.best() == SHIPPED


@cpu_only
def test_the_task_times_or_rejects() -> None:
    tiny = Shape("tiny", 64, 96, 1, 2, 1, 64, 100)
    config = replace(SHIPPED, block_k=32, splits=2)
    task = Task("tune", op="gate_up", shape=tiny, lengths=(1, 3), config=config, context=8)
    rows = list(gpu_tasks.perform(task, InterpreterRuntime()))
    assert [row["T"] for row in rows] == [1, 3]
    assert [row for row in rows if not (row["us"] > 0)] == []
    # The projection onto the stream makes sums of squares of 64 channels.
    task = replace(task, op="out", config=replace(config, block_n=32))
    (row,) = gpu_tasks.perform(task, InterpreterRuntime())
    assert "config.block_n is 32" in row["rejected"]
    assert task.compiles != replace(task, config=config).compiles


class FakeWorker:
    """Every configuration takes 10 us, eight warps 8; races show with 8 warps at one shape."""

    def __init__(self, *_: object) -> None:
        pass

    def run(self, task: Task, on_row: Any, limit: float | None = None) -> gpu_worker.Outcome:
        if task.kind == "describe":
            on_row({"kind": "device", "device": "NVIDIA H200", "capability": 90})
        elif task.kind == "tune":
            assert task.shape is not None
            assert task.config is not None
            fast = task.config.num_warps == 8
            for length in task.lengths:
                row = {
                    "shape": task.shape.name,
                    "context": task.context,
                    "T": length,
                    "us": 8.0 if fast else 10.0,
                }
                on_row(row)
        else:
            assert task.case is not None
            bad = task.kind == "races" and "1b" in task.case.name
            on_row({"ok": not bad, "message": "3 of 30 results differ" if bad else ""})
        return gpu_worker.Outcome("", lost=False)

    def close(self) -> None:
        pass


class FakeCompilers:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def ask(self, tasks: list[Task]) -> int:
        return len(tasks)

    def wait(self, task: Task, limit: float) -> str:
        return ""

    def close(self) -> None:
        pass


def test_the_command_writes_only_winners_that_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_worker, "Worker", FakeWorker)
    monkeypatch.setattr(gpu_worker, "Compilers", FakeCompilers)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = [
        "--out",
        str(tmp_path),
        "--op",
        "gate_up",
        "--shape",
        "llama-3.2-1b",
        "--shape",
        "llama-3.1-8b",
    ]
    assert tune_kernels.main([*arguments, "--commit", "abc"]) == 1, "a winner was wrong"
    content = json.loads((tmp_path / "tune_kernels.json").read_text())
    assert content["commit"] == "abc"
    assert [item["wrong"] for item in content["items"]] == ["", "3 of 30 results differ"]
    source = (tmp_path / "tuned.py").read_text()
    assert '("gate_up", 90, 28672, 4096, torch.bfloat16)' in source
    assert "num_warps=8" in source
    assert "16384" not in source
    printed = capsys.readouterr().out
    assert "0.800 of the shipped time" in printed
    assert "WRONG: 3 of 30 results differ" in printed
    assert source.strip() in printed
