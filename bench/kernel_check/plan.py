"""The tasks of a run and their order: what matters most first, all within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from bench.kernel_check import cases
from bench.kernel_check.problems.base import Case
from bench.kernel_check.tasks import RACE_LENGTHS, Task
from bench.kernel_check.traffic import DECISION_OPS
from pyramid_rt.models.shapes import SHAPES, Shape

MAIN_LENGTHS = (1, 16, 64)
OTHER_LENGTHS = (2, 4, 8, 32)
EVERY_LENGTH = tuple(range(1, 65))
EVERY_FIRST = tuple(range(64))
CONTEXTS = (1024, 8192, 32768)
# Positions of the timed verifies: a pyramid's usual one, and the paper's longest.
VERIFY_LENGTHS = (8, 41)
TIMED_OPS = ("gate_up", "down", "qkv", "out", "head", "attention", "embed", "compact")
# Of the budget, what checks may take before timings come first; checks left over then follow the timings.
CHECK_SHARE = 0.6


def forward_case(shape: Shape = SHAPES[0], *, start: int = 200, dtype: str = "bfloat16") -> Case:
    """Two layers of a Llama: its kernels are those that the shape's other cases compile."""
    sizes = {
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "layers": 2,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab": shape.vocab,
        "start": start,
    }
    return Case("forward", dtype, shape.name, sizes)


def round_cases() -> list[Case]:
    """Whole rounds of a small pyramid: every chain of rules, with noise and without, with filters once."""
    sizes = {
        "hidden": 256,
        "intermediate": 512,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "vocab": 4096,
    }
    made: tuple[dict[str, int], ...] = (
        {"chain": 1, "heat": 7},
        {"chain": 0, "heat": 0},
        {"chain": 2, "heat": 7, "filters": 1},
        {"chain": 3, "heat": 7, "inner": 2},
    )
    return [
        Case("round", "bfloat16", "-".join(f"{k}{v}" for k, v in more.items()), {**sizes, **more, "new": 60})
        for more in made
    ]


def _check(case: Case) -> Task:
    if case.op in cases.DECISION_OPS:
        # Each length is a binary of its own: the many cases of the smallest vocabulary make do with two.
        small = case.sizes["vocab"] == min(cases.VOCABS)
        return Task("check", case, lengths=(2, 41) if small else (8, 41, 64), seconds=0.3 if small else 0.8)
    return Task("check", case, seconds=1.5 if case.sizes.get("start", 0) > 100_000 else 0.6)


def _invariance(case: Case) -> Task:
    return Task(
        "invariance",
        case,
        lengths=EVERY_LENGTH,
        firsts=EVERY_FIRST,
        seconds=5.0 if case.op == "forward" else 2.0,
        limit=180.0,
    )


def _races(case: Case) -> Task:
    if case.op in cases.DECISION_OPS:
        return Task("races", case, lengths=VERIFY_LENGTHS, runs=100, seconds=0.6)
    return Task("races", case, lengths=RACE_LENGTHS, runs=100, seconds=0.6)


def check_tasks() -> list[Task]:
    """All checks, in order of worth: the shipping type whole before any other type."""
    whole = forward_case()
    checks = [_check(case) for case in cases.check_cases()]
    bits = [_invariance(case) for case in (whole, *cases.invariance_cases())]
    again = [_races(case) for case in (whole, *cases.race_cases())]

    def first(tasks: list[Task]) -> list[Task]:
        return [task for task in tasks if task.case is not None and cases.ships(task.case)]

    def rest(tasks: list[Task]) -> list[Task]:
        return [task for task in tasks if task.case is not None and not cases.ships(task.case)]

    return [
        *first(checks),
        _check(whole),
        *(Task("round", case, seconds=4.0, limit=150.0) for case in round_cases()),
        *first(bits),
        Task("chunks", whole, lengths=(2, 7, 16, 17, 33, 63, 64, 150), seconds=4.0),
        *first(again),
        *rest(checks),
        *rest(bits),
        *rest(again),
    ]


def decision_timings(shape: Shape = SHAPES[-1], lengths: tuple[int, ...] = VERIFY_LENGTHS) -> list[Task]:
    """Decisions over one model's vocabulary, which the others share."""
    return [
        Task(
            "time",
            op=op,
            shape=shape,
            dtype="float32",
            lengths=(1,) if op in ("sample", "readback") else lengths,
            context=0,
            seconds=2.0,
        )
        for op in DECISION_OPS
    ]


def timing_tasks() -> list[Task]:
    """All timings, in order of worth: whole steps, then every kernel at three T, long contexts, the other T."""
    tasks = [Task("copy", seconds=1.0)]
    tasks += [
        Task("step", op="step", shape=s, lengths=MAIN_LENGTHS, seconds=6.0, limit=150.0) for s in SHAPES
    ]

    def times(lengths: tuple[int, ...], context: int, ops: Iterable[str], seconds: float) -> list[Task]:
        return [
            Task("time", op=op, shape=shape, lengths=lengths, context=context, seconds=seconds)
            for shape in reversed(SHAPES)
            for op in ops
        ]

    tasks += decision_timings()
    tasks += times(MAIN_LENGTHS, CONTEXTS[0], TIMED_OPS, 1.5)
    for context in CONTEXTS[1:]:
        tasks += times(MAIN_LENGTHS, context, ("attention",), 2.0)
    tasks += times(OTHER_LENGTHS, CONTEXTS[0], TIMED_OPS, 1.5)
    for context in CONTEXTS[1:]:
        tasks += times(OTHER_LENGTHS, context, ("attention",), 2.0)
    return tasks


def compile_order(checks: list[Task], timings: list[Task]) -> list[Task]:
    """The shipping type's checks, then timings, whose binaries are mostly the same, then other types."""

    def first(task: Task) -> bool:
        return task.case is not None and cases.ships(task.case)

    return [*filter(first, checks), *timings, *(task for task in checks if not first(task))]


def quick_tasks() -> tuple[list[Task], list[Task]]:
    """A smoke run: a few cases of every op and kind, one shape timed."""
    whole = forward_case()
    some = range(0, 64, 9)
    checks = [_check(case) for case in (*cases.quick(cases.check_cases()), whole)]
    checks += [
        replace(_invariance(case), firsts=tuple(some), lengths=(1, 2, 7, 16, 17, 33, 64), seconds=0.6)
        for case in (*cases.quick(cases.invariance_cases()), whole)
    ]
    checks.append(Task("chunks", whole, lengths=(7, 64), seconds=1.0))
    checks += [replace(_races(case), runs=20, seconds=0.3) for case in cases.quick(cases.race_cases())]
    checks.append(Task("round", round_cases()[0], seconds=4.0, limit=150.0))
    small, large = SHAPES[0], SHAPES[-1]
    timings = [Task("copy", seconds=1.0)]
    timings.append(Task("step", op="step", shape=small, lengths=(1, 16), seconds=4.0))
    timings += [Task("time", op=op, shape=large, lengths=(1, 16), seconds=1.0) for op in TIMED_OPS]
    timings += decision_timings(large, VERIFY_LENGTHS[:1])
    return checks, timings


def interpreter_tasks() -> tuple[list[Task], list[Task]]:
    """The same flow at sizes that the interpreter runs in seconds."""
    tiny = Shape("tiny", 64, 96, 1, 2, 1, 64, 100)
    whole = forward_case(tiny, start=5, dtype="float32")
    # Few rows: each costs a pass of tens of milliseconds before the first check.
    whole = replace(whole, sizes={**whole.sizes, "layers": 1, "rows": 6})
    made = [*cases.tiny_cases(), whole]
    decisions = [case for case in made if case.op in cases.DECISION_OPS]
    checks = [
        Task("check", case, lengths=(2, 6) if case in decisions else (1, 5 if case is whole else 17))
        for case in made
    ]
    checks += [
        Task("invariance", case, lengths=(1, 5), firsts=(0, 1))
        for case in made
        if case.op != "compact" and case not in decisions and not case.sizes.get("tree")
    ]
    checks.append(Task("round", tiny_round(tiny)))
    checks.append(Task("chunks", whole, lengths=(64,)))
    checks += [Task("races", case, lengths=(2,), runs=2) for case in made]
    timings = [Task("copy"), Task("step", op="step", shape=tiny, lengths=(1, 2), context=8)]
    timings += [Task("time", op=op, shape=tiny, lengths=(1,), context=8) for op in TIMED_OPS]
    timings += decision_timings(tiny, (2,))
    return checks, timings


def tiny_round(shape: Shape, **sizes: int) -> Case:
    """A round that the interpreter runs in seconds."""
    names = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")
    whole = {name: getattr(shape, name) for name in names} | {"layers": 1, "chain": 1, "heat": 7, "new": 2}
    return Case("round", "float32", "tiny", whole | {"draft": 1, "qualify": 1, "inner": 1} | sizes)


def only(tasks: list[Task], ops: Sequence[str] | None) -> list[Task]:
    """Tasks of the named ops; the copy, which others are compared with, stays."""
    if not ops:
        return tasks
    return [t for t in tasks if t.kind == "copy" or (t.op or (t.case.op if t.case else "")) in ops]


@dataclass
class Budget:
    """Hands out tasks until the time is used.

    Attributes:
        checks, timings: still to do, in order of worth.
        seconds: of the whole run.
        left_out: keys of tasks that did not fit.
    """

    checks: list[Task]
    timings: list[Task]
    seconds: float
    left_out: list[str] = field(default_factory=list)

    def next(
        self, elapsed: float, slow: float = 1.0, ready: Callable[[Task], bool] = lambda task: True
    ) -> Task | None:
        """The next task that is guessed to fit, None when nothing does.

        Args:
            elapsed: seconds since the start.
            slow: how much longer tasks took so far than guessed.
            ready: tasks that need not wait for a compiler go first, in their order.
        """
        late = elapsed > CHECK_SHARE * self.seconds
        queues = (self.timings, self.checks) if late else (self.checks, self.timings)
        for queue in queues:
            for task in [t for t in queue if elapsed + t.seconds * slow > self.seconds]:
                queue.remove(task)
                self.left_out.append(task.key)
        waiting = [(queue, task) for queue in queues for task in queue]
        if not waiting:
            return None
        # Of the first queue with any ready task its first ready one; without one, what matters most.
        queue, task = next((pair for pair in waiting if ready(pair[1])), waiting[0])
        queue.remove(task)
        return task

    def drop(self, op: str) -> None:
        """Leave out what remains of an op whose launches crash the device."""
        for queue in (self.checks, self.timings):
            for task in [t for t in queue if (t.op or (t.case.op if t.case else "")) == op]:
                queue.remove(task)
                self.left_out.append(task.key)
