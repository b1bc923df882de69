"""Every configuration that ships for an architecture, on matrices as small as it can cut.

A configuration is known by what it compiles to. Small matrices have the cuts that a Llama's has: as many splits, each
of more than one step, and a last tile and a last step that are not full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from bench.kernel_check.cases import DTYPES, decided
from bench.kernel_check.problems.base import Case
from bench.kernel_check.traffic import matrix
from pyramid_rt.kernels.configs import Op, ProjectionConfig, projection_config
from pyramid_rt.kernels.decide.decision import RULES
from pyramid_rt.kernels.reference.sampling import DIVERGENCES
from pyramid_rt.models.shapes import SHAPES, Shape

# Beside the Llamas the embedded pyramid's two smaller widths and SmolLM2's, whose grids want more splits.
SMALL = (
    Shape("demo", layers=6, hidden=384, intermediate=1024, heads=6, kv_heads=6, head_dim=64, vocab=4096),
    Shape(
        "smollm2-135m",
        layers=30,
        hidden=576,
        intermediate=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=49152,
    ),
)
PRODUCTS: dict[str, Op] = {
    "qkv": "qkv",
    "out": "project",
    "gate_up": "gate_up",
    "down": "project",
    "head": "head",
}


def configurations(op: str, arch: int, dtype: str) -> list[ProjectionConfig]:
    """Those that the shapes get, each once, in the order of the shapes."""
    kind: torch.dtype = getattr(torch, dtype)
    sizes = [matrix(op, shape) for shape in (*SHAPES, *SMALL)]
    return list(dict.fromkeys(projection_config(PRODUCTS[op], arch, *size, kind) for size in sizes))


def product_cases(arch: int) -> Iterator[Case]:
    """A case per op, type and configuration: three steps per split but for a few terms, and not quite two tiles."""
    for dtype in DTYPES:
        for op in PRODUCTS:
            for config in configurations(op, arch, dtype):
                cut = asdict(config)
                width, rows = 3 * config.splits * config.block_k - 8, 2 * config.block_n - 8
                sizes = {
                    "qkv": {
                        "hidden": width,
                        "heads": 2,
                        "kv_heads": 1,
                        "head_dim": 64,
                        "start": 80,
                        "bias": 1,
                    },
                    "out": {"channels": rows, "width": width, "bias": 1},
                    "gate_up": {"inner": rows // 2, "width": width},
                    "down": {"channels": rows, "width": width},
                    "head": {"vocab": rows - 3, "padded": rows, "width": width, "noise": 7, "placed": 1},
                }[op]
                yield Case(
                    op, dtype, f"splits{config.splits}-k{config.block_k}-w{config.num_warps}", sizes | cut
                )


def attention_cases() -> Iterator[Case]:
    """Every head size and mask over a border of splits, and once over both levels of the fold."""
    for dtype in DTYPES:
        for dim in (64, 96, 128):
            for tree in (0, 1):
                sizes = {"heads": 6, "kv_heads": 2, "head_dim": dim, "start": 240, "tree": tree}
                yield Case("attention", dtype, f"d{dim}-tree{tree}", sizes)
    yield Case(
        "attention", "bfloat16", "two levels", {"heads": 1, "kv_heads": 1, "head_dim": 64, "start": 2300}
    )


def other_cases() -> Iterator[Case]:
    """Kernels whose configuration is the same everywhere."""
    for dtype in DTYPES:
        yield Case("embed", dtype, "placed", {"vocab": 37, "hidden": 136, "placed": 1})
        sizes = {"layers": 2, "kv_heads": 2, "rows": 131, "head_dim": 64, "start": 5, "count": 21}
        yield Case("compact", dtype, "some", sizes)


def decision_cases() -> Iterator[Case]:
    """Every rule, divergence and filter of the gate's variants, over two shares of a row."""
    vocab, names = 4160, {rule: RULES.index(rule) for rule in RULES}
    for rule in ("match", "fuzzy", "fuzzy_or_match"):
        yield decided("decide", vocab, rule=names[rule], heat=7)
    for kind in ("js_fsd", "kl", "kl_reversed", "tv", "topk_js"):
        yield decided("decide", vocab, rule=names["fuzzy"], heat=7, kind=DIVERGENCES.index(kind))
    for kind in ("js", "topk_js"):
        yield decided("decide", vocab, rule=names["fuzzy"], heat=7, kind=DIVERGENCES.index(kind), processed=1)
    yield decided("reject", vocab, rule=names["rejection"], heat=7, mode=3)
    yield decided("filters", vocab, rule=names["match"], heat=7, filters=1)
    yield decided("filters", vocab, rule=names["match"], heat=7, filters=4)
    yield decided("sample", vocab, heat=7)
    yield decided("sample", vocab, heat=7, filters=1)
    yield decided("sample", vocab, heat=7, first=1)
    yield decided("readback", vocab, tiers=3)


def cases(arch: int) -> list[Case]:
    """All of them."""
    return [*product_cases(arch), *attention_cases(), *other_cases(), *decision_cases()]
