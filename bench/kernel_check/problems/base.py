"""A problem: one op with inputs, run on any window of its rows and held against float64.

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
        op: a name in `cases.PROBLEMS`.
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
    """Outputs of the first 64 rows in float64 and in the case's dtype, computed once; `sizes` as of `oracle.near`."""

    exact: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Tensor] = field(default_factory=dict)

    def near(self, outputs: Mapping[str, Tensor], length: int, width: int) -> dict[str, float]:
        """`oracle.near` of every output that was computed."""
        return {
            name: oracle.near(
                outputs[name],
                exact[:length],
                self.plain[name][:length],
                width,
                self.sizes[name][:length] if name in self.sizes else None,
            )
            for name, exact in self.exact.items()
        }
