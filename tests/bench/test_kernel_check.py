"""bench.kernel_check without a GPU: tolerances, cases, budget, and its checks' power to find faults."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernel_check import cases as gpu_cases
from bench.kernel_check import command as gpu_check
from bench.kernel_check import plan as gpu_plan
from bench.kernel_check import tasks as gpu_tasks
from bench.kernel_check import worker as gpu_worker
from bench.kernel_check.problems import oracle as gpu_oracle
from bench.kernel_check.problems.base import Case
from bench.kernel_check.runtime import InterpreterRuntime
from bench.kernel_check.tasks import Task
from pyramid_rt.models.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("children_find_bench")

ROOT = Path(__file__).parent.parent.parent
cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


def test_tolerance_takes_roundings_and_refuses_more() -> None:
    torch.manual_seed(0)
    exact = torch.randn(64, 512, dtype=torch.float64)
    reference = exact.to(torch.bfloat16)
    assert gpu_oracle.near(reference, exact, reference) <= 1
    one = reference.clone()
    one[3, 5] += 0.5
    assert gpu_oracle.near(one, exact, reference) > 1, "one wrong element"
    assert gpu_oracle.near(reference * 1.01, exact, reference) > 1, "all a little off"
    one[3, 5] = math.nan
    assert gpu_oracle.near(one, exact, reference) == math.inf
    single = exact.float()
    shifted = single + 40 * 2.0**-24
    assert gpu_oracle.near(shifted, exact, single) > 1
    assert gpu_oracle.near(shifted, exact, single, width=4096) <= 1, "64 roundings of a sum of 4096"
    assert gpu_oracle.near(single + 200 * 2.0**-24, exact, single, width=4096) > 1


def test_a_product_of_sums_is_judged_by_the_size_of_its_own_factors() -> None:
    """An error comes through whole where the other factor is large, and must be small where it is small."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 64, 2048, dtype=torch.float64)
    exact, walk = first * second, gpu_oracle.accumulation(2048)
    rounded = first + 0.9 * walk * torch.randn(64, 2048, dtype=torch.float64)
    result, plain, sizes = (rounded * second).float(), exact.float(), second.abs()
    assert gpu_oracle.near(result, exact, plain, width=2048) > 1, "by the tails of the product"
    assert gpu_oracle.near(result, exact, plain, width=2048, sizes=sizes) <= 1
    assert gpu_oracle.near(exact.float() * (1 + 2.0**-15), exact, plain, width=2048, sizes=sizes) > 1
    place = divmod(int(sizes.argmin()), 2048)
    result[place] += walk
    assert gpu_oracle.near(result, exact, plain, width=2048, sizes=sizes) > 1


def test_elementwise_and_relative_tolerances() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    bound = torch.tensor([0.1, 0.1], dtype=torch.float64)
    assert gpu_oracle.within(torch.tensor([1.04, 2.0]), exact, bound) == pytest.approx(0.566, abs=0.01)
    assert gpu_oracle.within(torch.tensor([1.2, 2.0]), exact, bound) > 1
    assert gpu_oracle.relative(torch.tensor([1.0, 2.02]), exact, 0.01) == pytest.approx(1.0, rel=1e-3)
    assert gpu_oracle.relative(torch.tensor([1.0, math.inf]), exact, 0.01) == math.inf


def test_bits() -> None:
    nan = torch.tensor([math.nan, 0.0], dtype=torch.bfloat16)
    assert gpu_oracle.equal(nan, nan.clone()) == 0.0
    assert gpu_oracle.equal(torch.zeros(2), -torch.zeros(2)) == math.inf
    assert not gpu_oracle.differ(nan, nan.clone(), exact=True)
    near = torch.ones(3) + torch.tensor([0.0, 0.0, 2.0**-22])
    assert gpu_oracle.differ(near, torch.ones(3), exact=True)
    assert not gpu_oracle.differ(near, torch.ones(3), exact=False)
    assert gpu_oracle.differ(torch.tensor([math.nan]), torch.ones(1), exact=False)
    assert not gpu_oracle.differ(torch.tensor([-math.inf]), torch.tensor([-math.inf]), exact=False)


def test_cases_cover_what_was_asked() -> None:
    checks = gpu_cases.check_cases()
    keys = [case.key for case in checks]
    assert len(set(keys)) == len(keys)
    for cases in (checks, gpu_cases.race_cases()):
        assert {case.op for case in cases} == set(gpu_cases.PROBLEMS)
        for dtype in gpu_cases.DTYPES:
            ops = {case.op for case in cases if case.dtype == dtype}
            assert ops - set(gpu_cases.DECISION_OPS) == set(gpu_cases.FORWARD_OPS)
    for dtype in gpu_cases.DTYPES:
        chosen = [case.sizes for case in checks if case.op == "attention" and case.dtype == dtype]
        assert {s["heads"] // s["kv_heads"] for s in chosen} >= set(range(1, 9))
        assert {s["head_dim"] for s in chosen} == {64, 96, 128}
        assert max(s["start"] + 64 for s in chosen) == 131072
        assert any(s.get("tree") for s in chosen)
        splits = {case.sizes.get("splits", 1) for case in checks if case.dtype == dtype}
        assert splits == {1, 2, 4, 8}
    rowwise = {case.op for case in gpu_cases.invariance_cases()}
    assert rowwise == set(gpu_cases.FORWARD_OPS) - {"compact"}
    assert {1, 2, 7, 16, 17, 64} == set(gpu_cases.LENGTHS)
    assert [
        op for op in gpu_cases.PROBLEMS if len([c for c in gpu_cases.quick(checks) if c.op == op]) != 2
    ] == []


def test_plan_has_every_window_and_every_timing() -> None:
    checks, timings = gpu_plan.check_tasks(), gpu_plan.timing_tasks()
    invariance = [task for task in checks if task.kind == "invariance"]
    assert [task for task in invariance if task.lengths != tuple(range(1, 65))] == []
    assert [task for task in invariance if task.firsts != tuple(range(64))] == []
    assert any(task.case is not None and task.case.op == "forward" for task in invariance)
    assert [task for task in checks if task.kind == "races" and task.runs != 100] == []
    timed = {
        (task.op, task.shape.name, task.context, length)
        for task in timings
        if task.kind == "time" and task.shape is not None
        for length in task.lengths
    }
    for shape in SHAPES:
        for length in (1, 2, 4, 8, 16, 32, 64):
            assert {(op, shape.name, 1024, length) for op in gpu_plan.TIMED_OPS} <= timed
            assert {("attention", shape.name, context, length) for context in (8192, 32768)} <= timed
    kinds = [task.kind for task in timings]
    assert kinds[:4] == ["copy", "step", "step", "step"]
    keys = [task.key for task in (*checks, *timings)]
    assert len(set(keys)) == len(keys)


def make(kind: str, seconds: float, op: str = "qkv") -> Task:
    return Task(kind, Case(op, "float32", f"{seconds}", {}), seconds=seconds)


def test_budget_checks_first_then_timings_then_what_is_left() -> None:
    checks = [make("check", 10.0 + i) for i in range(5)]
    timings = [make("time", 20.0), make("time", 21.0)]
    budget = gpu_plan.Budget(list(checks), list(timings), 100.0)
    assert budget.next(0.0) is checks[0]
    assert budget.next(50.0) is checks[1]
    assert budget.next(61.0) is timings[0], "after 60% timings come first"
    assert budget.next(75.0) is timings[1]
    assert budget.next(80.0) is checks[2]
    assert budget.next(88.0) is None, "12 seconds are left, 13 and 14 wanted"
    assert budget.left_out == [checks[3].key, checks[4].key]


def test_budget_does_not_wait_for_compilers_while_others_are_ready() -> None:
    checks = [make("check", 1.0 + i) for i in range(3)]
    timings = [make("time", 10.0)]
    budget = gpu_plan.Budget(list(checks), list(timings), 100.0)
    assert budget.next(0.0, ready=lambda task: task is checks[1]) is checks[1]
    assert budget.next(1.0, ready=lambda task: task is timings[0]) is timings[0]
    assert budget.next(2.0, ready=lambda task: False) is checks[0], "nothing is ready: what matters most"
    order = gpu_plan.compile_order(gpu_plan.check_tasks(), gpu_plan.timing_tasks())
    types = [
        task.case.dtype if task.case else "timing"
        for task in order
        if not task.case or task.case.op not in gpu_cases.DECISION_OPS
    ]
    assert list(dict.fromkeys(types)) == ["bfloat16", "timing", "float16", "float32"]
    assert len(order) == len(gpu_plan.check_tasks()) + len(gpu_plan.timing_tasks())


def test_budget_counts_on_slow_tasks_and_drops_an_op() -> None:
    tasks = [make("check", 10.0), make("check", 1.0), make("check", 1.5, "head")]
    budget = gpu_plan.Budget(list(tasks), [], 30.0)
    assert budget.next(5.0, slow=3.0) is tasks[1], "three times ten do not fit"
    budget.drop("head")
    assert budget.next(6.0) is None
    assert budget.left_out == [tasks[0].key, tasks[2].key]


def test_only_keeps_the_copy() -> None:
    kept = gpu_plan.only(gpu_plan.timing_tasks(), ["out"])
    assert {task.op for task in kept} == {"", "out"}
    assert kept[0].kind == "copy"


class Fake:
    """A problem of numbers, with a fault to plant. Row r is r + 1 in all three columns."""

    rowwise = True

    def __init__(self, fault: str) -> None:
        self.fault, self.runs = fault, 0
        self.out, self.count = torch.zeros(64, 3), torch.zeros(1)

    def place(self, first: int, length: int, *, hide: bool) -> None:
        self.first = first

    def poison(self) -> None:
        self.out.fill_(math.nan)

    def start(self, length: int) -> None:
        self.runs += 1
        rows = torch.arange(length, dtype=torch.float32) + self.first + 1
        self.out[:length] = rows.unsqueeze(1)
        if self.fault == "value":
            self.out += 0.1
        if self.fault == "place" and length > 2:
            self.out[2, 1] *= 1.0001
        if self.fault == "outside" and length < 64:
            self.out[length, 0] = 0.0
        if self.fault == "unwritten":
            self.out[length - 1, 2] = math.nan
        if self.fault == "race" and self.runs % 5 == 0:
            self.out[0, 0] *= 1 + 2**-22
        if self.fault == "counter":
            self.count += 1

    def outputs(self, length: int) -> dict[str, Tensor]:
        return {"x": self.out[:length]}

    def untouched(self, length: int) -> dict[str, Tensor]:
        return {"x": self.out[length:]}

    def counters(self) -> list[Tensor]:
        return [self.count]

    def verdicts(self, length: int) -> dict[str, float]:
        rows = torch.arange(length, dtype=torch.float64) + 1
        return {"x": gpu_oracle.relative(self.out[:length], rows.unsqueeze(1).expand(-1, 3), 1e-3)}


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("", set()),
        ("value", {"check"}),
        ("place", {"invariance"}),
        ("outside", {"check"}),
        ("unwritten", {"check"}),
        ("race", {"races"}),
        ("counter", {"check", "races"}),
    ],
)
def test_checks_find_planted_faults(fault: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tasks, "build_any", lambda case, place: Fake(fault))
    case, failed = Case("qkv", "float32", "fake", {}), set()
    tasks = (
        Task("check", case, lengths=(1, 7)),
        Task("invariance", case, lengths=(1, 2, 3, 9), firsts=(0, 1, 5)),
        Task("races", case, lengths=(2,), runs=20),
    )
    for task in tasks:
        rows = list(gpu_tasks.perform(task, InterpreterRuntime()))
        assert len(rows) == 1
        assert rows[0]["task"] == task.key
        assert bool(rows[0]["message"]) != rows[0]["ok"]
        json.dumps(rows[0], allow_nan=False)
        if not rows[0]["ok"]:
            failed.add(task.kind)
    # A value that is wrong in the same way everywhere is no matter of invariance; NaN differs from itself there.
    assert failed - ({"invariance"} if fault == "unwritten" else set()) == kinds


@cpu_only
@pytest.mark.parametrize("case", gpu_cases.tiny_cases(), ids=lambda case: case.key)
def test_every_problem_in_the_interpreter(case: Case) -> None:
    runtime = InterpreterRuntime()
    deciding = case.op in gpu_cases.DECISION_OPS
    lengths = (2, 7) if deciding else (1, 17)
    tasks = [Task("check", case, lengths=lengths), Task("races", case, lengths=(2,), runs=2)]
    if case.op != "compact" and not deciding and not case.sizes.get("tree"):
        tasks.append(Task("invariance", case, lengths=(1, 5), firsts=(0, 1)))
    for task in tasks:
        (row,) = gpu_tasks.perform(task, runtime)
        assert row["ok"], row["message"]
        if task.kind == "check":
            assert 0.0 <= row["worst"] <= 1.0


@cpu_only
@pytest.mark.parametrize("case", [c for c in gpu_cases.tiny_cases() if c.op == "out"])
def test_the_last_window_of_all_rows(case: Case) -> None:
    """Rows 63 .. 126, and row 126 alone in front of nothing."""
    task = Task("invariance", case, lengths=(1, 64), firsts=(63,))
    (row,) = gpu_tasks.perform(task, InterpreterRuntime())
    assert row["ok"], row["message"]
    assert row["windows"] == 2


@cpu_only
def test_whole_passes_in_the_interpreter() -> None:
    checks, _ = gpu_plan.interpreter_tasks()
    tasks = {task.kind: task for task in checks if task.case is not None and task.case.op == "forward"}
    assert set(tasks) == {"check", "invariance", "chunks", "races"}
    for kind in ("check", "invariance", "chunks"):
        (row,) = gpu_tasks.perform(tasks[kind], InterpreterRuntime())
        assert row["ok"], row["message"]


@cpu_only
@pytest.mark.parametrize("op", gpu_plan.TIMED_OPS)
def test_every_workload_in_the_interpreter(op: str) -> None:
    """Timings by an injected clock: one second a reading, so a pass over the calls takes one second."""
    _, timings = gpu_plan.interpreter_tasks()
    (task,) = [t for t in timings if t.op == op]
    ticks = iter(range(10**6))
    runtime = InterpreterRuntime(clock=lambda: float(next(ticks)))
    (row,) = gpu_tasks.perform(replace(task, lengths=(2,)), runtime)
    assert row["us"] == pytest.approx(1e6 / row["launches"], abs=0.01)
    assert row["ratio"] == 1.0
    assert not row["peer_errors"]
    assert row["peer"] in row["peers"]
    assert row["bytes"] > 0


@cpu_only
@pytest.mark.parametrize("op", [op for op in gpu_plan.TIMED_OPS if op not in ("compact", "embed", "head")])
def test_peers_compute_what_the_kernels_do(op: str) -> None:
    """A peer that computes something else would be no peer."""
    from bench.kernel_check.timed import TIMED

    _, timings = gpu_plan.interpreter_tasks()
    (task,) = [t for t in timings if t.op == op]
    work: Any = TIMED[op](task.shape, "float32", InterpreterRuntime().place, 1, 8)
    for length in (1, 3):
        launch = work.launches(length)[0]
        launch.run()
        ours = (work.q if op == "qkv" else work.out)[:length].clone()
        caches = (work.k[:, 8 : 8 + length].clone(), work.v[:, 8 : 8 + length].clone()) if op == "qkv" else ()
        for name, calls in work.peers(length).items():
            theirs = calls[0]()
            if op == "attention":
                group = work.shape.heads // work.shape.kv_heads
                shape = (work.shape.kv_heads, length, group, -1) if "rows" in name else None
                theirs = theirs.view(shape).transpose(0, 1) if shape else theirs[0].transpose(0, 1)
            torch.testing.assert_close(theirs.reshape(ours.shape), ours, rtol=1e-4, atol=1e-4)
            for mine, cache in zip(caches, (work.k, work.v), strict=True) if caches else ():
                torch.testing.assert_close(cache[:, 8 : 8 + length], mine, rtol=1e-4, atol=1e-4)


@cpu_only
def test_the_command_in_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--device",
        "interpreter",
        "--out",
        str(tmp_path),
        "--only",
        "compact,out",
        "--commit",
        "abc",
    ]
    assert gpu_check.main(arguments) == 0
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["commit"] == "abc"
    assert content["device"] == "interpreter"
    assert content["complete"]
    kinds = {(row["kind"], row.get("op")) for row in content["rows"]}
    assert {
        ("copy", None),
        ("check", "compact"),
        ("races", "out"),
        ("invariance", "out"),
        ("time", "out"),
    } <= kinds
    assert capsys.readouterr().out.rstrip().endswith("passed")


@cpu_only
def test_profiling_one_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--profile", "compact", "--shape", "llama-3.2-1b", "--T", "2", "--context", "10"]
    assert gpu_check.main([*arguments, "--iterations", "2", "--device", "interpreter"]) == 0
    assert "2 launches of compact, llama-3.2-1b, T=2, context 10" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected one of"):
        gpu_check.main(["--profile", "nothing", "--device", "interpreter"])


def test_what_memory_does_not_hold_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("check", Case("head", "float64", "n", {}))
    monkeypatch.setattr(gpu_plan, "interpreter_tasks", lambda: ([task], []))

    class Small:
        def __init__(self, *_: object) -> None:
            pass

        def run(self, task: Task, on_row: Any, limit: float | None = None) -> gpu_worker.Outcome:
            if task.kind == "describe":
                on_row({"device": "interpreter"})
                return gpu_worker.Outcome("", lost=False)
            return gpu_worker.Outcome("OutOfMemoryError: CUDA out of memory", lost=False)

        def close(self) -> None:
            pass

    monkeypatch.setattr(gpu_worker, "Worker", Small)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--device", "interpreter", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["left_out"] == [task.key]
    assert "more memory" in content["notes"][0]


def test_a_crashing_op_is_left_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tasks of an op that loses the device, then one of another: three crashes, one left out, one passes."""
    tasks = [Task("check", Case("qkv", "float32", f"n{i}", {})) for i in range(4)]
    tasks.append(Task("check", Case("head", "float32", "n", {})))
    monkeypatch.setattr(gpu_plan, "interpreter_tasks", lambda: (list(tasks), []))

    class Lossy:
        def __init__(self, *_: object) -> None:
            self.closed = False

        def run(self, task: Task, on_row: Any, limit: float | None = None) -> gpu_worker.Outcome:
            if task.case is not None and task.case.op == "qkv":
                return gpu_worker.Outcome("CUDA error: an illegal memory access", lost=True)
            on_row({"kind": task.kind, "op": "head", "ok": True, "message": "", "device": "interpreter"})
            return gpu_worker.Outcome("", lost=False)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(gpu_worker, "Worker", Lossy)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--device", "interpreter", "--out", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["failed"] == 3
    assert content["left_out"] == [tasks[3].key]
    assert content["rows"][-1]["op"] == "head"
    assert "illegal memory access" in content["rows"][0]["message"]
