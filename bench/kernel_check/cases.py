"""The registered problems of the check and the lists of their cases. Pure data but for `build`.

An op joins with a problem class (`problems.base.Problem`), its cases here, and, to be timed, an entry in
`timed.TIMED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.kernel_check.problems.base import Case, Place, Problem
from bench.kernel_check.problems.cache import Attention, Compact
from bench.kernel_check.problems.decision import CUTS, MODES, Draw, Report, Verify
from bench.kernel_check.problems.head import Head
from bench.kernel_check.problems.products import Embed, GateUp, Project, Qkv
from pyramid_rt.kernels.decide.decision import RULES
from pyramid_rt.kernels.reference.sampling import DIVERGENCES
from pyramid_rt.models.shapes import SHAPES, Shape

DTYPES = ("bfloat16", "float16", "float32")
LENGTHS = (1, 2, 7, 16, 17, 64)

PROBLEMS: dict[str, Callable[[Case, Place], Problem]] = {
    "embed": Embed,
    "qkv": Qkv,
    "attention": Attention,
    "out": Project,
    "gate_up": GateUp,
    "down": Project,
    "head": Head,
    "compact": Compact,
    "decide": Verify,
    "reject": Verify,
    "filters": Verify,
    "sample": Draw,
    "readback": Report,
}
# Those that decide a round. They know no model and one dtype, that of logits.
DECISION_OPS = ("decide", "reject", "filters", "sample", "readback")
FORWARD_OPS = tuple(op for op in PROBLEMS if op not in DECISION_OPS)
VOCABS = (128256, 4096, 49152, 32749)


def ships(case: Case) -> bool:
    """True for the cases that run first: those in the type of the weights, and decisions."""
    return case.dtype == "bfloat16" or case.op in DECISION_OPS


def build(case: Case, place: Place) -> Problem:
    """The problem of a case."""
    return PROBLEMS[case.op](case, place)


def llama_sizes(op: str, shape: Shape, start: int) -> dict[str, int]:
    """Sizes of an op's problem at a Llama's shape."""
    queries = shape.heads * shape.head_dim
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    return {
        "embed": {"vocab": shape.vocab, "hidden": shape.hidden},
        "qkv": {"hidden": shape.hidden, **heads, "start": start},
        "attention": {**heads, "start": start},
        "out": {"channels": shape.hidden, "width": queries},
        "gate_up": {"inner": shape.intermediate, "width": shape.hidden},
        "down": {"channels": shape.hidden, "width": shape.intermediate},
        "head": {"vocab": shape.vocab, "padded": shape.vocab, "width": shape.hidden, "noise": 7},
        "compact": {
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "rows": start + 64,
            "head_dim": shape.head_dim,
            "start": start,
            "count": 21,
        },
    }[op]


def llama_cases(dtype: str, shapes: tuple[Shape, ...] = SHAPES, start: int = 1000) -> Iterator[Case]:
    """Every op at the shapes of the Llamas."""
    for shape in shapes:
        for op in FORWARD_OPS:
            yield Case(op, dtype, shape.name, llama_sizes(op, shape, start))


def odd_cases(dtype: str) -> Iterator[Case]:
    """Sizes that divide nothing, biases, every number of splits, several heads a tile."""
    for hidden in (72, 200):
        yield Case("embed", dtype, f"odd-{hidden}", {"vocab": 37, "hidden": hidden})
    odd: tuple[tuple[str, dict[str, int]], ...] = (
        (
            "qkv",
            {"hidden": 200, "heads": 3, "kv_heads": 1, "head_dim": 64, "start": 80, "splits": 2, "bias": 1},
        ),
        ("qkv", {"hidden": 136, "heads": 2, "kv_heads": 2, "head_dim": 96, "start": 0, "interleaved": 1}),
        ("qkv", {"hidden": 328, "heads": 8, "kv_heads": 1, "head_dim": 128, "start": 9, "splits": 4}),
        ("qkv", {"hidden": 72, "heads": 3, "kv_heads": 1, "head_dim": 16, "start": 5, "sub_tiles": 1}),
        ("out", {"channels": 72, "width": 200, "splits": 2, "bias": 1}),
        ("out", {"channels": 136, "width": 328, "splits": 4, "sub_tiles": 1}),
        ("down", {"channels": 200, "width": 1096, "splits": 8}),
        ("gate_up", {"inner": 40, "width": 72, "bias": 1}),
        ("gate_up", {"inner": 232, "width": 328, "splits": 4}),
        ("gate_up", {"inner": 100, "width": 200, "splits": 2, "sub_tiles": 1}),
        ("head", {"vocab": 101, "padded": 104, "width": 72}),
        ("head", {"vocab": 1000, "padded": 1004, "width": 200, "noise": 10, "sub_tiles": 1}),
        ("head", {"vocab": 1000, "padded": 1000, "width": 256, "noise": 10, "placed": 1}),
        ("embed", {"vocab": 37, "hidden": 128, "placed": 1}),
    )
    for number, (op, sizes) in enumerate(odd):
        yield Case(op, dtype, f"odd-{number}", sizes)


def attention_cases(dtype: str, *, tree: bool = True) -> Iterator[Case]:
    """Every group size and head size, contexts on the borders of the split table up to 131,072."""
    sizes: tuple[tuple[int, int, int, int], ...] = (
        (1, 1, 64, 0),
        (4, 2, 96, 255),
        (3, 1, 128, 8192 - 31),
        (4, 1, 64, 32768 - 31),
        (5, 1, 128, 2000),
        (6, 1, 96, 8100),
        (14, 2, 64, 40000),
        (8, 1, 128, 131072 - 64),
        (4, 1, 64, 131072 - 64),
    )
    for heads, kv_heads, dim, start in sizes:
        made = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "start": start}
        name = f"h{heads}-kv{kv_heads}-d{dim}-at{start}"
        yield Case("attention", dtype, name, made)
        if tree and start in (0, 255, 8192 - 31, 32768 - 31):
            yield Case("attention", dtype, name + "-tree", made | {"tree": 1})


def compact_cases(dtype: str) -> Iterator[Case]:
    """Nothing, one row, some, all."""
    for count, dim in ((0, 64), (1, 96), (63, 128), (64, 64)):
        sizes = {"layers": 2, "kv_heads": 3, "rows": 131, "head_dim": dim, "start": 5, "count": count}
        yield Case("compact", dtype, f"odd-{count}", sizes)


def decided(op: str, vocab: int, **sizes: int) -> Case:
    """A decision; its name says what is not as usual."""
    named = "-".join(f"{name}{value}" for name, value in sizes.items())
    return Case(op, "float32", f"v{vocab}-{named}", {"vocab": vocab, **sizes})


def decision_cases() -> Iterator[Case]:
    """Every rule over every vocabulary with and without noise; in the smallest all else that a verify may meet."""
    match, reject, fuzzy, either = (
        RULES.index(rule) for rule in ("match", "rejection", "fuzzy", "fuzzy_or_match")
    )
    for vocab in VOCABS:
        for heat in (7, 0):
            yield from (decided("decide", vocab, rule=rule, heat=heat) for rule in (match, fuzzy, either))
            yield decided("reject", vocab, rule=reject, heat=heat)
        for filters in (1, 4):
            yield decided("filters", vocab, rule=match, heat=7, filters=filters)
            yield decided("sample", vocab, heat=7, filters=filters)
        yield decided("sample", vocab, heat=7)
    vocab = min(VOCABS)
    for mode in range(1, len(MODES)):
        for heat in (7, 0):
            yield from (
                decided("decide", vocab, rule=rule, heat=heat, mode=mode) for rule in (match, fuzzy, either)
            )
            yield decided("reject", vocab, rule=reject, heat=heat, mode=mode)
    for cut, fared in ((1, "all"), (2, "late"), (3, "late"), (4, "all")):
        for op, rule in (("decide", match), ("reject", reject)):
            yield decided(op, vocab, rule=rule, heat=7, mode=MODES.index(fared), cut=cut)
    for kind in range(1, len(DIVERGENCES)):
        yield decided("decide", vocab, rule=fuzzy, heat=7, kind=kind)
    for kind in (0, DIVERGENCES.index("topk_js")):
        yield decided("decide", vocab, rule=fuzzy, heat=13, kind=kind, processed=1)
        yield decided("decide", vocab, rule=either, heat=7, kind=kind, processed=1, filters=1, tiers=3)
    for filters in (2, 3, 5):
        yield decided("filters", vocab, rule=match, heat=7, filters=filters)
    yield decided("filters", vocab, rule=match, heat=0, filters=1)
    yield decided("decide", vocab, rule=match, heat=7, tiers=3, level=1)
    for filters in (0, 1):
        yield decided("reject", vocab, rule=reject, heat=7, tiers=3, filters=filters)
    for name in ("stop stands", "stop corrects", "limit"):
        yield decided("sample", vocab, heat=7, cut=CUTS.index(name))
    for filters in (0, 1):
        yield decided("sample", vocab, heat=7, first=1, filters=filters)
    for tiers in (1, 2, 3):
        yield decided("readback", vocab, tiers=tiers)


def decision_race_cases() -> Iterator[Case]:
    """Every kernel over the largest vocabulary, where most programs race."""
    vocab = max(VOCABS)
    topk = DIVERGENCES.index("topk_js")
    yield decided("decide", vocab, rule=0, heat=7)
    yield decided("decide", vocab, rule=RULES.index("fuzzy"), heat=7, mode=3)
    yield decided("decide", vocab, rule=RULES.index("fuzzy_or_match"), heat=7, kind=topk)
    yield decided("reject", vocab, rule=RULES.index("rejection"), heat=7, mode=3)
    yield decided("reject", vocab, rule=RULES.index("rejection"), heat=7, tiers=3, filters=1)
    yield from (decided("filters", vocab, rule=0, heat=7, filters=filters) for filters in (1, 2, 4))
    yield decided("sample", vocab, heat=7, filters=2)
    yield decided("readback", min(VOCABS), tiers=3)


def binaries(case: Case) -> str:
    """Decisions of the same answer run the same binaries."""
    kept = {name: value for name, value in case.sizes.items() if name not in ("heat", "mode", "cut")}
    if "filters" in kept:
        kept["filters"] = int(kept["filters"] > 0)
    return f"{case.op}/{sorted(kept.items())}"


def check_cases() -> list[Case]:
    """For correctness, in order of worth: the type that ships first."""
    cases = [*llama_cases("bfloat16"), *odd_cases("bfloat16"), *attention_cases("bfloat16")]
    cases += [*compact_cases("bfloat16"), *decision_cases()]
    for dtype in ("float16", "float32"):
        cases += [*odd_cases(dtype), *attention_cases(dtype), *compact_cases(dtype), *llama_cases(dtype)]
    return cases


def invariance_cases() -> list[Case]:
    """For batch invariance: what is rowwise, in order of worth."""
    skipped = ("compact",)
    cases = [c for c in llama_cases("bfloat16") if c.op not in skipped]
    cases += [c for c in odd_cases("bfloat16") if c.op != "embed" or "placed" in c.sizes]
    cases += [c for c in attention_cases("bfloat16", tree=False) if c.sizes["start"] < 100_000]
    for dtype in ("float16", "float32"):
        cases += [c for c in llama_cases(dtype, SHAPES[:1]) if c.op not in skipped]
    return cases


def race_cases() -> list[Case]:
    """For 100 runs beside other work."""
    cases = [*decision_race_cases(), *llama_cases("bfloat16"), *attention_cases("bfloat16")]
    cases += [c for c in odd_cases("bfloat16") if c.op != "embed" or "placed" in c.sizes]
    for dtype in ("float16", "float32"):
        cases += llama_cases(dtype, SHAPES[:1])
    return cases


def quick(cases: list[Case]) -> list[Case]:
    """A few cases of every op in bfloat16: for a smoke run."""
    kept: dict[str, list[Case]] = {}
    for case in cases:
        chosen = kept.setdefault(case.op, [])
        if ships(case) and len(chosen) < 2 and case.name != SHAPES[1].name:
            chosen.append(case)
    return [case for case in cases if case in kept[case.op]]


def tiny_cases() -> list[Case]:
    """For the interpreter: every op in a few milliseconds each."""
    made: tuple[tuple[str, str, dict[str, int]], ...] = (
        ("embed", "bfloat16", {"vocab": 37, "hidden": 72}),
        (
            "qkv",
            "bfloat16",
            {"hidden": 40, "heads": 2, "kv_heads": 1, "head_dim": 16, "start": 9, "splits": 2},
        ),
        ("qkv", "float32", {"hidden": 72, "heads": 1, "kv_heads": 1, "head_dim": 64, "start": 0, "bias": 1}),
        ("attention", "bfloat16", {"heads": 3, "kv_heads": 1, "head_dim": 64, "start": 250}),
        ("attention", "float16", {"heads": 2, "kv_heads": 1, "head_dim": 64, "start": 20, "tree": 1}),
        ("out", "float16", {"channels": 72, "width": 80, "splits": 2}),
        ("gate_up", "float32", {"inner": 40, "width": 72}),
        ("down", "bfloat16", {"channels": 72, "width": 160, "splits": 4, "sub_tiles": 1}),
        ("head", "float32", {"vocab": 101, "padded": 104, "width": 40, "noise": 7}),
        ("head", "bfloat16", {"vocab": 60, "padded": 64, "width": 40, "noise": 7, "placed": 1}),
        ("embed", "float16", {"vocab": 37, "hidden": 64, "placed": 1}),
        (
            "compact",
            "float16",
            {"layers": 1, "kv_heads": 1, "rows": 80, "head_dim": 64, "start": 5, "count": 7},
        ),
    )
    cases = [Case(op, dtype, f"tiny-{number}", sizes) for number, (op, dtype, sizes) in enumerate(made)]
    cases += [
        decided("decide", 101, rule=RULES.index("fuzzy_or_match"), heat=7),
        decided("decide", 101, rule=0, heat=0, mode=3),
        decided("reject", 101, rule=RULES.index("rejection"), heat=7, mode=3),
        decided("filters", 101, rule=0, heat=7, filters=4),
        decided("sample", 101, heat=7, filters=2),
        decided("readback", 101, tiers=2),
    ]
    return cases


def as_json(case: Case) -> dict[str, Any]:
    """For the result file."""
    return {"op": case.op, "dtype": case.dtype, "name": case.name, "sizes": dict(case.sizes)}
