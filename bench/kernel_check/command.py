"""Check every kernel on this machine's GPU, then time it: correctness, batch invariance, races, speed.

    python -m bench.kernel_check --out DIR [--minutes 8] [--quick] [--only qkv,attention]
    python -m bench.kernel_check --profile qkv --shape llama-3.1-8b --T 8
    python -m bench.kernel_check --device interpreter --out DIR

Results go to DIR/gpu_check.json row by row, so that a kill loses nothing. Every kernel is compiled ahead in
parallel processes; tasks run in a child that may crash or hang without taking the run along. Checks come first,
then timings in order of worth; what did not fit the minutes is listed. So is what the device's memory does
not hold. Exit status 1 if a check failed.

`--profile` runs one kernel over rotated weights in a loop and nothing else, for a profiler around this command.
The interpreter runs the same flow at tiny sizes on the CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from pyramid_rt.models.shapes import SHAPES

# Seconds kept for the last lines.
RESERVE = 8.0
# After this many lost devices an op's other tasks are left out: each costs a new child.
MOST_CRASHES = 3


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--minutes", type=float, help="budget of the whole run; default 8, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--only", help="ops, by commas; also forward and step")
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compilers")
    parser.add_argument("--commit", help="for the result file, where git does not know")
    parser.add_argument("--profile", metavar="OP", help="run one kernel in a loop")
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], default=SHAPES[-1].name)
    parser.add_argument("--T", type=int, default=1, help="rows of the window")
    parser.add_argument("--context", type=int, default=1024, help="cached rows before the window")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--trace", type=Path, help="with --profile: write a trace of torch.profiler here")
    options = parser.parse_args(argv)
    if not options.profile and options.out is None:
        parser.error("--out is needed: the folder of the result file")
    if options.minutes is None:
        options.minutes = 2.0 if options.quick else 8.0
    return options


def set_interpreter(device: str) -> None:
    """Triton reads the variable when a kernel is defined, here and in children: nothing was imported yet."""
    if device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


class Run:
    """One run: tasks from a budget to a worker, rows into a report.

    Args:
        clock: monotonic seconds.
        say: where progress goes.
    """

    def __init__(self, options: argparse.Namespace, say: Callable[[str], object] = print) -> None:
        from bench.kernel_check.plan import (
            Budget,
            check_tasks,
            interpreter_tasks,
            only,
            quick_tasks,
            timing_tasks,
        )
        from bench.kernel_check.report import Report, environment
        from bench.kernel_check.worker import DeviceHands, Worker

        self.begin, self.options, self.say = time.monotonic(), options, say
        self.report = Report(options.out / "gpu_check.json", environment(options.commit))
        if options.device == "interpreter":
            checks, timings = interpreter_tasks()
        elif options.quick:
            checks, timings = quick_tasks()
        else:
            checks, timings = check_tasks(), timing_tasks()
        ops = options.only.split(",") if options.only else None
        checks, timings = only(checks, ops), only(timings, ops)
        if ops and not [task for task in (*checks, *timings) if task.kind != "copy"]:
            raise SystemExit(f"--only {options.only}: no such op")
        self.budget = Budget(checks, timings, 60 * options.minutes - RESERVE)
        self.budget.left_out = self.report.left_out
        self.worker = Worker(DeviceHands, options.device)
        self.crashes: dict[str, int] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    def run(self) -> int:
        """All of it; the exit status."""
        from bench.kernel_check.plan import compile_order
        from bench.kernel_check.report import summary
        from bench.kernel_check.tasks import Task
        from bench.kernel_check.worker import Compilers

        def describe(row: dict[str, object]) -> None:
            self.report.head |= {k: v for k, v in row.items() if k not in ("kind", "task", "seconds")}

        outcome = self.worker.run(Task("describe"), describe, 120)
        if outcome.error:
            print(f"no device: {outcome.error}")
            return 1
        self.say(f"{self.elapsed():6.1f} s  {self.report.head['device']}")
        compilers = None
        try:
            if self.options.device == "cuda":
                capability = int(self.report.head["capability"])
                compilers = Compilers(self.options.workers, capability, launchers=True)
                jobs = compilers.ask(compile_order(self.budget.checks, self.budget.timings))
                self.say(f"{self.elapsed():6.1f} s  {jobs} compilations by {self.options.workers} processes")
            self._tasks(compilers)
        finally:
            if compilers is not None:
                compilers.close()
            self.worker.close()
            self.report.save()
        self.say("\n" + summary(self.report))
        return 1 if self.report.failed() else 0

    def _tasks(self, compilers: object) -> None:
        from bench.kernel_check.worker import Compilers

        pool = compilers if isinstance(compilers, Compilers) else None
        guessed = spent = 0.0
        while True:
            # A guess is only corrected by enough of what it was wrong about.
            slow = max(1.0, spent / guessed) if guessed > 20 else 1.0
            task = self.budget.next(self.elapsed(), slow, pool.ready if pool else lambda task: True)
            if task is None:
                return
            if pool is not None:
                waiting = self.elapsed()
                problem = pool.wait(task, self.budget.seconds - waiting)
                if problem:
                    self.report.notes.append(f"{task.compiles}: {problem}")
                if self.elapsed() - waiting > 2:
                    done, asked = pool.progress()
                    self.say(f"{self.elapsed():6.1f} s  compiled {done} of {asked}")
            before = self.elapsed()
            self._one(task)
            guessed, spent = guessed + task.seconds, spent + self.elapsed() - before

    def _one(self, task: object) -> None:
        from bench.kernel_check.tasks import Task

        assert isinstance(task, Task)
        rows = 0

        def keep(row: dict[str, object]) -> None:
            nonlocal rows
            rows += 1
            self.report.add(row)

        before = self.elapsed()
        left = self.budget.seconds - before
        outcome = self.worker.run(task, keep, min(task.limit, max(left, 5.0)))
        if outcome.error:
            hung_at_the_end = left < task.limit and outcome.error.startswith("no answer")
            too_large = outcome.error.startswith("OutOfMemoryError")
            if hung_at_the_end or too_large:
                self.report.left_out.append(task.key)
                if too_large:
                    self.report.notes.append(f"{task.key}: more memory than this device has free")
            else:
                keep(failure(task, outcome.error))
        if outcome.lost:
            op = task.case.op if task.case is not None else task.op
            self.crashes[op] = self.crashes.get(op, 0) + 1
            if self.crashes[op] == MOST_CRASHES:
                self.budget.drop(op)
                self.report.notes.append(f"{op}: the rest left out after {MOST_CRASHES} lost devices")
        self.report.save()
        bad = [row for row in self.report.rows[-rows:] if not row.get("ok", True)] if rows else []
        mark = "FAILED" if bad else ""
        self.say(f"{self.elapsed():6.1f} s  {task.key:60} {self.elapsed() - before:5.1f} s {mark}")
        for row in bad:
            self.say(f"          {row['message']}")


def failure(task: object, message: str) -> dict[str, object]:
    """The row of a task that did not end."""
    from bench.kernel_check.tasks import Task

    assert isinstance(task, Task)
    row: dict[str, object] = {"kind": task.kind, "op": task.case.op if task.case else task.op}
    if task.case is not None:
        row |= {"dtype": task.case.dtype, "name": task.case.name}
    elif task.shape is not None:
        row |= {"dtype": task.dtype, "shape": task.shape.name, "context": task.context}
    return row | {"ok": False, "message": message, "task": task.key}


def profile(options: argparse.Namespace) -> int:
    """One kernel in a loop, for a profiler around the process; --trace uses torch's own."""
    import torch

    from bench.kernel_check.runtime import make_runtime
    from bench.kernel_check.timed_decision import WORKLOADS
    from bench.kernel_check.traffic import shape_named, traffic

    if options.profile not in WORKLOADS:
        raise SystemExit(f"--profile {options.profile}: expected one of {', '.join(WORKLOADS)}")
    runtime, shape = make_runtime(options.device), shape_named(options.shape)
    work = WORKLOADS[options.profile](shape, "bfloat16", runtime.place, runtime.l2_bytes, options.context)
    launches = work.launches(options.T)
    launches[0].run()
    runtime.synchronize()

    def loop() -> None:
        for i in range(options.iterations):
            launches[i % len(launches)].run()
        runtime.synchronize()

    if options.trace:
        with torch.profiler.profile() as profiler:
            loop()
        profiler.export_chrome_trace(str(options.trace))
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=5))
    else:
        loop()
    total = traffic(options.profile, shape, length=options.T, context=options.context).total
    print(
        f"{options.iterations} launches of {options.profile}, {shape.name}, T={options.T}, context {options.context}:"
        f" {total / 1e6:.2f} MB each, {len(launches)} sets of weights, grid {launches[0].grid}"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments(argv)
    set_interpreter(options.device)
    if options.profile:
        return profile(options)
    return Run(options).run()
