"""The result file of the kernel check, its goals, and the tables printed from it. Nothing here needs a GPU."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Milliseconds of a whole step of one row on an H100, bfloat16, context 1k.
STEP_GOALS = {"llama-3.2-1b": 1.10, "llama-3.2-3b": 2.65, "llama-3.1-8b": 5.85}
# Of a step of T rows over a step of one.
WIDTH_GOALS = {16: 1.10, 64: 1.35}
PEER_GOAL = 1.03
ATTENTION_GOAL = 0.85
ATTENTION_CONTEXT = 32768
# Microseconds of a decision over 128,256 entries on an H100: name, ops of which the slowest counts, positions.
DECISION_GOALS = (
    ("8 positions decided without filters, us", ("decide", "match"), 8, 12.0),
    ("8 positions decided with filters, us", ("filtered",), 8, 25.0),
    ("41 positions decided, us", ("decide", "match", "filtered"), 41, 40.0),
)
# Timings of several checked kernels, or of one under another name.
RESTS_ON = {"match": ("decide",), "filtered": ("decide", "filters"), "reject": ("filters",)}
CHECKS = ("check", "invariance", "chunks", "races", "round")


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal of the project and what was found.

    Attributes:
        name: what is asked.
        found, target: in the same unit; None where nothing was measured.
        at_least: a share that should be high; else found should be at most target.
        note: what else to know.
    """

    name: str
    found: float | None
    target: float
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None if not measured."""
        if self.found is None:
            return None
        return self.found >= self.target if self.at_least else self.found <= self.target

    def line(self) -> str:
        """For people."""
        sign = ">=" if self.at_least else "<="
        head = f"{self.name} {sign} {self.target:g}"
        tail = f" ({self.note})" if self.note else ""
        if self.found is None:
            return f"{head}: not measured{tail}"
        if self.met:
            return f"{head}: met, {self.found:.3f}{tail}"
        # By how much the work would have to get faster, or the share to rise.
        distance = self.target / self.found - 1 if self.at_least else self.found / self.target - 1
        return f"{head}: missed by {distance:.1%}, {self.found:.3f}{tail}"


def environment(commit: str | None = None) -> dict[str, Any]:
    """Versions, date and commit; the device comes from the worker that holds it."""
    import torch
    import triton

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def bandwidth(rows: Iterable[Row]) -> float | None:
    """Bytes per second of the run's copy, None before it."""
    return next((row["bytes_per_second"] for row in rows if row["kind"] == "copy" and row["ok"]), None)


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Timings with the share of the copy's bandwidth that their least traffic amounts to.

    An op of which a check failed in this run is not compared with torch: a wrong result may be fast.
    """
    found, result = bandwidth(rows), list[Row]()
    wrong = {row["op"] for row in rows if not row.get("ok", True) and row["kind"] in CHECKS}
    wrong |= {op for op, parts in RESTS_ON.items() if wrong.intersection(parts)}
    for row in rows:
        made = dict(row)
        if "us" in row and found is not None:
            made["copy_share"] = round(row["bytes"] / (row["us"] * 1e-6) / found, 4)
        if "ratio" in row and row["op"] in wrong:
            del made["ratio"]
            made["message"] = "a check of this op fails in this run"
        result.append(made)
    return result


@dataclass
class Report:
    """Rows as they come, in a file that is whole after each of them.

    Attributes:
        path: of the file.
        head: device, versions and commit.
        rows: see `gpu_tasks`.
        left_out: keys of tasks that did not fit the budget.
        notes: what else a reader must know.
    """

    path: Path
    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _saved: float = -1e9

    def add(self, row: Row) -> None:
        """Keep a row; write at most twice a second. Whoever adds the last of several saves."""
        self.rows.append(row)
        if time.monotonic() - self._saved > 0.5:
            self.save()

    def failed(self) -> list[Row]:
        """Rows that are not right."""
        return [row for row in self.rows if not row.get("ok", True)]

    def content(self) -> dict[str, Any]:
        """The file's content."""
        rows = with_shares(self.rows)
        found = goals(rows, str(self.head.get("device", "")))
        return {
            **self.head,
            "complete": not self.left_out,
            "failed": len(self.failed()),
            "goals": [
                {"name": g.name, "target": g.target, "found": g.found, "met": g.met, "note": g.note}
                for g in found
            ],
            "left_out": self.left_out,
            "notes": self.notes,
            "rows": rows,
        }

    def save(self) -> None:
        """Replace the file at once, so that a kill at any moment leaves a whole one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(_lines(self.content()), encoding="utf-8")
        os.replace(part, self.path)
        self._saved = time.monotonic()


def _lines(content: dict[str, Any]) -> str:
    """JSON with one line a row: a diff of two runs can be read."""
    rows = content["rows"]
    head = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1, allow_nan=False)
    body = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
    return head[:-2] + ',\n "rows": [\n' + body + "\n ]\n}\n"


def _steps(rows: Iterable[Row], shape: str, backend: str = "triton") -> dict[int, Row]:
    """Step timings of one model by T."""
    return {
        row["T"]: row
        for row in rows
        if row["kind"] == "step" and row["shape"] == shape and row["op"] == backend and row["ok"]
    }


def goals(rows: Sequence[Row], device: str) -> list[Goal]:
    """The project's goals held against a run's rows (with shares, where a copy was measured).

    None for the interpreter, whose times say nothing.
    """
    if device == "interpreter":
        return []
    found: list[Goal] = []
    hopper = "H100" in device
    for shape, target in STEP_GOALS.items():
        steps = _steps(rows, shape)
        one = steps.get(1)
        milliseconds = one["us"] / 1e3 if one else None
        share = f"{one['copy_share']:.1%} of copy bandwidth" if one and "copy_share" in one else ""
        if hopper or one is None:
            found.append(Goal(f"step of {shape}, T=1, ms", milliseconds, target, note=share))
        else:
            note = (
                f"{milliseconds:.3f} ms on this device, {share or 'no copy measured'}; the goal is an H100's"
            )
            found.append(Goal(f"step of {shape}, T=1, ms", None, target, note=note))
        for length, ratio in WIDTH_GOALS.items():
            wide = steps[length]["us"] / one["us"] if one and length in steps else None
            found.append(Goal(f"step of {shape}, T={length} over T=1", wide, ratio))
    return found + _attention_goals(rows) + _decision_goals(rows, hopper=hopper) + _peer_goals(rows)


def _decision_goals(rows: Sequence[Row], *, hopper: bool) -> list[Goal]:
    """The slowest of the rules that were timed; not met unless all of them were."""
    found = []
    for name, ops, positions, target in DECISION_GOALS:
        timed = {
            row["op"]: row["us"]
            for row in rows
            if row["kind"] == "time" and row["ok"] and row["op"] in ops and row["T"] == positions
        }
        worst = max(timed, key=lambda op: timed[op]) if len(timed) == len(ops) else None
        note = ", ".join(f"{op} {us:.2f} us" for op, us in timed.items())
        if worst is not None and not hopper:
            note += " on this device; the goal is an H100's"
        found.append(Goal(name, timed[worst] if worst is not None and hopper else None, target, note=note))
    return found


def _attention_goals(rows: Sequence[Row]) -> list[Goal]:
    long = [
        row
        for row in rows
        if row["kind"] == "time"
        and row["op"] == "attention"
        and row["ok"]
        and row["context"] == ATTENTION_CONTEXT
        and row["T"] <= 16
    ]
    found = []
    for shape in STEP_GOALS:
        shares = {
            row["T"]: row["copy_share"] for row in long if row["shape"] == shape and "copy_share" in row
        }
        worst = min(shares, key=lambda length: shares[length]) if shares else None
        name = f"attention of {shape} at 32k, worst T up to 16, share of copy bandwidth"
        note = f"T={worst}" if worst is not None else ""
        found.append(Goal(name, None if worst is None else shares[worst], ATTENTION_GOAL, True, note))
    return found


def _peer_goals(rows: Sequence[Row]) -> list[Goal]:
    """Per op: its slowest timing beside torch."""
    timed = [row for row in rows if row["kind"] == "time" and row["ok"] and "ratio" in row]
    found = []
    for op in dict.fromkeys(row["op"] for row in timed):
        mine = [row for row in timed if row["op"] == op]
        worst = max(mine, key=lambda row: row["ratio"])
        over = sum(row["ratio"] > PEER_GOAL for row in mine)
        note = f"{worst['shape']} T={worst['T']} at {worst['context']}; {over} of {len(mine)} timings over"
        found.append(Goal(f"{op}, time over torch's", worst["ratio"], PEER_GOAL, note=note))
    if not timed:
        found.append(Goal("every kernel, time over torch's", None, PEER_GOAL))
    return found


def check_summary(rows: Sequence[Row]) -> list[str]:
    """A line per kind of check and op, then the failures."""
    lines = []
    for kind in CHECKS:
        mine = [row for row in rows if row["kind"] == kind]
        for op in dict.fromkeys(row["op"] for row in mine):
            cases = [row for row in mine if row["op"] == op]
            bad = sum(not row["ok"] for row in cases)
            worst = max((row.get("worst", 0.0) for row in cases), default=0.0)
            share = f", worst {worst:.2f} of the tolerance" if kind == "check" and not bad else ""
            lines.append(f"{kind:10} {op:10} {len(cases) - bad:3} passed {bad:3} failed{share}")
    for row in rows:
        if not row.get("ok", True):
            where = "/".join(str(row[k]) for k in ("op", "dtype", "shape", "name") if row.get(k))
            lines.append(f"FAILED {row['kind']} {where}: {row['message']}")
    return lines


def _timed(rows: Sequence[Row]) -> list[Row]:
    """Timings, whole steps first."""
    order = {"step": 0, "time": 1}
    timed = [row for row in rows if row["kind"] in order and "us" in row]
    return sorted(timed, key=lambda r: (order[r["kind"]], r["shape"], r["op"], r["context"], r["T"]))


def timing_lines(rows: Sequence[Row]) -> list[str]:
    """A line per timing: microseconds, GB/s, share of the copy, torch's microseconds, the ratio."""
    lines = [
        f"{'shape':14} {'op':11} {'context':>7} {'T':>3} {'us':>10} {'GB/s':>7} {'copy':>6} "
        f"{'torch us':>10} {'ratio':>6}  torch's calls"
    ]
    for row in _timed(rows):
        share = f"{row['copy_share']:.1%}" if "copy_share" in row else "-"
        peer = f"{row['peer_us']:.2f}" if "peer_us" in row else "-"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        name = f"step/{row['op']}" if row["kind"] == "step" else row["op"]
        lines.append(
            f"{row['shape']:14} {name:11} {row['context']:7} {row['T']:3} {row['us']:10.2f} {row['gb_s']:7.0f} "
            f"{share:>6} {peer:>10} {ratio:>6}  {row.get('peer', '')}".rstrip()
        )
    return lines


def timing_table(rows: Sequence[Row]) -> list[str]:
    """The same in short, for it is the end of an output that survives: a line per op, shape and context, a cell
    per T with microseconds, share of the copy, time over torch's.
    """
    timed = _timed(rows)
    if not timed:
        return []
    lengths = sorted({row["T"] for row in timed})
    width = 19
    head = f"{'us, % of copy bandwidth, time over torch':42}"
    lines = [head + "".join(f"{f'T={length}':>{width}}" for length in lengths)]
    table: dict[str, dict[int, str]] = {}
    for row in timed:
        share = f"{row['copy_share']:.0%}" if "copy_share" in row else "-"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        name = f"step, {row['op']}" if row["kind"] == "step" else row["op"]
        key = f"{row['shape']:14} {name:14} at {row['context']}"
        table.setdefault(key, {})[row["T"]] = f"{row['us']:.2f} {share:>4} {ratio:>4}"
    for key, cells in table.items():
        lines.append(f"{key:42}" + "".join(f"{cells.get(length, ''):>{width}}" for length in lengths))
    return lines


def summary(report: Report) -> str:
    """The lines that are printed last."""
    rows = with_shares(report.rows)
    parts = [*timing_lines(rows), "", *timing_table(rows), "", *check_summary(rows), ""]
    parts += [goal.line() for goal in goals(rows, str(report.head.get("device", "")))]
    if report.left_out:
        parts.append(f"\nleft out for lack of time or after a crash ({len(report.left_out)}):")
        parts += report.left_out[:12]
        if len(report.left_out) > 12:
            parts.append(f"... {len(report.left_out) - 12} more, all in {report.path.name}")
    parts += [f"note: {note}" for note in report.notes]
    found = bandwidth(rows)
    if found:
        parts.append(f"copy bandwidth {found / 1e9:.0f} GB/s on {report.head.get('device')}")
    failed = len(report.failed())
    parts.append(f"FAILED: {failed} results" if failed else "passed")
    return "\n".join(parts)
