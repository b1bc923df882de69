"""One op with inputs, run on any window of its rows and held against float64: the projection kernels.

Every problem has `ROWS` neighbouring rows. A window (first, length) is rows first .. first + length - 1, so row
63 can stand at each place of windows of every length: the same object serves correctness, batch invariance and
races, on a GPU and in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.kernel_check.problems import oracle
from pyramid_rt.kernels.configs import ARCHITECTURES, Op, ProjectionConfig, projection_config
from pyramid_rt.kernels.forward import embed, gate_up, project, qkv
from pyramid_rt.kernels.forward.product import Workspace, counter_elements, partial_elements
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference import forward as reference

ROWS = 2 * WINDOW - 1
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """A case to run: pure data that travels between processes.

    Attributes:
        op: a name in `gpu_cases.PROBLEMS`.
        dtype: name of a torch dtype.
        name: tells cases of an op apart.
        sizes: what the problem's `make` takes.
    """

    op: str
    dtype: str
    name: str
    sizes: Mapping[str, int]

    @property
    def key(self) -> str:
        """Unique among the cases of a kind."""
        return f"{self.op}/{self.dtype}/{self.name}"


@dataclass(frozen=True, slots=True)
class Place:
    """The device of tensors, and the GPU that launches are configured for.

    Attributes:
        device: cuda; cpu under the interpreter; meta to compile without memory.
        capability: 10 * major + minor; 80 for the interpreter.
    """

    device: torch.device
    capability: int

    @property
    def arch(self) -> int:
        """The architecture whose configurations are used."""
        return max(arch for arch in ARCHITECTURES if arch <= self.capability)


class Source:
    """Fresh tensors of a case. On the meta device they are only described."""

    def __init__(self, place: Place, case: Case) -> None:
        self.place = place
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        seed = sum(31**i * ord(c) for i, c in enumerate(case.key)) % 2**31
        self.generator: torch.Generator | None = None
        if place.device.type != "meta":
            self.generator = torch.Generator(place.device).manual_seed(seed)

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of the case's dtype."""
        dtype = dtype or self.dtype
        if self.generator is None:
            return self.new(*shape, dtype=dtype)
        values = torch.randn(shape, generator=self.generator, device=self.place.device)
        return values.mul_(scale).to(dtype)

    def integers(self, *shape: int, high: int) -> Tensor:
        """int64 in 0 .. high - 1."""
        if self.generator is None:
            return self.new(*shape, dtype=torch.int64)
        return torch.randint(high, shape, generator=self.generator, device=self.place.device)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised; every run poisons what it writes to."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.place.device)

    def scalar(self, value: int) -> Tensor:
        """0-d int64."""
        if self.generator is None:
            return self.new(dtype=torch.int64)
        return torch.tensor(value, device=self.place.device)


class Problem(Protocol):
    """See the module. `rowwise` problems are held to batch invariance."""

    rowwise: bool

    def launches(self, length: int) -> list[Launch]:
        """The launches that `run` starts, for a compiler."""
        ...

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Make the inputs those of a window; with `hide`, NaN wherever the kernel must not read."""
        ...

    def poison(self) -> None:
        """NaN into all outputs and scratch."""
        ...

    def start(self, length: int) -> None:
        """Launch on the placed window."""
        ...

    def outputs(self, length: int) -> dict[str, Tensor]:
        """Results with the window's rows first: views, or copies where the layout differs."""
        ...

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Tensors that must still be NaN."""
        ...

    def counters(self) -> list[Tensor]:
        """Tensors that every launch must leave zero."""
        ...

    def verdicts(self, length: int) -> dict[str, float]:
        """Error over tolerance of each output of the window (0, length), see `gpu_oracle`."""
        ...


def workspace(place: Place, rows: int, config: ProjectionConfig) -> Workspace:
    """Of the size a product of `rows` weight rows needs."""
    return Workspace.allocate(
        partial_elements(rows, config.block_n, config.splits),
        counter_elements(rows, config.block_n, config.splits),
        place.device,
    )


def choose(op: Op, source: Source, rows: int, width: int, sizes: Mapping[str, int]) -> ProjectionConfig:
    """The shipped configuration, but for the fields that a case names."""
    config = projection_config(op, source.place.arch, rows, width, source.dtype)
    change: dict[str, Any] = {f.name: sizes[f.name] for f in fields(config) if f.name in sizes}
    return replace(config, **change)


def sums_of_squares(x: Tensor) -> Tensor:
    """[ceil(C / 64), rows] float32 of the rows of x [rows, C], per tile of 64 channels."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 64))
    return padded.square().view(x.shape[0], -1, 64).sum(-1).t().contiguous()


@dataclass
class Activations:
    """The residual stream under a norm: all rows, and the buffers of a window.

    Attributes:
        base: [ROWS, C]; base_sums [tiles, ROWS] float32. norm: [C], the norm's weight, or None without a norm.
        x: [64, C], times the norm's weight; sums [tiles, 64] float32: what a launch reads.
        order: [64] int64, which buffer row holds window row i; None for i itself.
    """

    base: Tensor
    base_sums: Tensor
    x: Tensor
    sums: Tensor
    norm: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def make(cls, source: Source, width: int, norm: bool = True) -> Activations:
        """Random rows, and a random weight of the norm that reads them."""
        base = source.random(ROWS, width)
        sums = sums_of_squares(base)
        x, window_sums = source.new(WINDOW, width), torch.empty_like(sums[:, :WINDOW]).contiguous()
        return cls(base, sums, x, window_sums, source.random(width) if norm else None)

    def place(self, first: int, length: int, hide: bool) -> None:
        """Fill the buffers as far as there are rows: no window goes past the last."""
        x, sums = self.base[first : first + WINDOW], self.base_sums[:, first : first + WINDOW]
        rows = x.shape[0]
        x = x if self.norm is None else x * self.norm
        if self.order is None:
            self.x[:rows].copy_(x)
            self.sums[:, :rows].copy_(sums)
        else:
            self.x.index_copy_(0, self.order[:rows], x)
            self.sums.index_copy_(1, self.order[:rows], sums)
        if hide and length < WINDOW:
            hidden = torch.arange(length, WINDOW, device=x.device)
            hidden = hidden if self.order is None else self.order[hidden]
            self.x.index_fill_(0, hidden, math.nan)
            self.sums.index_fill_(1, hidden, math.nan)

    def normed(self, kind: torch.dtype) -> Tensor:
        """The first 64 rows normalised in `kind`."""
        assert self.norm is not None
        return reference.rms_norm(self.base[:WINDOW].to(kind), self.norm.to(kind), EPS)


def fill(buffer: Tensor, base: Tensor, first: int) -> None:
    """Rows from `first` on into a window's buffer, as many as there are."""
    rows = base[first : first + WINDOW]
    buffer[: rows.shape[0]].copy_(rows)


def to_kind(tensor: Tensor | None, kind: torch.dtype) -> Tensor | None:
    """A tensor that may be missing, converted."""
    return None if tensor is None else tensor.to(kind)


@dataclass
class Judge:
    """Outputs of the first 64 rows in float64 and in the case's dtype, computed once."""

    exact: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)

    def near(self, outputs: Mapping[str, Tensor], length: int, width: int) -> dict[str, float]:
        """`oracle.near` of every output that was computed."""
        return {
            name: oracle.near(outputs[name], exact[:length], self.plain[name][:length], width)
            for name, exact in self.exact.items()
        }


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

    def _apply(self, kind: torch.dtype) -> dict[str, Tensor]:
        normed = self.acts.normed(kind)
        joint = reference.linear(normed, self.weight.to(kind), to_kind(self.bias, kind))
        return {"inner": reference.silu_mul(joint)}

    def verdicts(self, length: int) -> dict[str, float]:
        """Against float64."""
        if not self.judge.exact:
            self.judge = Judge(self._apply(torch.float64), self._apply(self.weight.dtype))
        return self.judge.near(self.outputs(length), length, self.weight.shape[1])
