"""bench/decode.py on a CPU: the whole flow at tiny shapes, and what it makes of its numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import decode as gpu_decode

ROUND = {"kind": "graphs", "method": "sd", "host_us": 20.0, "idle": 0.01, "allocations_in_a_round": 0}
GOOD: dict[str, Any] = {
    "sections": {
        "rounds, triton": {
            "backend": "triton",
            "equal": {"eager ar": True, "graphs sd": True},
            "rounds": [ROUND],
        },
        "demo, triton": {"sd": {"lossless": True, "unequal": 0}, "fsd": {"lossless": False, "unequal": 3}},
    }
}


def test_the_whole_flow_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decode.main(["--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]) == 0
    content = json.loads((tmp_path / "gpu_decode.json").read_text(encoding="utf-8"))
    assert content["environment"]["commit"] == "abc"
    assert content["environment"]["device"] == "cpu"
    assert content["left_out"] == content["wrong"] == []
    rounds = content["sections"]["rounds, torch"]
    assert [row["method"] for row in rounds["rounds"]] == ["ar", "sd", "psd"]
    for row in rounds["rounds"]:
        assert row["ended_us"] > 0
        assert row["ended_launch_us"] is None  # torch decides on the launches
        assert len(row["tiers_us"]) == {"ar": 1, "sd": 2, "psd": 3}[row["method"]]
        assert [time for time in row["tiers_us"] if not (0 < time < row["wall_us"])] == []
    assert all(rounds["equal"].values())
    assert len(rounds["equal"]) == 3
    assert list(rounds["first_token_ms"]) == ["16", "70"]
    assert rounds["memory"]["planned_mib"].keys() == {"draft", "qualifier", "target"}
    assert set(content["sections"]["demo, torch"]) == {"ar", "sd", "fsd", "psd_a", "psd_f", "psd"}
    profiled = content["sections"]["profile of the demo, torch"]
    assert {row["tier"] for row in profiled["ops"]} == {"draft", "qualifier", "target"}
    assert profiled["unprofiled"] > 0
    assert sum(row["share"] for row in profiled["ops"]) < 1
    for row in profiled["ops"]:
        assert 0 < row["p10"] <= row["us"] <= row["p90"]
        assert (row["mb"] is None) == (row["op"] == "window")
    assert "first token after ms" in capsys.readouterr().out


def test_a_failed_section_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> dict[str, Any]:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(gpu_decode, "measure_random", broken)
    assert gpu_decode.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "gpu_decode.json").read_text(encoding="utf-8"))
    assert content["wrong"] == ["rounds, torch: RuntimeError: an illegal address"]
    assert "ar" in content["sections"]["demo, torch"]


def test_what_does_not_fit_the_minutes_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decode.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "0"]) == 0
    assert "left out: rounds, torch\nleft out: demo, torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "value", "wrong", "missed"),
    [
        ((), None, [], []),
        (("rounds, triton", "rounds", 0, "host_us"), 31.0, [], ["host 31 us a round, goal 30"]),
        (("rounds, triton", "rounds", 0, "idle"), 0.03, [], ["idle 3.0% of a round, goal 2%"]),
        (("rounds, triton", "rounds", 0, "allocations_in_a_round"), 2, ["2 allocations in a round"], []),
        (("rounds, triton", "equal", "graphs sd"), False, ["tokens of graphs sd differ"], []),
        (("demo, triton", "sd", "unequal"), 1, ["sd differs from ar on 1 prompts"], []),
    ],
)
def test_verdicts(path: tuple[Any, ...], value: Any, wrong: list[str], missed: list[str]) -> None:
    content: Any = copy.deepcopy(GOOD)
    place = content["sections"]
    for key in path[:-1]:
        place = place[key]
    if path:
        place[path[-1]] = value
    found = gpu_decode.verdicts(content)
    for lines, expected in zip(found, (wrong, missed), strict=True):
        assert len(lines) == len(expected)
        assert [(words, line) for words, line in zip(expected, lines, strict=True) if words not in line] == []


def test_near_ties_of_torch_are_a_miss_and_no_error() -> None:
    content = copy.deepcopy(GOOD)
    section = content["sections"]["rounds, triton"]
    section["backend"], section["equal"]["graphs sd"] = "torch", False
    wrong, missed = gpu_decode.verdicts(content)
    assert wrong == []
    assert len(missed) == 1


def test_a_stopwatch_measures_the_work() -> None:
    calls: list[int] = []
    assert gpu_decode.Stopwatch(torch.device("cpu")).seconds(lambda: calls.append(1)) >= 0
    assert calls == [1]
