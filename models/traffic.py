"""Bytes that each op of a pass must move, in formulas of a model's shape: the floor that times are held against.

Every input counts once and every output once, whoever reads it again from a cache; partial sums of split
products are left out, since the floor is what the op needs and not what a kernel chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyramid_rt.models.shapes import Shape

# The ops of one layer, in their order; embed comes before the layers and head after them.
LAYER_OPS = ("qkv", "attention", "out", "gate_up", "down")
STEP_OPS = ("embed", *LAYER_OPS, "head")
# Rows of a tile of the head, which leaves four numbers per row and tile.
HEAD_TILE = 64


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes read and written by one launch; `stationary` of the read ones are weights or cache rows."""

    read: int
    written: int
    stationary: int

    @property
    def total(self) -> int:
        """Read and written."""
        return self.read + self.written


def matrix(op: str, shape: Shape) -> tuple[int, int]:
    """Rows and columns of the weight matrix of qkv, out, gate_up, down or head."""
    queries = shape.heads * shape.head_dim
    return {
        "qkv": (queries + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        "out": (shape.hidden, queries),
        "gate_up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
        "head": (shape.vocab, shape.hidden),
    }[op]


def _sums(shape: Shape, length: int) -> int:
    return 4 * length * -(-shape.hidden // 64)


def _embed(shape: Shape, length: int, context: int, size: int) -> Traffic:
    rows = length * shape.hidden * size
    # Whoever leaves x leaves it times the weight of the norm behind it as well.
    return Traffic(rows + 8 * length + shape.hidden * size, 2 * rows + _sums(shape, length), rows)


def _qkv(shape: Shape, length: int, context: int, size: int) -> Traffic:
    rows, width = matrix("qkv", shape)
    weights = rows * width * size
    small = length * (width + shape.head_dim) * size + _sums(shape, length)
    return Traffic(weights + small, length * rows * size, weights)


def _attention(shape: Shape, length: int, context: int, size: int) -> Traffic:
    cache = 2 * shape.kv_heads * (context + length) * shape.head_dim * size
    queries = length * shape.heads * shape.head_dim * size
    return Traffic(cache + queries, queries, cache)


def _project(op: str) -> Callable[[Shape, int, int, int], Traffic]:
    def count(shape: Shape, length: int, context: int, size: int) -> Traffic:
        rows, width = matrix(op, shape)
        weights = rows * width * size
        read = weights + (length * (width + rows) + rows) * size
        return Traffic(read, 2 * length * rows * size + _sums(shape, length), weights)

    return count


def _gate_up(shape: Shape, length: int, context: int, size: int) -> Traffic:
    rows, width = matrix("gate_up", shape)
    weights = rows * width * size
    read = weights + length * width * size + _sums(shape, length)
    return Traffic(read, length * shape.intermediate * size, weights)


def _head(shape: Shape, length: int, context: int, size: int) -> Traffic:
    rows, width = matrix("head", shape)
    weights = rows * width * size
    read = weights + length * width * size + _sums(shape, length)
    return Traffic(read, 4 * length * rows + 16 * length * -(-rows // HEAD_TILE), weights)


def _compact(shape: Shape, length: int, context: int, size: int) -> Traffic:
    moved = shape.layers * 2 * shape.kv_heads * length * shape.head_dim * size
    return Traffic(moved, moved, moved)


_COUNTS: dict[str, Callable[[Shape, int, int, int], Traffic]] = {
    "embed": _embed,
    "qkv": _qkv,
    "attention": _attention,
    "out": _project("out"),
    "gate_up": _gate_up,
    "down": _project("down"),
    "head": _head,
    "compact": _compact,
}


# Words of a control block of two tiers, and of what a verify counts.
_WORDS, _COUNTED = 10, 14


def _decision(op: str) -> Callable[[Shape, int, int, int], Traffic]:
    """Of T positions and T - 1 proposed tokens; all logits are float32 and all counts int64."""

    def count(shape: Shape, length: int, context: int, size: int) -> Traffic:
        rows = max(2, length)
        tiles = -(-shape.vocab // HEAD_TILE)
        both = 2 * rows - 1
        # Winners of the tiles and their tokens, peaks and sums.
        own, sums = 4 * tiles + 4, 8 * tiles
        state = 8 * (_WORDS + _COUNTED + 2)
        if op in ("sample", "readback"):
            read = own + sums if op == "sample" else 8 * 20
            written = state if op == "sample" else 8 * 20 + state
            return Traffic(read + state, written, read)
        stationary = {
            "match": rows * (own + sums),
            # The row after a proposal is compared with none.
            "decide": (both - 1) * 4 * shape.vocab + both * sums + rows * own,
            "filtered": rows * (4 * shape.vocab + own + sums),
            # The row that falls is scanned once more, with the one below it.
            "reject": (both + 2) * 4 * shape.vocab + both * (own + sums),
        }[op]
        # Own token and flaw of each row; with processed distributions its normaliser and cut too.
        results = {"match": 12 * rows, "decide": 16 * rows, "filtered": 20 * rows, "reject": 20 * both}[op]
        return Traffic(stationary + 8 * rows + state, results + state, stationary)

    return count


DECISION_OPS = ("decide", "match", "filtered", "reject", "sample", "readback")
_COUNTS |= {op: _decision(op) for op in DECISION_OPS}


def traffic(op: str, shape: Shape, *, length: int, context: int = 0, itemsize: int = 2) -> Traffic:
    """The bytes that one launch must read and write.

    Args:
        op: one of `STEP_OPS`, or compact for a whole tier of which `length` rows move, or one of `DECISION_OPS`.
        length: T.
        context: cache rows before the window; attention reads context + T of them.
        itemsize: bytes of an element of weights, cache and activations.
    """
    return _COUNTS[op](shape, length, context, itemsize)


def step_traffic(shape: Shape, *, length: int, context: int, itemsize: int = 2) -> int:
    """Bytes of a whole forward step with logits of every row."""
    total = 0
    for op in STEP_OPS:
        times = shape.layers if op in LAYER_OPS else 1
        total += times * traffic(op, shape, length=length, context=context, itemsize=itemsize).total
    return total
