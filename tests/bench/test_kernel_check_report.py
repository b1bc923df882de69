"""Byte counts, goals and the result file of bench.kernel_check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.kernel_check import report as gpu_report
from bench.kernel_check.tasks import Row
from bench.kernel_check.traffic import (
    copies_for,
    launches_for,
    markdown,
    matrix,
    shape_named,
    step_traffic,
    traffic,
)
from pyramid_rt.models.shapes import SHAPES

ROOT = Path(__file__).parent.parent.parent


def test_weights_of_a_step_are_those_of_the_models() -> None:
    """Every matrix once and the head: 1.2357, 3.2126 and 7.5047 billion weights."""
    for shape, billions in zip(SHAPES, (1.2357, 3.2126, 7.5047), strict=True):
        products = sum(math.prod(matrix(op, shape)) for op in ("qkv", "out", "gate_up", "down"))
        weights = shape.layers * products + math.prod(matrix("head", shape))
        assert round(weights / 1e9, 4) == billions
        step = step_traffic(shape, length=1, context=0)
        assert 1.0 < step / (2 * weights) < 1.001


def test_traffic_by_hand() -> None:
    shape = shape_named("llama-3.2-1b")
    found = traffic("attention", shape, length=4, context=1020)
    assert found.stationary == 2 * 8 * 1024 * 64 * 2
    assert (found.read, found.written) == (found.stationary + 4 * 2048 * 2, 4 * 2048 * 2)
    gate = traffic("gate_up", shape, length=1)
    assert gate.read == 2 * 8192 * 2048 * 2 + 2048 * 2 + 32 * 4
    assert gate.written == 8192 * 2
    assert traffic("head", shape, length=1, itemsize=4).stationary == 128256 * 2048 * 4
    with pytest.raises(ValueError, match="shape is 'gpt'"):
        shape_named("gpt")


def test_rotation_passes_three_times_the_l2() -> None:
    for stationary in (1, 10**6, 12_582_912, 10**8, 10**9):
        copies = copies_for(stationary, 60 * 2**20)
        assert copies >= 2
        assert copies * stationary > 3 * 60 * 2**20
        launches = launches_for(stationary, copies)
        assert launches % copies == 0
        assert launches <= max(256 + copies, copies)


def test_the_page_for_kernel_readers_has_the_counted_bytes() -> None:
    assert markdown() in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def timed(kind: str, op: str, shape: str, length: int, us: float, **more: Any) -> Row:
    row = {
        "kind": kind,
        "op": op,
        "shape": shape,
        "dtype": "bfloat16",
        "T": length,
        "context": 1024,
        "us": us,
    }
    return row | {"gb_s": 1.0, "bytes": 2 * 10**9, "ok": True, "message": ""} | more


COPY: Row = {"kind": "copy", "bytes_per_second": 4e12, "ok": True, "message": ""}


def lines_of(rows: list[Row], device: str) -> list[str]:
    return [goal.line() for goal in gpu_report.goals(gpu_report.with_shares(rows), device)]


def test_goals_on_an_h100() -> None:
    shape = "llama-3.2-1b"
    rows = [
        COPY,
        timed("step", "triton", shape, 1, 1000.0),
        timed("step", "triton", shape, 16, 1090.0),
        timed("step", "triton", shape, 64, 1485.0),
        timed("step", "torch", shape, 1, 1.0),
        timed("step", "triton", "llama-3.2-3b", 1, 2915.0),
        timed("time", "attention", shape, 16, 1000.0, context=32768, ratio=0.5),
        timed("time", "attention", shape, 1, 500.0, context=32768, ratio=1.3),
        timed("time", "attention", shape, 64, 9000.0, context=32768, ratio=0.5),
    ]
    lines = lines_of(rows, "NVIDIA H100 80GB HBM3")
    assert lines[0] == "step of llama-3.2-1b, T=1, ms <= 1.1: met, 1.000 (50.0% of copy bandwidth)"
    assert lines[1] == "step of llama-3.2-1b, T=16 over T=1 <= 1.1: met, 1.090"
    assert lines[2] == "step of llama-3.2-1b, T=64 over T=1 <= 1.35: missed by 10.0%, 1.485"
    assert "missed by 10.0%, 2.915" in lines[3]
    assert lines[4].endswith("not measured")
    assert "llama-3.1-8b, T=1, ms <= 5.85: not measured" in lines[6]
    assert (
        "at 32k, worst T up to 16, share of copy bandwidth >= 0.85: missed by 70.0%, 0.500 (T=16)" in lines[9]
    )
    (peer,) = [line for line in lines if "over torch's" in line]
    assert "missed by 26.2%, 1.300 (llama-3.2-1b T=1 at 32768; 1 of 3 timings over)" in peer


def test_goals_of_an_h100_are_not_held_against_another_card() -> None:
    lines = lines_of([COPY, timed("step", "triton", "llama-3.2-1b", 1, 1000.0)], "NVIDIA H200")
    assert (
        "not measured (1.000 ms on this device, 50.0% of copy bandwidth; the goal is an H100's)" in lines[0]
    )
    assert lines_of([COPY], "interpreter") == []


def test_an_op_that_is_wrong_is_not_compared() -> None:
    rows = [
        timed("time", "qkv", "llama-3.2-1b", 1, 10.0, ratio=0.5),
        timed("time", "out", "llama-3.2-1b", 1, 10.0, ratio=0.5),
        {"kind": "races", "op": "qkv", "ok": False, "message": ""},
    ]
    found = gpu_report.with_shares(rows)
    assert "ratio" not in found[0]
    assert found[1]["ratio"] == 0.5
    assert len([line for line in lines_of(rows, "NVIDIA H200") if "over torch's" in line]) == 1


def test_the_file_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu_check.json"
    report = gpu_report.Report(path, {"device": "NVIDIA H200", "commit": "abc"})
    report.add(
        {
            "kind": "check",
            "op": "qkv",
            "dtype": "float32",
            "name": "a",
            "ok": True,
            "message": "",
            "worst": 0.5,
        }
    )
    first = json.loads(path.read_text())
    assert first["commit"] == "abc"
    assert len(first["rows"]) == 1
    report.add(timed("time", "qkv", "llama-3.2-1b", 1, 1000.0, peer_us=900.0, ratio=1.11))
    report.add(COPY)
    report.add(
        {"kind": "races", "op": "head", "dtype": "float16", "name": "b", "ok": False, "message": "2 of 9"}
    )
    report.left_out.append("time/embed")
    report.save()
    content = json.loads(path.read_text())
    assert content["failed"] == 1
    assert not content["complete"]
    assert content["rows"][1]["copy_share"] == 0.5, "the copy came later, the share is there all the same"
    assert list(path.parent.iterdir()) == [path]
    text = gpu_report.summary(report)
    assert "check      qkv          1 passed   0 failed, worst 0.50 of the tolerance" in text
    assert "FAILED races head/float16/b: 2 of 9" in text
    assert "time/embed" in text
    assert "llama-3.2-1b   qkv            1024   1    1000.00       1  50.0%     900.00   1.11" in text
    assert "llama-3.2-1b   qkv            at 1024" in text
    assert "1000.00  50% 1.11" in text
    assert text.endswith("FAILED: 1 results")
