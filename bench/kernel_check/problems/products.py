"""The embedding and the projection kernels as problems."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.kernel_check.problems import oracle
from bench.kernel_check.problems.base import (
    EPS,
    ROWS,
    Activations,
    Case,
    Judge,
    Place,
    Source,
    choose,
    fill,
    sums_of_squares,
    to_kind,
    workspace,
)
from pyramid_rt.kernels.forward import embed, gate_up, project, qkv
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference import forward as reference


class Embed:
    """`kernels.embed`. Sizes: vocab, hidden; placed (the window's place read on the device) optional."""

    rowwise = True

    def __init__(self, case: Case, place: Place) -> None:
        source = Source(place, case)
        vocab, hidden = case.sizes["vocab"], case.sizes["hidden"]
        self.table = source.random(vocab, hidden)
        self.base = source.integers(ROWS, high=vocab)
        # Placed, the window stands in a longer buffer behind this many other tokens.
        self.before = 37 if case.sizes.get("placed") else 0
        self.at = source.scalar(self.before) if self.before else None
        self.tokens = source.new(self.before + ROWS if self.before else WINDOW, dtype=torch.int64)
        self.norm = source.random(hidden)
        self.out, self.scaled = (source.new(WINDOW, hidden) for _ in range(2))
        self.sums = source.new(-(-hidden // 64), WINDOW, dtype=torch.float32)

    def launches(self, length: int) -> list[Launch]:
        """One."""
        out, scaled = self.out, self.scaled
        return [embed.plan(self.table, self.tokens, self.norm, length, out, scaled, self.sums, self.at)]

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Tokens; past the window they are out of the vocabulary."""
        if self.at is None:
            fill(self.tokens, self.base, first)
        else:
            self.tokens[self.before :] = self.base
            self.at.fill_(self.before + first)
        if hide:
            begin = self.before + first if self.before else 0
            self.tokens[:begin] = 2**40
            self.tokens[begin + length :] = 2**40

    def poison(self) -> None:
        """All outputs."""
        for tensor in (self.out, self.scaled, self.sums):
            tensor.fill_(math.nan)

    def start(self, length: int) -> None:
        """One launch."""
        self.launches(length)[0].run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """x, times the norm's weight, and its sums of squares."""
        return {"x": self.out[:length], "scaled": self.scaled[:length], "sums": self.sums[:, :length].t()}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Later rows."""
        return {"x": self.out[length:], "scaled": self.scaled[length:], "sums": self.sums[:, length:]}

    def counters(self) -> list[Tensor]:
        """None."""
        return []

    def verdicts(self, length: int) -> dict[str, float]:
        """The gather and its product with the norm's weight exactly; sums of 64 squares."""
        x = self.table[self.base[:length]]
        sums = sums_of_squares(x.double().float()).t()
        return {
            "x": oracle.equal(self.out[:length], x),
            "scaled": oracle.equal(self.scaled[:length], x * self.norm),
            "sums": oracle.relative(self.sums[:, :length].t(), sums, 1e-5),
        }


class Qkv:
    """`kernels.qkv`. Sizes: hidden, heads, kv_heads, head_dim, start; bias, interleaved and config optional."""

    rowwise = True

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        self.heads, self.kv_heads, self.dim = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
        self.base_start, width = sizes["start"], sizes["hidden"]
        rows, cache_rows = (self.heads + 2 * self.kv_heads) * self.dim, sizes["start"] + ROWS + 3
        self.acts = Activations.make(source, width)
        self.weight = source.random(rows, width, scale=width**-0.5)
        self.bias = source.random(rows) if sizes.get("bias") else None
        table = reference.rotary_table("default", cache_rows, self.dim, theta=5e5, dtype=source.dtype)
        self.rotary = table.to(place.device)
        self.at = source.scalar(self.base_start)
        self.first = 0
        self.q = source.new(WINDOW, self.heads, self.dim)
        if sizes.get("interleaved"):
            # K and V as views of one buffer: their strides are not those of a tensor of their own.
            self.k, self.v = source.new(self.kv_heads, cache_rows, 2, self.dim).unbind(2)
        else:
            self.k = source.new(self.kv_heads, cache_rows, self.dim)
            self.v = source.new(self.kv_heads, cache_rows, self.dim)
        self.config = choose("qkv", source, rows, width, sizes)
        self.space = workspace(place, rows, self.config)
        self.judge = Judge()

    def launches(self, length: int) -> list[Launch]:
        """One."""
        acts = self.acts
        return [
            qkv.plan(
                acts.x, acts.sums, EPS, self.weight, self.bias, self.rotary, self.at, length,
                self.q, self.k, self.v, self.space, self.config,
            )
        ]  # fmt: skip

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Rows and their position."""
        self.first = first
        self.acts.place(first, length, hide)
        self.at.fill_(self.base_start + first)

    def poison(self) -> None:
        """q, the whole cache, partial sums."""
        for tensor in (self.q, self.k, self.v, self.space.partials):
            tensor.fill_(math.nan)

    def start(self, length: int) -> None:
        """One launch."""
        self.launches(length)[0].run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """q, k and v, [T, heads, D]."""
        begin = self.base_start + self.first
        k, v = (cache[:, begin : begin + length].transpose(0, 1) for cache in (self.k, self.v))
        return {"q": self.q[:length], "k": k, "v": v}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Later rows of q and all other rows of the cache."""
        begin = self.base_start + self.first
        parts = {"q": self.q[length:]}
        for name, cache in (("k", self.k), ("v", self.v)):
            parts[f"{name} before"] = cache[:, :begin]
            parts[f"{name} after"] = cache[:, begin + length :]
        return parts

    def counters(self) -> list[Tensor]:
        """Arrivals of split tiles."""
        return [self.space.counters]

    def _apply(self, kind: torch.dtype) -> dict[str, Tensor]:
        normed = self.acts.normed(kind)
        joint = reference.linear(normed, self.weight.to(kind), to_kind(self.bias, kind))
        qk, v = joint.view(WINDOW, -1, self.dim).split((self.heads + self.kv_heads, self.kv_heads), 1)
        begin = self.base_start
        cos, sin = self.rotary[begin : begin + WINDOW].to(kind).split(1, 1)
        q, k = reference.apply_rope(qk, cos, sin).split((self.heads, self.kv_heads), 1)
        return {"q": q, "k": k, "v": v}

    def verdicts(self, length: int) -> dict[str, float]:
        """Against float64."""
        if not self.judge.exact:
            self.judge = Judge(self._apply(torch.float64), self._apply(self.weight.dtype))
        return self.judge.near(self.outputs(length), length, self.weight.shape[1])


class Project:
    """`kernels.project`, of the attention output and of down. Sizes: channels, width; bias, config optional."""

    rowwise = True

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        channels, width = sizes["channels"], sizes["width"]
        self.acts = Activations.make(source, width, norm=False)
        self.base, self.residual = source.random(ROWS, channels), source.new(WINDOW, channels)
        self.weight = source.random(channels, width, scale=width**-0.5)
        self.bias = source.random(channels) if sizes.get("bias") else None
        self.norm = source.random(channels)
        self.out, self.scaled = (source.new(WINDOW, channels) for _ in range(2))
        self.sums = source.new(-(-channels // 64), WINDOW, dtype=torch.float32)
        self.config = choose("project", source, channels, width, sizes)
        self.space = workspace(place, channels, self.config)
        self.judge = Judge()

    def launches(self, length: int) -> list[Launch]:
        """One."""
        return [
            project.plan(
                self.acts.x, self.weight, self.bias, self.residual, self.norm, length, self.out, self.scaled,
                self.sums, self.space, self.config,
            )
        ]  # fmt: skip

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Rows and residual."""
        self.acts.place(first, length, hide)
        fill(self.residual, self.base, first)
        if hide:
            self.residual[length:] = math.nan

    def poison(self) -> None:
        """Outputs and partial sums."""
        for tensor in (self.out, self.scaled, self.sums, self.space.partials):
            tensor.fill_(math.nan)

    def start(self, length: int) -> None:
        """One launch."""
        self.launches(length)[0].run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """The residual stream, times the next norm's weight, and its sums of squares."""
        return {"x": self.out[:length], "scaled": self.scaled[:length], "sums": self.sums[:, :length].t()}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Later rows."""
        return {"x": self.out[length:], "scaled": self.scaled[length:], "sums": self.sums[:, length:]}

    def counters(self) -> list[Tensor]:
        """Arrivals of split tiles."""
        return [self.space.counters]

    def _apply(self, kind: torch.dtype) -> dict[str, Tensor]:
        x = self.acts.base[:WINDOW].to(kind)
        y = reference.linear(x, self.weight.to(kind), to_kind(self.bias, kind))
        return {"x": y + self.base[:WINDOW].to(kind)}

    def verdicts(self, length: int) -> dict[str, float]:
        """Against float64; the sums against those of the rounded result."""
        if not self.judge.exact:
            self.judge = Judge(self._apply(torch.float64), self._apply(self.weight.dtype))
        found = self.judge.near(self.outputs(length), length, self.weight.shape[1])
        sums = sums_of_squares(self.out[:length]).t()
        return found | {
            "scaled": oracle.equal(self.scaled[:length], self.out[:length] * self.norm),
            "sums": oracle.relative(self.sums[:, :length].t(), sums, 1e-5),
        }


class GateUp:
    """`kernels.gate_up`. Sizes: inner, width; bias, config optional."""

    rowwise = True

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        inner, width = sizes["inner"], sizes["width"]
        self.acts = Activations.make(source, width)
        self.weight = source.random(2 * inner, width, scale=width**-0.5)
        self.bias = source.random(2 * inner) if sizes.get("bias") else None
        self.out = source.new(WINDOW, inner)
        self.config = choose("gate_up", source, 2 * inner, width, sizes)
        self.space = workspace(place, 2 * inner, self.config)
        self.judge = Judge()

    def launches(self, length: int) -> list[Launch]:
        """One."""
        acts = self.acts
        return [
            gate_up.plan(
                acts.x, acts.sums, EPS, self.weight, self.bias, length, self.out, self.space,
                self.config,
            )
        ]  # fmt: skip

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Rows."""
        self.acts.place(first, length, hide)

    def poison(self) -> None:
        """Output and partial sums."""
        self.out.fill_(math.nan)
        self.space.partials.fill_(math.nan)

    def start(self, length: int) -> None:
        """One launch."""
        self.launches(length)[0].run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """The MLP's inner activations."""
        return {"inner": self.out[:length]}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Later rows."""
        return {"inner": self.out[length:]}

    def counters(self) -> list[Tensor]:
        """Arrivals of split tiles."""
        return [self.space.counters]

    def _joint(self, kind: torch.dtype) -> Tensor:
        normed = self.acts.normed(kind)
        return reference.linear(normed, self.weight.to(kind), to_kind(self.bias, kind))

    def _apply(self, kind: torch.dtype) -> dict[str, Tensor]:
        return {"inner": reference.silu_mul(self._joint(kind))}

    def _sizes(self) -> dict[str, Tensor]:
        """An error of the gate goes through silu, whose slope is 1.1 at most, times up; one of up times the gate.

        The product of two normal numbers has long tails: what an element may be off follows from its own factors.
        """
        joint = self._joint(torch.float64)
        gate, up = joint.chunk(2, -1)
        spread = ((1.1 * up).square() + torch.nn.functional.silu(gate).square()).sqrt()
        return {"inner": spread * joint.square().mean().sqrt()}

    def verdicts(self, length: int) -> dict[str, float]:
        """Against float64."""
        if not self.judge.exact:
            exact, plain = self._apply(torch.float64), self._apply(self.weight.dtype)
            self.judge = Judge(exact, plain, self._sizes())
        return self.judge.near(self.outputs(length), length, self.weight.shape[1])
