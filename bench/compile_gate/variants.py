"""The launches that the gate compiles: every op in every shipped configuration, at a model's shape.

Everything is planned on the meta device, by the ops' own `plan`: what is looked at is what a launch would run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bench.compile_gate.decision_variants import variants as decision_variants
from bench.compile_gate.gate import Needs
from bench.compile_gate.variant import MAX_SEQ, Variant
from pyramid_rt.models.shapes import SHAPES, Shape

if TYPE_CHECKING:
    import torch

    from pyramid_rt.kernels.configs import Op, ProjectionConfig
    from pyramid_rt.kernels.forward.product import Workspace

# One binary must serve them all.
LENGTHS = (1, 2, 7, 16, 64)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory: warmup looks at type and alignment only."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> torch.Tensor:
    import torch

    return _empty(*shape, dtype=torch.int64)


def _floats(*shape: int) -> torch.Tensor:
    import torch

    return _empty(*shape, dtype=torch.float32)


def _active(length: int) -> torch.Tensor | None:
    """The word that a launch is skipped by, at an address like those of `control`; none at the first length.

    What serves all lengths then serves launches with a word and without.
    """
    return None if length == LENGTHS[0] else _ints(2)[1]


def _projection(
    op: Op, rows: int, width: int, dtype: torch.dtype, arch: int
) -> tuple[ProjectionConfig, Workspace, Needs]:
    """Shipped configuration, workspace and gate of a product with a weight matrix [rows, width]."""
    import torch

    from pyramid_rt.kernels.configs import projection_config
    from pyramid_rt.kernels.forward.product import Workspace, counter_elements, partial_elements

    config = projection_config(op, arch, rows, width, dtype)
    space = Workspace.allocate(
        partial_elements(rows, config.block_n, config.splits),
        counter_elements(rows, config.block_n, config.splits),
        torch.device("meta"),
    )
    # float32 is there for exactness: its products run on the plain cores and are not meant to fill the pipe.
    fast = dtype != torch.float32
    needs = Needs(
        tensor_core=fast,
        arrival=config.splits > 1,
        streams=fast,
        normalises="" if op == "project" else "gather" if op == "head" else "window",
    )
    return config, space, needs


def _sums(width: int) -> torch.Tensor:
    return _floats(-(-width // 64), 64)


def embed_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """The window's tokens as a list, and as a part of the token buffer that the device knows."""
    from pyramid_rt.kernels.forward import embed

    table, norm = _empty(shape.vocab, shape.hidden, dtype=dtype), _empty(shape.hidden, dtype=dtype)
    out, scaled = (_empty(64, shape.hidden, dtype=dtype) for _ in range(2))
    for name, start in (("plain", None), ("placed", _ints())):
        launch = embed.plan(
            table, _ints(64), norm, length, out, scaled, _sums(shape.hidden), start, active=_active(length)
        )
        yield Variant(name, launch, Needs())


def qkv_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """Without a bias; with one at the first shape, where all shapes would show the same."""
    from pyramid_rt.kernels.forward import qkv

    rows, width, size = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.hidden, shape.head_dim
    config, space, needs = _projection("qkv", rows, width, dtype, arch)
    cache = _empty(shape.kv_heads, MAX_SEQ + 64, size, dtype=dtype)
    for name in ("plain", "bias") if shape == SHAPES[0] else ("plain",):
        launch = qkv.plan(
            _empty(64, width, dtype=dtype),
            _sums(width),
            1e-5,
            _empty(rows, width, dtype=dtype),
            _empty(rows, dtype=dtype) if name == "bias" else None,
            _empty(MAX_SEQ + 64, 2, size, dtype=dtype),
            _ints(),
            length,
            _empty(64, shape.heads, size, dtype=dtype),
            cache,
            cache,
            space,
            config,
            active=_active(length),
        )
        yield Variant(name, launch, needs)


def attention_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """Chain and tree mask."""
    import torch

    from pyramid_rt.kernels.forward import attention
    from pyramid_rt.kernels.forward.attention_configs import config_for

    config = config_for(dtype, shape.head_dim, arch)
    space = attention.workspace(
        length=64,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        kv_bound=MAX_SEQ,
        splits=config.splits,
        device=torch.device("meta"),
    )
    cache = _empty(shape.kv_heads, MAX_SEQ + 64, shape.head_dim, dtype=dtype)
    fast = dtype != torch.float32
    for name, ancestors in (("chain", None), ("tree", _ints(64))):
        launch = attention.plan(
            _empty(64, shape.heads, shape.head_dim, dtype=dtype),
            cache,
            cache,
            _ints(1),
            _empty(64, shape.heads * shape.head_dim, dtype=dtype),
            space,
            length=length,
            kv_bound=MAX_SEQ,
            config=config,
            ancestors=ancestors,
            active=_active(length),
        )
        yield Variant(name, launch, Needs(tensor_core=fast, arrival=True, streams=fast))


def project_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """The attention's output projection, and the MLP's down projection."""
    from pyramid_rt.kernels.forward import project

    stream, scaled = (_empty(64, shape.hidden, dtype=dtype) for _ in range(2))
    norm = _empty(shape.hidden, dtype=dtype)
    for name, width in (("out", shape.heads * shape.head_dim), ("down", shape.intermediate)):
        config, space, needs = _projection("project", shape.hidden, width, dtype, arch)
        x, weight = _empty(64, width, dtype=dtype), _empty(shape.hidden, width, dtype=dtype)
        launch = project.plan(
            x, weight, None, stream, norm, length, stream, scaled, _sums(shape.hidden), space, config,
            active=_active(length),
        )  # fmt: skip
        yield Variant(name, launch, needs)


def gate_up_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """The MLP's first half."""
    from pyramid_rt.kernels.forward import gate_up

    rows, width = 2 * shape.intermediate, shape.hidden
    config, space, needs = _projection("gate_up", rows, width, dtype, arch)
    x, weight = (_empty(*size, dtype=dtype) for size in ((64, width), (rows, width)))
    out = _empty(64, shape.intermediate, dtype=dtype)
    launch = gate_up.plan(
        x, _sums(width), 1e-5, weight, None, length, out, space, config, active=_active(length)
    )
    yield Variant("plain", launch, needs)


def head_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """Chosen rows without the own tokens' noise, and rows that decide consecutive positions with it."""
    import torch

    from pyramid_rt.kernels.forward import head
    from pyramid_rt.kernels.launch import tiles

    vocab, width = shape.vocab, shape.hidden
    config, _, needs = _projection("head", vocab, width, dtype, arch)
    x, weight = (_empty(*size, dtype=dtype) for size in ((64, width), (vocab, width)))
    statistics = head.TileStatistics.allocate(tiles(vocab, config.block_n), torch.device("meta"))
    place = head.Placement(_ints(), _ints(), _ints(), length)
    drawn = head.Noise(_ints(2), None, _floats())
    for name, rows, noise in (("plain", _ints(length), None), ("placed", place, drawn)):
        out = _floats(64, vocab)
        launch = head.plan(
            x, _sums(width), 1e-5, weight, rows, vocab, out, statistics, noise, config, active=_active(length)
        )  # fmt: skip
        yield Variant(name, launch, needs)


def compact_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """The tier that moves the token buffer, and the others."""
    from pyramid_rt.kernels.forward import compact

    cache = _empty(shape.layers, 2, shape.kv_heads, MAX_SEQ + 64, shape.head_dim, dtype=dtype)
    for name, tokens in (("tokens", _ints(MAX_SEQ + 64)), ("cache", None)):
        yield Variant(name, compact.plan(cache, tokens, _ints(1), _ints(64), _ints(1)), Needs())


# An op joins with one line: how to plan it for a model's shape, dtype, architecture and T. Those that take
# longest to compile come first, so that no worker is left with one at the end.
OPS: dict[str, Callable[[Shape, Any, int, int], Iterator[Variant]]] = {
    "head": head_variants,
    "decision": decision_variants,
    "attention": attention_variants,
    "qkv": qkv_variants,
    "gate_up": gate_up_variants,
    "project": project_variants,
    "embed": embed_variants,
    "compact": compact_variants,
}
