"""The decision kernels for the ahead-of-time gate: the rounds of a pyramid of three at the Llamas' vocabulary.

They know neither the model's width nor its dtype, so one shape and one dtype stand for all; the lengths of a
round are part of a graph, so one stands for all windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.compile_gate.gate import Needs
from bench.compile_gate.variant import MAX_SEQ, Variant

if TYPE_CHECKING:
    from pyramid_rt.models.shapes import Shape

# The paper's lengths: 4 drafted at a time, 10 to 14 for the target.
DRAFTED, QUALIFIED = 4, 14
STANDS_FOR_ALL = ("llama-3.2-1b", "bfloat16")


def variants(shape: Shape, dtype: Any, arch: int, length: int) -> Iterator[Variant]:
    """Every kernel of a round, with filters and without, for each rule and form of divergence."""
    import torch

    from pyramid_rt.kernels.decide import decision, readback, sample
    from pyramid_rt.kernels.decide import filters as filter_kernels
    from pyramid_rt.kernels.decide.decode_state import COUNTERS, DecodeState

    if (shape.name, str(dtype).removeprefix("torch.")) != STANDS_FOR_ALL:
        return
    rows = QUALIFIED + DRAFTED + 2
    state = DecodeState.allocate(3, rows, MAX_SEQ + 64, shape.vocab, lists=True, device=torch.device("meta"))
    several = Needs(arrival=True)
    yield Variant("begin", sample.plan_begin(state), Needs())
    commit = QUALIFIED + DRAFTED + 1
    numbers = torch.empty(3 + (2 + COUNTERS) * 3 + commit, dtype=torch.int64, device="meta")
    reported = torch.empty((), dtype=torch.int64, device="meta")
    yield Variant("readback", readback.plan(state, reported, numbers, commit), Needs())
    for stored in (False, True):
        yield Variant(
            f"sample{'-stored' if stored else ''}",
            sample.plan(state, 0, first=False, stored=stored),
            Needs(),
        )
    yield Variant("first", sample.plan(state, 2, first=True, stored=False), Needs())
    draw = filter_kernels.plan(state, 0, 1, draw=True, filters=True, arch=arch)
    yield Variant("filters-draw", draw, several)
    for filters in (False, True):
        launch = filter_kernels.plan(
            state, 1, DRAFTED + 1, draw=False, filters=filters, below=not filters, arch=arch
        )
        yield Variant(f"filters-verify{'-filters' if filters else ''}", launch, several)
    for rule in decision.RULES:
        launch = decision.plan(state, 2, QUALIFIED + 1, rule, stored=rule == "rejection", arch=arch)
        yield Variant(rule, launch, several)
    for kind in ("js_fsd", "kl", "kl_reversed", "tv", "topk_js"):
        yield Variant(
            f"fuzzy-{kind}",
            decision.plan(state, 1, DRAFTED + 1, "fuzzy", kind=kind, arch=arch),
            several,
        )
    for kind in ("js", "topk_js"):
        launch = decision.plan(
            state, 1, DRAFTED + 1, "fuzzy", kind=kind, processed=True, stored=True, until=10, arch=arch
        )
        yield Variant(f"fuzzy-{kind}-processed", launch, several)
