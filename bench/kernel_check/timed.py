"""Launches to time and the torch calls that each replaces, over rotated weights or caches.

A workload holds as many sets of weights (or of cache rows) as take more than three times the L2, and gives one
call per set: what runs first in a round is cold again when its turn comes. Activations are one set, as in a
model, where the kernel before has just written them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from bench.kernel_check.problems.base import EPS, Case, Place, Source, choose, sums_of_squares, workspace
from bench.kernel_check.traffic import copies_for, matrix, traffic
from pyramid_rt.kernels.configs import ProjectionConfig
from pyramid_rt.kernels.forward import attention, compact, embed, gate_up, head, project, qkv
from pyramid_rt.kernels.forward.attention_configs import AttentionConfig, config_for
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference import forward as reference
from pyramid_rt.models.shapes import Shape

Call = Callable[[], object]
Config = ProjectionConfig | AttentionConfig | None


class Timeable(Protocol):
    """A launch, or several that belong together."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of the launch, of several the last."""
        ...

    def run(self) -> None:
        """Start it."""
        ...


class Workload(Protocol):
    """One op at one shape; see the module."""

    def launches(self, length: int) -> Sequence[Timeable]:
        """One launch per set."""
        ...

    def peers(self, length: int) -> dict[str, list[Call]]:
        """By name, forms of the torch sequence that the kernel replaces; one call per set each."""
        ...


def source_for(op: str, shape: Shape, dtype: str, place: Place) -> Source:
    """Fresh tensors of a workload."""
    return Source(place, Case(op, dtype, f"timed-{shape.name}", {}))


def _copies(op: str, shape: Shape, source: Source, l2_bytes: int, context: int) -> int:
    counted = traffic(op, shape, length=1, context=context, itemsize=source.dtype.itemsize)
    return copies_for(counted.stationary, l2_bytes)


class TimedEmbed:
    """Its rows are few: after the first replay they lie in the L2, and latency is what is measured."""

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        source = source_for("embed", shape, dtype, place)
        self.table = source.random(shape.vocab, shape.hidden)
        self.tokens = [source.integers(WINDOW, high=shape.vocab) for _ in range(64)]
        self.norm = source.random(shape.hidden)
        self.out, self.scaled = (source.new(WINDOW, shape.hidden) for _ in range(2))
        self.sums = source.new(-(-shape.hidden // 64), WINDOW, dtype=torch.float32)

    def launches(self, length: int) -> list[Launch]:
        """See `Workload`."""
        out, scaled = self.out, self.scaled
        return [
            embed.plan(self.table, tokens, self.norm, length, out, scaled, self.sums)
            for tokens in self.tokens
        ]

    def peers(self, length: int) -> dict[str, list[Call]]:
        """The gather alone."""
        return {
            "index_select": [
                lambda t=tokens[:length]: reference.embedding(self.table, t)  # type: ignore[misc]
                for tokens in self.tokens
            ]
        }


class _Matrix:
    """The inputs that products share: rows, norm, sets of weights."""

    def __init__(
        self,
        op: str,
        shape: Shape,
        dtype: str,
        place: Place,
        l2_bytes: int,
        config: Config,
    ) -> None:
        self.shape, self.source = shape, source_for(op, shape, dtype, place)
        rows, width = matrix(op, shape)
        self.x, self.norm = self.source.random(WINDOW, width), self.source.random(width)
        self.scaled, self.sums = self.x * self.norm, sums_of_squares(self.x)
        scale = width**-0.5
        count = _copies(op, shape, self.source, l2_bytes, 0)
        self.weights = [self.source.random(rows, width, scale=scale) for _ in range(count)]
        kind = "project" if op in ("out", "down") else op
        chosen = choose(kind, self.source, rows, width, {})  # type: ignore[arg-type]
        self.config = config if isinstance(config, ProjectionConfig) else chosen
        self.space = workspace(place, rows, self.config)

    def calls(self, function: Callable[[Tensor], object]) -> list[Call]:
        """One call per set of weights."""
        return [lambda w=weight: function(w) for weight in self.weights]  # type: ignore[misc]

    def normed(self, length: int) -> Tensor:
        """torch's own fused RMSNorm."""
        return functional.rms_norm(self.x[:length], self.norm.shape, self.norm, EPS)


class TimedQkv(_Matrix):
    """RMSNorm, joint projection, RoPE, K and V into the cache."""

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        super().__init__("qkv", shape, dtype, place, l2_bytes, config)
        rows, dim = context + WINDOW, shape.head_dim
        self.start = self.source.scalar(context)
        table = reference.rotary_table("default", rows, dim, theta=5e5, dtype=self.source.dtype)
        self.rotary = table.to(place.device)
        self.positions = torch.arange(WINDOW, device=place.device) + context
        self.q = self.source.new(WINDOW, shape.heads, dim)
        self.k, self.v = (self.source.random(shape.kv_heads, rows, dim) for _ in range(2))

    def launches(self, length: int) -> list[Launch]:
        """See `Workload`."""
        return [
            qkv.plan(
                self.scaled, self.sums, EPS, weight, None, self.rotary, self.start, length, self.q, self.k,
                self.v, self.space, self.config,
            )
            for weight in self.weights
        ]  # fmt: skip

    def peers(self, length: int) -> dict[str, list[Call]]:
        """Angles and positions are made beforehand, as once per pass."""
        shape, positions = self.shape, self.positions[:length]
        cos, sin = self.rotary.index_select(0, positions).chunk(2, 1)

        def sequence(weight: Tensor) -> object:
            joint = functional.linear(self.normed(length), weight).view(length, -1, shape.head_dim)
            qk, v = joint.split_with_sizes((shape.heads + shape.kv_heads, shape.kv_heads), 1)
            rotated = reference.apply_rope(qk, cos, sin)
            q, k = rotated.split_with_sizes((shape.heads, shape.kv_heads), 1)
            reference.write_cache(self.k, k, positions)
            reference.write_cache(self.v, v, positions)
            return q

        return {"rms_norm, linear, rope, index_copy": self.calls(sequence)}


class TimedAttention:
    """The cache rotates instead of weights."""

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        source = source_for("attention", shape, dtype, place)
        self.shape, self.context, self.device = shape, context, place.device
        count = _copies("attention", shape, source, l2_bytes, context)
        sizes = (shape.kv_heads, context + WINDOW, shape.head_dim)
        self.caches = [(source.random(*sizes), source.random(*sizes)) for _ in range(count)]
        self.q = source.random(WINDOW, shape.heads, shape.head_dim)
        self.out = source.new(WINDOW, shape.heads * shape.head_dim)
        self.start = source.scalar(context)
        chosen = config_for(source.dtype, shape.head_dim, place.capability)
        self.config = config if isinstance(config, AttentionConfig) else chosen
        self.space = attention.workspace(
            length=WINDOW,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            kv_bound=context + WINDOW,
            splits=self.config.splits,
            device=place.device,
        )

    def launches(self, length: int) -> list[Launch]:
        """See `Workload`."""
        return [
            attention.plan(
                self.q,
                k,
                v,
                self.start,
                self.out,
                self.space,
                length=length,
                kv_bound=self.context + length,
                config=self.config,
            )
            for k, v in self.caches
        ]

    def peers(self, length: int) -> dict[str, list[Call]]:
        """SDPA with a group's queries as rows of one head (and a mask), and with its own grouped heads."""
        shape, end, q = self.shape, self.context + length, self.q[:length]
        group = shape.heads // shape.kv_heads
        heads_first = q.transpose(0, 1).unsqueeze(0)
        mask: Tensor | None = None
        if length > 1:
            positions = torch.arange(length, device=self.device) + self.context
            mask = reference.causal_mask(positions, end, group, q.dtype)
        rows = q.view(length, shape.kv_heads, group, -1).transpose(0, 1)
        rows = rows.reshape(1, shape.kv_heads, length * group, shape.head_dim)

        def grouped(k: Tensor, v: Tensor) -> object:
            keys, values = k[:, :end].unsqueeze(0), v[:, :end].unsqueeze(0)
            return functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)

        def causal(k: Tensor, v: Tensor) -> object:
            keys, values = k[:, :end].unsqueeze(0), v[:, :end].unsqueeze(0)
            bias = None if length == 1 else causal_lower_right(length, end)
            return functional.scaled_dot_product_attention(
                heads_first, keys, values, attn_mask=bias, enable_gqa=True
            )

        forms: dict[str, Callable[[Tensor, Tensor], object]] = {
            "sdpa, groups as rows": grouped,
            "sdpa, enable_gqa": causal,
        }
        return {
            name: [lambda f=form, k=k, v=v: f(k, v) for k, v in self.caches]  # type: ignore[misc]
            for name, form in forms.items()
        }


class TimedProject(_Matrix):
    """The attention output, or down."""

    op = "out"

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        super().__init__(self.op, shape, dtype, place, l2_bytes, config)
        self.residual, self.out = (
            self.source.random(WINDOW, shape.hidden),
            self.source.new(WINDOW, shape.hidden),
        )
        self.next_norm, self.out_scaled = self.source.random(shape.hidden), torch.empty_like(self.out)
        self.out_sums = self.source.new(-(-shape.hidden // 64), WINDOW, dtype=torch.float32)

    def launches(self, length: int) -> list[Launch]:
        """See `Workload`."""
        return [
            project.plan(
                self.x, weight, None, self.residual, self.next_norm, length, self.out, self.out_scaled,
                self.out_sums, self.space, self.config,
            )
            for weight in self.weights
        ]  # fmt: skip

    def peers(self, length: int) -> dict[str, list[Call]]:
        """Two calls, and cuBLAS's own addition, which rounds once."""
        x, residual = self.x[:length], self.residual[:length]
        return {
            "linear, add": self.calls(lambda w: functional.linear(x, w).add_(residual)),
            "addmm": self.calls(lambda w: torch.addmm(residual, x, w.t())),
        }


class TimedDown(TimedProject):
    """See `TimedProject`."""

    op = "down"


class TimedGateUp(_Matrix):
    """RMSNorm, gate and up, SiLU product."""

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        super().__init__("gate_up", shape, dtype, place, l2_bytes, config)
        self.out = self.source.new(WINDOW, shape.intermediate)

    def launches(self, length: int) -> list[Launch]:
        """See `Workload`."""
        return [
            gate_up.plan(self.scaled, self.sums, EPS, weight, None, length, self.out, self.space, self.config)
            for weight in self.weights
        ]

    def peers(self, length: int) -> dict[str, list[Call]]:
        """Four calls."""
        return {
            "rms_norm, linear, silu, mul": self.calls(
                lambda w: reference.silu_mul(functional.linear(self.normed(length), w))
            )
        }


class TimedHead(_Matrix):
    """RMSNorm, logits, statistics of the tiles; without noise."""

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        super().__init__("head", shape, dtype, place, l2_bytes, config)
        self.logits = self.source.new(WINDOW, shape.vocab, dtype=torch.float32)
        self.rows = torch.arange(WINDOW, device=place.device)
        self.stats = head.TileStatistics.allocate(-(-shape.vocab // self.config.block_n), place.device)

    def launches(self, length: int) -> list[Launch]:
        """See `Workload`."""
        return [
            head.plan(
                self.scaled, self.sums, EPS, weight, self.rows[:length], self.shape.vocab, self.logits,
                self.stats, None, self.config,
            )
            for weight in self.weights
        ]  # fmt: skip

    def peers(self, length: int) -> dict[str, list[Call]]:
        """Logits alone: that torch then reads them again for a maximum and a sum is not held against it."""
        return {
            "rms_norm, linear, float": self.calls(lambda w: functional.linear(self.normed(length), w).float())
        }


class TimedCompact:
    """A whole tier's cache; T is the number of rows that move."""

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        source = source_for("compact", shape, dtype, place)
        size = (shape.layers, 2, shape.kv_heads, context + WINDOW, shape.head_dim)
        self.caches = [source.random(*size) for _ in range(2)]
        self.start, self.path = source.scalar(context), source.new(WINDOW, dtype=torch.int64)
        if place.device.type != "meta":
            # A permutation without fixed points.
            self.path.copy_((torch.arange(WINDOW) * 5 + 3) % WINDOW)
        self.counts = {n: source.scalar(n) for n in range(1, WINDOW + 1)}

    def launches(self, length: int) -> list[Launch]:
        """See `Workload`."""
        count = self.counts[length]
        return [compact.plan(cache, None, self.start, self.path, count) for cache in self.caches]

    def peers(self, length: int) -> dict[str, list[Call]]:
        """The reference: it moves the whole window."""
        count = self.counts[length]
        return {
            "index_select, index_copy": [
                lambda c=cache: reference.compact(c, self.start, self.path, count)  # type: ignore[misc]
                for cache in self.caches
            ]
        }


TIMED: dict[str, Callable[..., Any]] = {
    "embed": TimedEmbed,
    "qkv": TimedQkv,
    "attention": TimedAttention,
    "out": TimedProject,
    "gate_up": TimedGateUp,
    "down": TimedDown,
    "head": TimedHead,
    "compact": TimedCompact,
}
