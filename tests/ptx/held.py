"""The formulas of `pyramid_rt.models.traffic` term by term: which buffer of a kernel each of their bytes is of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ptx.subjects import CONTEXT, DTYPE, LENGTH, PROPOSED, SHAPE, VOCAB
from pyramid_rt.models.traffic import DECISION_OPS, Traffic, traffic

B, T, C, D = DTYPE.itemsize, LENGTH, SHAPE.hidden, SHAPE.head_dim
QUERIES, INNER, SUMS = SHAPE.heads * D, SHAPE.intermediate, 4 * T * (C // 64)
R, M = PROPOSED + 1, PROPOSED
TILES = -(-VOCAB // 64)


@dataclass(frozen=True)
class Terms:
    """Bytes by buffer.

    Attributes:
        op: of the formulas; empty for a kernel without one.
        streamed: what a launch reads once, whatever reads it: weights, caches, rows of logits.
        small: what several programs read again from a cache: bytes of it once, or of one row.
        written: each byte once.
    """

    op: str
    streamed: dict[str, int] = field(default_factory=dict)
    small: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


def _stream(width: int) -> dict[str, int]:
    """The residual stream for the next norm: as it is, times the weight, sums of squares."""
    return {"out": T * width * B, "scaled": T * width * B, "sumsq": SUMS}


def _project(op: str, width: int) -> Terms:
    return Terms(
        op, {"w": C * width * B}, {"x": T * width * B, "residual": T * C * B, "norm": C * B}, _stream(C)
    )


CACHED = (CONTEXT + T) * D * B * SHAPE.kv_heads
ATTENTION = Terms("attention", {"k": CACHED, "v": CACHED}, {"q": T * QUERIES * B}, {"out": T * QUERIES * B})
# What the head leaves: logits, and four numbers of each tile.
LEFT = {"out": 4 * T * SHAPE.vocab} | dict.fromkeys(
    ("peak", "total", "best", "token"), 4 * T * -(-SHAPE.vocab // 64)
)
# Decisions read those of the rows that they want, a row of tiles at a time, and leave numbers of each row.
HEADS = dict.fromkeys(("peak", "total", "best"), 4 * TILES)
OWN = {"own": 8 * R, "non_finite": 4 * R}
CUTS = OWN | {"normaliser": 4 * R, "cut": 4 * R}
FORMULAS: dict[str, Terms] = {
    "embed": Terms("embed", {"table": T * C * B}, {"tokens": 8 * T, "norm": C * B}, _stream(C)),
    "qkv": Terms(
        "qkv",
        {"w": (QUERIES + 2 * D * SHAPE.kv_heads) * C * B},
        {"x": T * C * B, "sumsq": SUMS, "rotary": T * D * B},
        {"q": T * QUERIES * B, "k": T * D * B, "v": T * D * B},
    ),
    "attention": ATTENTION,
    "attention, tree": ATTENTION,
    "out": _project("out", QUERIES),
    "gate_up": Terms(
        "gate_up", {"w": 2 * INNER * C * B}, {"x": T * C * B, "sumsq": SUMS}, {"out": T * INNER * B}
    ),
    "down": _project("down", INNER),
    "head": Terms("head", {"w": SHAPE.vocab * C * B}, {"x": T * C * B, "sumsq": SUMS}, LEFT),
    "compact": Terms(
        "compact",
        {"cache": SHAPE.layers * 2 * SHAPE.kv_heads * T * D * B},
        {},
        {"cache": SHAPE.layers * 2 * SHAPE.kv_heads * T * D * B},
    ),
    "match": Terms("match", {}, HEADS, OWN),
    "fuzzy": Terms("decide", {"rows": 2 * M * 4 * VOCAB}, HEADS, OWN | {"distance": 4 * M}),
    "fuzzy, topk_js": Terms("decide", {"rows": 2 * M * 4 * VOCAB}, HEADS, OWN | {"distance": 4 * M}),
    "rejection": Terms("reject", {"rows": 2 * 4 * VOCAB}),
    "filters": Terms("filtered", {"rows": R * 4 * VOCAB}, HEADS, CUTS),
    "filters, sums": Terms(
        "", {"rows": (R + M) * 4 * VOCAB}, HEADS, {n: 2 * k - k // R for n, k in CUTS.items()}
    ),
    "sample": Terms("sample", {}, HEADS),
    "begin": Terms(""),
    "readback": Terms("readback"),
}


def formula_of(name: str) -> Traffic | None:
    """The formula of a kernel at the size of the subjects; None where it has none of its own."""
    op = FORMULAS[name].op
    if not op:
        return None
    if op in DECISION_OPS:
        return traffic(op, replace(SHAPE, vocab=VOCAB), length=R)
    return traffic(op, SHAPE, length=T, context=CONTEXT, itemsize=B)
