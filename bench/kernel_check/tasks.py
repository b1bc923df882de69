"""The units of work of the kernel check: each runs in a worker on the device and yields rows of the result file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.kernel_check.cases import DECISION_OPS, LENGTHS, binaries, build
from bench.kernel_check.problems import oracle
from bench.kernel_check.problems.base import Case, Place, Problem
from bench.kernel_check.problems.model import Forward, Step
from bench.kernel_check.problems.rounds import NativeRound
from bench.kernel_check.runtime import REPLAYS, Runtime, Sample
from bench.kernel_check.timed import TIMED, Config
from bench.kernel_check.timed_decision import TIMED_DECISIONS, WORKLOADS, TimedDecision
from bench.kernel_check.traffic import launches_for, step_traffic, traffic
from pyramid_rt.models.shapes import Shape

Row = dict[str, Any]
RACE_LENGTHS = (1, 16, 17, 64)


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a worker; travels between processes.

    Attributes:
        kind: one of `KINDS`.
        case: of the checks.
        op, shape, dtype, context: of the timings.
        lengths: T.
        runs: of races; replays of timings.
        config: of a timing; the shipped one if None.
        seconds: a guess at its cost, for the budget.
        limit: seconds after which a worker counts as hung.
    """

    kind: str
    case: Case | None = None
    op: str = ""
    shape: Shape | None = None
    dtype: str = "bfloat16"
    context: int = 1024
    lengths: tuple[int, ...] = LENGTHS
    firsts: tuple[int, ...] = ()
    runs: int = REPLAYS
    config: Config = None
    seconds: float = 0.5
    limit: float = 90.0

    @property
    def key(self) -> str:
        """Unique, for people."""
        if self.case is not None:
            return f"{self.kind}/{self.case.key}"
        if self.shape is None:
            return self.kind
        lengths = ",".join(map(str, self.lengths))
        return f"{self.kind}/{self.op}/{self.shape.name}/at{self.context}/T{lengths}"

    @property
    def compiles(self) -> str:
        """Tasks that share it run the same binaries."""
        lengths = ",".join(map(str, self.lengths))
        if self.case is not None and self.case.op in DECISION_OPS:
            # Lengths of a verify are part of a binary.
            return f"case/{binaries(self.case)}/T{lengths}"
        if self.case is not None:
            return f"case/{self.case.key}"
        if self.kind not in ("time", "tune", "step") or self.shape is None:
            return ""
        decided = f"/T{lengths}" if self.op in TIMED_DECISIONS else ""
        return f"timed/{self.op}/{self.shape.name}/{self.dtype}/{self.config or 'shipped'}{decided}"


@dataclass
class Tally:
    """The worst ratio of a check and what went wrong, in words.

    Attributes:
        worst, at: the largest error over tolerance, and where.
        wrong: at most five lines.
    """

    worst: float = 0.0
    at: str = ""
    wrong: list[str] = field(default_factory=list)

    def ratio(self, value: float, where: str) -> None:
        """Note an error over tolerance."""
        if not value <= self.worst:
            self.worst, self.at = value, where
        if not value <= 1.0:
            self.fail(f"{where}: {value:.3g} of the tolerance")

    def fail(self, message: str) -> None:
        """Note a failure."""
        if len(self.wrong) < 5:
            self.wrong.append(message)

    def row(self, task: Task, **more: Any) -> Row:
        """For the result file; JSON has no infinity."""
        assert task.case is not None
        worst = self.worst if math.isfinite(self.worst) else 1e300
        return {
            "kind": task.kind,
            "op": task.case.op,
            "dtype": task.case.dtype,
            "name": task.case.name,
            "ok": not self.wrong,
            "message": "; ".join(self.wrong),
            "worst": worst,
            "at": self.at,
            **more,
        }


def run_window(problem: Problem, first: int, length: int, *, hide: bool) -> dict[str, Tensor]:
    """Place, poison, launch; the outputs are views of buffers that the next run overwrites."""
    problem.place(first, length, hide=hide)
    problem.poison()
    problem.start(length)
    return problem.outputs(length)


def check(task: Task, runtime: Runtime) -> Iterator[Row]:
    """Every T against float64, with poison wherever nothing may be read or written."""
    assert task.case is not None
    problem, tally = build_any(task.case, runtime.place), Tally()
    for length in task.lengths if problem.rowwise or task.case.op != "compact" else (1,):
        run_window(problem, 0, length, hide=True)
        for name, ratio in problem.verdicts(length).items():
            tally.ratio(ratio, f"T={length} {name}")
        for name, part in problem.untouched(length).items():
            if not bool(part.isnan().all()):
                tally.fail(f"T={length} {name}: written outside the window")
        if any(bool(counter.any()) for counter in problem.counters()):
            tally.fail(f"T={length}: counters are not left at zero")
    yield tally.row(task, lengths=list(task.lengths))


def invariance(task: Task, runtime: Runtime) -> Iterator[Row]:
    """Rows of every window (first, T) against the same rows from windows of one row."""
    assert task.case is not None
    problem, tally = build_any(task.case, runtime.place), Tally()
    lone: dict[str, list[Tensor]] = {}
    lowest = min(task.firsts)
    for row in range(lowest, max(task.firsts) + max(task.lengths)):
        for name, out in run_window(problem, row, 1, hide=False).items():
            lone.setdefault(name, []).append(out.clone())
    expected = {name: torch.cat(rows) for name, rows in lone.items()}
    flags: dict[tuple[int, int, str], Tensor] = {}
    for first in task.firsts:
        problem.place(first, max(task.lengths), hide=False)
        for length in task.lengths:
            problem.poison()
            problem.start(length)
            for name, out in problem.outputs(length).items():
                want = expected[name][first - lowest : first - lowest + length]
                flags[first, length, name] = oracle.differ(out, want, exact=runtime.exact)
    differing = torch.stack(list(flags.values())).tolist()
    for (first, length, name), differs in zip(flags, differing, strict=True):
        if differs:
            tally.fail(f"rows {first} .. {first + length - 1}, T={length}: {name} differs from T=1")
    yield tally.row(task, windows=len(task.firsts) * len(task.lengths), differing=sum(differing))


def chunks(task: Task, runtime: Runtime) -> Iterator[Row]:
    """The same prompt prefilled in windows of other widths leaves the same cache."""
    assert task.case is not None
    problem, tally = Forward(task.case, runtime.place), Tally()
    for length in task.lengths:
        if bool(problem.chunked_differs(length, exact=runtime.exact)):
            tally.fail(f"prefill in windows of {length}: the cache differs from that of T=1")
    yield tally.row(task, lengths=list(task.lengths))


def races(task: Task, runtime: Runtime) -> Iterator[Row]:
    """The same launch again and again beside other work: always the same bits."""
    assert task.case is not None
    problem, tally = build_any(task.case, runtime.place), Tally()
    lengths = task.lengths if problem.rowwise or task.case.op != "compact" else (1,)
    for length in lengths:
        first = {k: v.clone() for k, v in run_window(problem, 0, length, hide=False).items()}
        flags = []
        for turn in range(task.runs):
            problem.poison()
            runtime.disturb(turn)
            problem.start(length)
            for name, out in problem.outputs(length).items():
                # The interpreter runs programs one after another: there the same bits are no proof, but hold.
                flags.append(oracle.differ(out, first[name], exact=True))
        different = int(torch.stack(flags).sum())
        if different:
            tally.fail(f"T={length}: {different} of {len(flags)} results differ from the first run's")
        if any(bool(counter.any()) for counter in problem.counters()):
            tally.fail(f"T={length}: counters are not left at zero")
    runtime.synchronize()
    yield tally.row(task, runs=task.runs, lengths=list(lengths))


def native_round(task: Task, runtime: Runtime) -> Iterator[Row]:
    """Whole rounds: eager and replayed the same tokens, and those that torch decides on the same logits."""
    assert task.case is not None
    tally = Tally()
    wrong, found = NativeRound(task.case, runtime.place).faults()
    for message in wrong:
        tally.fail(message)
    accepted = [row[1] for row in found.counters]
    yield tally.row(task, launches=found.launches, rounds=found.rounds, accepted=accepted)


def build_any(case: Case, place: Place) -> Problem:
    """The problem of a case, whole passes included."""
    return Forward(case, place) if case.op == "forward" else build(case, place)


def timing_row(task: Task, length: int, sample: Sample, total: int, launches: int) -> Row:
    """A timing's row, before peers and bandwidth are known."""
    assert task.shape is not None
    return {
        "kind": task.kind,
        "op": task.op,
        "shape": task.shape.name,
        "dtype": task.dtype,
        "T": length,
        "context": task.context,
        "us": round(sample.median, 3),
        "us_20": round(sample.low, 3),
        "us_80": round(sample.high, 3),
        "bytes": total,
        "gb_s": round(total / sample.median / 1e3, 1),
        "launches": launches,
        "ok": True,
        "message": "",
    }


def repeated(calls: Sequence[Callable[[], object]], count: int) -> list[Callable[[], object]]:
    """`count` calls, the sets one after another again and again."""
    return [calls[i % len(calls)] for i in range(count)]


def time_op(task: Task, runtime: Runtime) -> Iterator[Row]:
    """One op at one shape, and the torch sequences it replaces, under the same replay and rotation."""
    assert task.shape is not None
    itemsize = getattr(torch, task.dtype).itemsize
    work = WORKLOADS[task.op](task.shape, task.dtype, runtime.place, runtime.l2_bytes, task.context)
    for length in task.lengths:
        total = traffic(task.op, task.shape, length=length, context=task.context, itemsize=itemsize).total
        launches = work.launches(length)
        count = launches_for(total, len(launches)) if runtime.exact else len(launches)
        sample = runtime.time(repeated([launch.run for launch in launches], count), task.runs)
        row = timing_row(task, length, sample, total, count)
        peers: dict[str, float] = {}
        errors: dict[str, str] = {}
        for name, calls in work.peers(length).items():
            try:
                peers[name] = round(runtime.time(repeated(calls, count), task.runs).median, 3)
            except Exception as error:  # a form this torch or card does not take is left out, and said so
                runtime.synchronize()
                errors[name] = f"{type(error).__name__}: {error}"[:200]
        best = min(peers, key=lambda name: peers[name], default="")
        row |= {"peers": peers, "peer_errors": errors, "peer": best}
        if best:
            row |= {"peer_us": peers[best], "ratio": round(sample.median / peers[best], 4)}
        if isinstance(work, TimedDecision):
            row |= {"rows": "in the L2, as the head leaves them"}
            cold = [chain.run for chain in work.cold(length)]
            if cold:
                row["us_cold"] = round(runtime.time(cold, task.runs).median, 3)
        yield row


def time_step(task: Task, runtime: Runtime) -> Iterator[Row]:
    """Whole steps of one model, one graph each, behind both backends."""
    assert task.shape is not None
    itemsize = getattr(torch, task.dtype).itemsize
    step = Step(task.shape, task.dtype, runtime.place, task.context)
    for backend in ("triton", "torch"):
        step.use(backend)
        for length in task.lengths:
            total = step_traffic(task.shape, length=length, context=task.context, itemsize=itemsize)
            try:
                sample = runtime.time([lambda n=length: step.run(n)], task.runs)  # type: ignore[misc]
            except Exception as error:
                if backend == "triton":
                    raise
                runtime.synchronize()
                message = f"torch step of {task.shape.name}, T={length}: {type(error).__name__}: {error}"[
                    :300
                ]
                yield {"kind": "note", "ok": True, "message": message}
                continue
            yield timing_row(task, length, sample, total, 1) | {"op": backend}


def tune(task: Task, runtime: Runtime) -> Iterator[Row]:
    """One configuration of one op: a row with the reason if it is no good, else a row per T."""
    assert task.shape is not None
    itemsize = getattr(torch, task.dtype).itemsize
    base = {"kind": "tune", "op": task.op, "shape": task.shape.name, "context": task.context, "ok": True}
    try:
        work = TIMED[task.op](
            task.shape, task.dtype, runtime.place, runtime.l2_bytes, task.context, task.config
        )
        first = work.launches(1)[0]
        kernel = first.kernel[first.grid](*first.args, **first.kwargs)
        runtime.synchronize()
    except Exception as error:  # shared memory, registers, a shape that the compiler refuses
        runtime.synchronize()
        yield base | {"rejected": f"{type(error).__name__}: {error}"[:200]}
        return
    # The interpreter gives no kernel back.
    spills = int(getattr(kernel, "n_spills", 0) or 0)
    if spills:
        yield base | {"rejected": f"{spills} registers spilled"}
        return
    for length in task.lengths:
        launches = work.launches(length)
        total = traffic(task.op, task.shape, length=length, context=task.context, itemsize=itemsize).total
        count = launches_for(total, len(launches)) if runtime.exact else len(launches)
        sample = runtime.time(repeated([launch.run for launch in launches], count), task.runs)
        yield base | {"T": length, "us": round(sample.median, 3), "registers": getattr(kernel, "n_regs", 0)}


def describe(task: Task, runtime: Runtime) -> Iterator[Row]:
    """The device, and the bandwidth that floors are computed with."""
    yield {"kind": "device", **runtime.describe()}


def copy(task: Task, runtime: Runtime) -> Iterator[Row]:
    """Bandwidth of a large copy, read and written bytes."""
    yield {"kind": "copy", "bytes_per_second": runtime.copy_bandwidth(), "ok": True, "message": ""}


KINDS: dict[str, Callable[[Task, Runtime], Iterator[Row]]] = {
    "describe": describe,
    "copy": copy,
    "check": check,
    "invariance": invariance,
    "chunks": chunks,
    "races": races,
    "round": native_round,
    "time": time_op,
    "step": time_step,
    "tune": tune,
}


def perform(task: Task, runtime: Runtime) -> Iterator[Row]:
    """Run a task; every row says how long it took since the one before."""
    begin = time.perf_counter()
    for row in KINDS[task.kind](task, runtime):
        runtime.synchronize()
        now = time.perf_counter()
        yield row | {"task": task.key, "seconds": round(now - begin, 3)}
        begin = now
    runtime.release()
