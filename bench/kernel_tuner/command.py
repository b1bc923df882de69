"""Look for faster launch configurations on this machine's GPU, for the tuned tables of kernels/*configs.py.

    python -m bench.kernel_tuner --out DIR [--op gate_up ...] [--shape llama-3.1-8b ...] [--minutes 20]

Each product of each Llama, and attention of each head size, starts from the shipped configuration and a coarse
grid, then moves to neighbours of the best until none is faster or its share of the minutes is used. Candidates
are compiled ahead in parallel; those that spill registers or do not launch are rejected. Steps and splits along
K decide the bits and so serve every T: what counts is the weighted time over T in 1, 4, 8, 16, 64 (attention:
and contexts of 1k, 8k, 32k) relative to the shipped configuration. A winner must also be right: it is checked
against float64 and for races before it is reported.

Printed last, and written to DIR/tuned.py: the entries to paste. DIR/tune_kernels.json holds everything tried.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.kernel_check.command import set_interpreter
from pyramid_rt.models.shapes import SHAPES

OPS = ("gate_up", "down", "qkv", "out", "head", "attention")
REPLAYS = 9
MOST_ROUNDS = 12
# Neighbours of so many of the best are tried in each round.
BEAM = 2


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--shape", action="append", choices=[s.name for s in SHAPES], help="default: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=20.0, help="budget of the whole run")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compilers")
    parser.add_argument("--commit", help="for the result file, where git does not know")
    return parser.parse_args(argv)


@dataclass
class Search:
    """One item's search.

    Attributes:
        item, shipped: see `tune_space`.
        times: of every configuration that runs.
        rejected: why the others do not.
        ended: why the search ended.
    """

    item: Any
    shipped: Any
    times: dict[Any, dict[tuple[str, int, int], float]] = field(default_factory=dict)
    rejected: dict[Any, str] = field(default_factory=dict)
    ended: str = ""

    def scores(self) -> dict[Any, float]:
        """Of every configuration that runs; empty if the shipped one does not."""
        from bench.kernel_tuner.space import score

        base = self.times.get(self.shipped)
        return {} if base is None else {config: score(times, base) for config, times in self.times.items()}

    def tried(self, config: Any) -> bool:
        """True once it was timed or rejected."""
        return config in self.times or config in self.rejected

    def best(self) -> Any:
        """The configuration to ship."""
        from bench.kernel_tuner.space import choose

        scores = self.scores()
        return choose(scores, self.shipped) if scores else self.shipped

    def json(self) -> dict[str, Any]:
        """For the result file, fastest first."""
        from bench.kernel_tuner.space import as_json

        scores = self.scores()
        order = sorted(self.times, key=lambda config: scores.get(config, 9.9))
        return {
            "item": self.item.name,
            "shipped": as_json(self.shipped),
            "best": as_json(self.best()),
            "score": scores.get(self.best()),
            "ended": self.ended,
            "tried": [
                {
                    "config": as_json(config),
                    "score": scores.get(config),
                    "us": {f"{s} at {c} T={n}": us for (s, c, n), us in self.times[config].items()},
                }
                for config in order
            ],
            "rejected": [{"config": as_json(c), "why": why} for c, why in self.rejected.items()],
        }


# Times configurations of an item: config -> times, or the reason why it is no good.
Measure = Callable[[list[Any]], dict[Any, dict[tuple[str, int, int], float] | str]]


def search(
    item: Any,
    shipped: Any,
    measure: Measure,
    *,
    fits: Callable[[Any], bool],
    itemsize: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """Grid, then neighbours of the best, until nothing is faster or the time is used.

    Args:
        measure: compiles and times a list of configurations.
        fits: a cheap test before compiling.
        seconds: after which no new round begins.
        clock: seconds.
    """
    from bench.kernel_tuner.space import first_round, neighbours

    found, begin = Search(item, shipped), clock()
    wanted = first_round(item.op, shipped, itemsize)
    for turn in range(MOST_ROUNDS):
        fresh = [config for config in wanted if not found.tried(config) and fits(config)]
        if shipped in fresh:
            fresh.remove(shipped)
            fresh.insert(0, shipped)
        if not fresh:
            found.ended = "no neighbour left"
            return found
        before = min(found.scores().values(), default=9e9)
        for config, result in measure(fresh).items():
            if isinstance(result, str):
                found.rejected[config] = result
            else:
                found.times[config] = result
        scores = found.scores()
        if not scores:
            found.ended = f"the shipped configuration does not run: {found.rejected.get(shipped)}"
            return found
        if turn and min(scores.values()) >= before:
            found.ended = "no neighbour is faster"
            return found
        if clock() - begin > seconds:
            found.ended = "time used"
            return found
        leaders = sorted(scores, key=lambda config: scores[config])[:BEAM]
        wanted = [near for leader in leaders for near in neighbours(item.op, leader, itemsize)]
    found.ended = f"{MOST_ROUNDS} rounds"
    return found


class Tuner:
    """Searches on the device, one item after another."""

    def __init__(self, options: argparse.Namespace) -> None:
        from bench.kernel_check.report import environment
        from bench.kernel_check.worker import DeviceHands, Worker

        self.begin, self.options = time.monotonic(), options
        self.worker = Worker(DeviceHands, "cuda")
        self.head: dict[str, Any] = environment(options.commit)
        self.searches: list[Search] = []
        self.checks: dict[str, str] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    def tasks(self, item: Any, config: Any) -> list[Any]:
        """The launches that are timed for a configuration."""
        from bench.kernel_check.tasks import Task
        from bench.kernel_tuner.space import WEIGHTS

        return [
            Task(
                "tune",
                op=item.op,
                shape=shape,
                dtype=self.options.dtype,
                context=context,
                lengths=tuple(WEIGHTS),
                runs=REPLAYS,
                config=config,
            )
            for shape in item.shapes
            for context in item.contexts
        ]

    def measure(self, item: Any, compilers: Any, deadline: float) -> Measure:
        """The `measure` of `search`; configurations after the deadline are skipped, the first never."""

        def run(configs: list[Any]) -> dict[Any, dict[tuple[str, int, int], float] | str]:
            compilers.ask([task for config in configs for task in self.tasks(item, config)])
            found: dict[Any, dict[tuple[str, int, int], float] | str] = {}
            for config in configs:
                if found and time.monotonic() > deadline:
                    break
                found[config] = self._time(item, config, compilers)
            return found

        return run

    def _time(self, item: Any, config: Any, compilers: Any) -> dict[tuple[str, int, int], float] | str:
        times: dict[tuple[str, int, int], float] = {}
        for task in self.tasks(item, config):
            problem = compilers.wait(task, 120.0)
            if problem:
                return f"does not compile: {problem}"
            rows: list[dict[str, Any]] = []
            outcome = self.worker.run(task, rows.append)
            if outcome.error:
                return outcome.error
            for row in rows:
                if "rejected" in row:
                    return str(row["rejected"])
                times[row["shape"], row["context"], row["T"]] = row["us"]
        return times

    def verify(self, item: Any, config: Any) -> str:
        """Hold a winner against float64 and for races at its shapes; "" or what is wrong."""
        from bench.kernel_check.cases import llama_sizes
        from bench.kernel_check.problems.base import Case
        from bench.kernel_check.tasks import RACE_LENGTHS, Task
        from bench.kernel_tuner.space import as_sizes

        for shape in item.shapes:
            sizes = llama_sizes(item.op, shape, 9000 if item.op == "attention" else 1000)
            case = Case(item.op, self.options.dtype, f"tuned-{shape.name}", sizes | as_sizes(config))
            for task in (Task("check", case), Task("races", case, lengths=RACE_LENGTHS, runs=30)):
                rows: list[dict[str, Any]] = []
                outcome = self.worker.run(replace(task, limit=180.0), rows.append)
                wrong = outcome.error or "; ".join(row["message"] for row in rows if not row["ok"])
                if wrong:
                    return wrong
        return ""

    def run(self) -> int:
        """All items; the exit status."""
        import torch

        from bench.kernel_check.problems.base import Place
        from bench.kernel_check.tasks import Task
        from bench.kernel_check.worker import Compilers
        from bench.kernel_tuner.space import first_round, fits, items, literal

        outcome = self.worker.run(Task("describe"), lambda row: self.head.update(row), 120)
        if outcome.error:
            print(f"no device: {outcome.error}")
            return 1
        capability = int(self.head["capability"])
        place, dtype = Place(torch.device("meta"), capability), getattr(torch, self.options.dtype)
        todo = items(self.options.op or OPS, self.options.shape or [s.name for s in SHAPES])
        compilers = Compilers(self.options.workers, capability, launchers=True)
        try:
            for index, item in enumerate(todo):
                left = 60 * self.options.minutes - self.elapsed()
                if left < 5:
                    print(f"no time left for {', '.join(later.name for later in todo[index:])}")
                    break
                # The next item's first candidates are compiled while this one's are timed.
                for near in todo[index : index + 2]:
                    first = first_round(near.op, shipped_config(near, place, dtype), dtype.itemsize)
                    wanted = [c for c in first if fits(near, c, arch=capability, itemsize=dtype.itemsize)]
                    compilers.ask([task for config in wanted for task in self.tasks(near, config)])
                share = left / (len(todo) - index)
                found = search(
                    item,
                    shipped_config(item, place, dtype),
                    self.measure(item, compilers, time.monotonic() + share),
                    fits=partial(fits, item, arch=capability, itemsize=dtype.itemsize),
                    itemsize=dtype.itemsize,
                    seconds=share,
                )
                self.searches.append(found)
                best = found.best()
                self.checks[item.name] = self.verify(item, best) if best != found.shipped else ""
                gain = found.scores().get(best, 1.0)
                wrong = self.checks[item.name]
                print(
                    f"{self.elapsed():6.1f} s  {item.name:32} {len(found.times):3} timed, {len(found.rejected):3} "
                    f"rejected, {gain:.3f} of the shipped time, {found.ended}: {literal(best)}"
                    + (f" WRONG: {wrong}" if wrong else ""),
                    flush=True,
                )
                self.save(place.arch, capability)
        finally:
            compilers.close()
            self.worker.close()
        self.save(place.arch, capability)
        print("\n".join(table(self.searches)))
        print(f"\n{self.entries(place.arch, capability)}")
        return 1 if any(self.checks.values()) else 0

    def entries(self, arch: int, capability: int) -> str:
        """Source of the tuned tables: only what is faster and right."""
        from bench.kernel_tuner.space import entry

        lines: dict[str, list[str]] = {"kernels/configs.py": [], "kernels/forward/attention_configs.py": []}
        for found in self.searches:
            best = found.best()
            if best != found.shipped and not self.checks[found.item.name]:
                attention = found.item.op == "attention"
                target = "kernels/forward/attention_configs.py" if attention else "kernels/configs.py"
                key = capability if attention else arch
                lines[target].append(entry(found.item, best, key, self.options.dtype))
        parts = [f"# TUNED of {name}:\n" + "\n".join(found) for name, found in lines.items() if found]
        return "\n".join(parts) or "# nothing is faster than what is shipped"

    def save(self, arch: int, capability: int) -> None:
        """Both files, after every item."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        content = {k: v for k, v in self.head.items() if k not in ("kind", "task", "seconds")}
        content["items"] = [found.json() | {"wrong": self.checks[found.item.name]} for found in self.searches]
        text = json.dumps(content, indent=1) + "\n"
        (self.options.out / "tune_kernels.json").write_text(text, encoding="utf-8")
        (self.options.out / "tuned.py").write_text(self.entries(arch, capability) + "\n", encoding="utf-8")


def shipped_config(item: Any, place: Any, dtype: Any) -> Any:
    """The configuration that the tables give for an item today."""
    from bench.kernel_check.traffic import matrix
    from pyramid_rt.kernels.configs import projection_config
    from pyramid_rt.kernels.forward.attention_configs import config_for

    if item.op == "attention":
        return config_for(dtype, item.shapes[0].head_dim, place.capability)
    rows, width = matrix(item.op, item.shapes[0])
    kind: Any = "project" if item.op in ("out", "down") else item.op
    return projection_config(kind, place.arch, rows, width, dtype)


def table(searches: list[Search]) -> list[str]:
    """The shipped configuration's microseconds beside the best's."""
    lines = [f"\n{'item':32} {'at':24} {'shipped us':>10} {'best us':>10} {'ratio':>6}"]
    for found in searches:
        base, best = found.times.get(found.shipped), found.times.get(found.best())
        for key in base or {}:
            assert base is not None
            assert best is not None
            shape, context, length = key
            lines.append(
                f"{found.item.name:32} {f'{shape} {context} T={length}':24} {base[key]:10.2f} {best[key]:10.2f} "
                f"{best[key] / base[key]:6.3f}"
            )
    return lines


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments(argv)
    set_interpreter("cuda")
    return Tuner(options).run()
