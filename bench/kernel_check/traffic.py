"""Tables of the bytes that kernels must move, and what follows from them for timings.

The formulas themselves are the runtime's own, `pyramid_rt.models.traffic`, where profiles take them from too.
"""

from __future__ import annotations

from pyramid_rt.models.shapes import SHAPES, Shape
from pyramid_rt.models.traffic import (
    DECISION_OPS,
    LAYER_OPS,
    STEP_OPS,
    Traffic,
    matrix,
    step_traffic,
    traffic,
)

__all__ = [
    "DECISION_OPS",
    "LAYER_OPS",
    "STEP_OPS",
    "Traffic",
    "copies_for",
    "decision_markdown",
    "launches_for",
    "markdown",
    "matrix",
    "shape_named",
    "step_traffic",
    "traffic",
]


def shape_named(name: str) -> Shape:
    """One of the three Llamas.

    Raises:
        ValueError: there is none of that name.
    """
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise ValueError(f"shape is {name!r}, expected one of {', '.join(s.name for s in SHAPES)}")


def copies_for(stationary: int, l2_bytes: int) -> int:
    """The number of sets of weights to rotate, so that one comes around after more than three times the L2."""
    return max(2, 3 * l2_bytes // max(stationary, 1) + 1)


def launches_for(total: int, copies: int) -> int:
    """Launches of one graph: about a millisecond of traffic or more, at most 256, every copy as often."""
    wanted = min(256, max(1, 4_000_000_000 // max(total, 16_000_000)))
    return copies * max(1, -(-wanted // copies))


def decision_markdown(lengths: tuple[int, ...] = (8, 41)) -> str:
    """The table of docs/kernels.md for decisions over the Llamas' vocabulary: KB read and written."""
    lines = [
        "| op | " + " | ".join(f"{n} positions" for n in lengths) + " |",
        "|---" * (1 + len(lengths)) + "|",
    ]
    for op in DECISION_OPS:
        found = [traffic(op, SHAPES[0], length=length) for length in lengths]
        cells = [f"{each.read / 1e3:.1f} + {each.written / 1e3:.1f}" for each in found]
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(lengths: tuple[int, ...] = (1, 16, 64), context: int = 1024) -> str:
    """The table of docs/kernels.md: MB read and written per launch, bfloat16."""
    head = "| op | " + " | ".join(f"{s.name} T={n}" for s in SHAPES for n in lengths) + " |"
    lines = [head, "|---" * (1 + len(SHAPES) * len(lengths)) + "|"]
    for op in STEP_OPS:
        cells = []
        for shape in SHAPES:
            for length in lengths:
                found = traffic(op, shape, length=length, context=context)
                cells.append(f"{found.read / 1e6:.2f} + {found.written / 1e6:.2f}")
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    steps = [
        f"{step_traffic(shape, length=length, context=context) / 1e6:.0f}"
        for shape in SHAPES
        for length in lengths
    ]
    lines.append("| whole step | " + " | ".join(steps) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
    print()
    print(decision_markdown())
