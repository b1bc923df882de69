"""Floors: the bytes that ops must move by the formulas, and how fast this machine moves them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from pyramid_rt.models.shapes import Shape
from pyramid_rt.models.traffic import STEP_OPS, traffic
from pyramid_rt.profiling.spans import Span

# Bytes of the tensor that is copied: more than most caches hold, and quick even at 5 GB/s.
COPIED_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
COPIES = 7


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on a device: the fastest of several, run here and now."""
    size = COPIED_BYTES.get(device.type, COPIED_BYTES["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(COPIES):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        else:
            started = time.perf_counter()
            target.copy_(source)
            seconds = time.perf_counter() - started
        best = min(best, seconds)
    return 2 * size / best


def note_bytes(root: Span, shapes: Mapping[str, tuple[Shape, int]]) -> None:
    """Give every op of a model's pass its bytes by formula: `weights`, `cache` and `activations`, and their sum.

    Passes, layers, bursts, verifies and rounds get the sums of what is inside. A pass whose active flag was 0 is
    `skipped`, and moves nothing.

    Args:
        root: of the call.
        shapes: by the name of a tier, its sizes and the bytes of an element.
    """
    for span in root.walk():
        if span.kind == "forward":
            _note_pass(span, shapes.get(span.tier or ""))
    whole = max((shape for shape, _ in shapes.values()), key=lambda shape: shape.vocab, default=None)
    for span in root.walk():
        if span.kind in ("burst", "verify", "round"):
            _note_decisions(span, whole)
    _sum(root)


def _note_pass(span: Span, known: tuple[Shape, int] | None) -> None:
    skipped = span.args.pop("active", 1) == 0
    for op in span.walk():
        if skipped:
            op.args["skipped"] = True
        if op.kind != "op" or known is None or op.name not in STEP_OPS or skipped:
            continue
        shape, itemsize = known
        sizes = {**span.args, **op.args}
        length = op.args.get("rows", sizes["tokens"])
        moved = traffic(op.name, shape, length=length, context=sizes["context"], itemsize=itemsize)
        held = "cache" if op.name == "attention" else "weights"
        op.args |= {"weights": 0, "cache": 0, held: moved.stationary}
        op.args["activations"] = moved.total - moved.stationary
        op.args["bytes"] = moved.total


def _note_decisions(span: Span, shape: Shape | None) -> None:
    """Launches beside the passes: skipped where the pass before them was, else with the bytes of their formula.

    They go over the logits of one tier after the other, whose rows all have the vocabulary that is shared.
    """
    passed: Span | None = None
    for child in span.children:
        if child.kind == "forward":
            passed = child
        elif child.kind == "op":
            formula = child.args.get("formula")
            if passed is not None and passed.args.get("skipped"):
                child.args["skipped"] = True
            elif formula is not None and shape is not None:
                moved = traffic(formula, shape, length=child.args["rows"], itemsize=4)
                child.args["bytes"] = moved.total


def _sum(span: Span) -> int | None:
    """The bytes inside a span, noted on it; None where nothing is known of any op."""
    if span.kind == "op":
        known: int | None = span.args.get("bytes")
        return known
    found = [count for child in span.children if (count := _sum(child)) is not None]
    if found:
        span.args["bytes"] = sum(found)
    return sum(found) if found else None
