"""Attention and tree compaction as problems, see `problems.base`."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bench.kernel_check.problems import oracle
from bench.kernel_check.problems.base import ROWS, Case, Place, Source, fill
from pyramid_rt.kernels.forward import attention, compact
from pyramid_rt.kernels.forward.attention_configs import Splits, config_for
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference import forward as reference


def unit(dtype: torch.dtype, *, truncates: bool) -> float:
    """Relative rounding of one conversion to dtype; the interpreter truncates to bfloat16."""
    exponent = {torch.float32: -24, torch.float16: -11, torch.bfloat16: -7 if truncates else -8}[dtype]
    return 2.0**exponent


def tree_ancestors(length: int, seed: int = 5) -> list[int]:
    """int64 of ancestor bits per row of a random tree, a row's own bit included, parents before children."""
    generator = torch.Generator().manual_seed(seed)
    bits = [1]
    for row in range(1, length):
        parent = int(torch.randint(0, row, (), generator=generator))
        bits.append(bits[parent] | 1 << row)
    return [b - (1 << 64) if b >> 63 else b for b in bits]


class Attention:
    """`kernels.attention`. Sizes: heads, kv_heads, head_dim, start; tree, config and size0 .. edge1 optional.

    The window's own rows of the cache are those of the same positions in the base, so that a row sees the same
    keys whichever window holds it. A tree's rows are tied to their slots: it is no rowwise problem.
    """

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        self.heads, self.kv_heads, self.dim = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
        self.base_start, self.rowwise = sizes["start"], not sizes.get("tree")
        self.cache_rows = sizes["start"] + ROWS + 64
        self.base_q = source.random(ROWS, self.heads, self.dim)
        self.base_k = source.random(self.kv_heads, self.cache_rows, self.dim)
        self.base_v = source.random(self.kv_heads, self.cache_rows, self.dim)
        self.q, self.at = source.new(WINDOW, self.heads, self.dim), source.scalar(self.base_start)
        self.k, self.v = self.base_k, self.base_v
        self.out = source.new(WINDOW, self.heads * self.dim)
        shipped = config_for(source.dtype, self.dim, place.capability)
        change: dict[str, Any] = {f.name: sizes[f.name] for f in fields(shipped) if f.name in sizes}
        if "size0" in sizes:
            cuts = (sizes["size0"], sizes["size1"], sizes["size2"])
            change["splits"] = Splits(cuts, (sizes["edge0"], sizes["edge1"]))
        self.config = replace(shipped, **change)
        self.space = attention.workspace(
            length=WINDOW,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            kv_bound=self.cache_rows,
            splits=self.config.splits,
            device=place.device,
        )
        self.ancestors: Tensor | None = None
        if sizes.get("tree"):
            self.ancestors = source.new(WINDOW, dtype=torch.int64)
            if place.device.type != "meta":
                self.ancestors.copy_(torch.tensor(tree_ancestors(WINDOW)))
        self.first, self.unit = 0, unit(source.dtype, truncates=place.device.type == "cpu")
        self.exact: Tensor | None = None
        self.size: Tensor | None = None

    def launches(self, length: int) -> list[Launch]:
        """One. Odd windows get a grid over the whole cache, which must change nothing."""
        end = self.base_start + self.first + length
        return [
            attention.plan(
                self.q,
                self.k,
                self.v,
                self.at,
                self.out,
                self.space,
                length=length,
                kv_bound=self.cache_rows if length % 2 else end,
                config=self.config,
                ancestors=self.ancestors,
            )
        ]

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Queries and their position; with `hide` the cache after the window is NaN."""
        self.first = first
        fill(self.q, self.base_q, first)
        self.at.fill_(self.base_start + first)
        self.k, self.v = self.base_k, self.base_v
        if hide:
            end = self.base_start + first + length
            self.q[length:] = math.nan
            self.k, self.v = self.base_k.clone(), self.base_v.clone()
            self.k[:, end:] = math.nan
            self.v[:, end:] = math.nan

    def poison(self) -> None:
        """Output and partial results."""
        for tensor in (self.out, self.space.acc, self.space.stats):
            tensor.fill_(math.nan)

    def start(self, length: int) -> None:
        """One launch."""
        self.launches(length)[0].run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """The heads' outputs."""
        return {"out": self.out[:length]}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Later rows."""
        return {"out": self.out[length:]}

    def counters(self) -> list[Tensor]:
        """Arrivals of splits and groups."""
        return [self.space.arrivals]

    def _float64(self) -> None:
        """Rows 0 .. 63 in float64, and the same sums over absolute values: the size that rounding scales with."""
        end, group = self.base_start + WINDOW, self.heads // self.kv_heads
        if self.ancestors is None:
            positions = torch.arange(WINDOW, device=self.q.device) + self.base_start
            mask = reference.causal_mask(positions, end, group, torch.float64)
        else:
            start = torch.tensor(self.base_start, device=self.q.device)
            mask = reference.tree_mask(start, self.ancestors, end, group, torch.float64, length=WINDOW)
        exact: list[Tensor] = []
        size: list[Tensor] = []
        # One key head at a time: a long context's scores take half a gigabyte.
        for head in range(self.kv_heads):
            q = self.base_q[:WINDOW, head * group : (head + 1) * group].double()
            k, v = (c[head : head + 1, :end].double() for c in (self.base_k, self.base_v))
            scores = (q.transpose(0, 1).reshape(-1, self.dim) @ k[0].t()).div_(math.sqrt(self.dim))
            # The mask has the group's heads of a row side by side, the scores head after head.
            scores += mask.view(WINDOW, group, end).transpose(0, 1).reshape(-1, end)
            weights = scores.softmax(-1)
            for values, parts in ((v[0], exact), (v[0].abs(), size)):
                parts.append((weights @ values).view(group, WINDOW, self.dim).transpose(0, 1))
        self.exact = torch.cat(exact, 1).reshape(WINDOW, -1)
        self.size = torch.cat(size, 1).reshape(WINDOW, -1)

    def verdicts(self, length: int) -> dict[str, float]:
        """Within the rounding of a float32 softmax and of weights and result in dtype, of a float64 run."""
        if self.exact is None or self.size is None:
            self._float64()
        assert self.exact is not None
        assert self.size is not None
        want, size = self.exact[:length], self.size[:length]
        weights = 0.0 if self.q.dtype == torch.float32 else self.unit
        bound = self.unit * want.abs() + (weights + 64 * oracle.UNIT32) * size
        return {"out": oracle.within(self.out[:length], want, bound)}


class Compact:
    """`kernels.compact` on a whole tier. Sizes: layers, kv_heads, rows, head_dim, start, count.

    The window's length plays no part: it is the accepted path that has one.
    """

    rowwise = False

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        shape = (sizes["layers"], 2, sizes["kv_heads"], sizes["rows"], sizes["head_dim"])
        self.base, self.base_tokens = source.random(*shape), source.integers(sizes["rows"] + 3, high=2**40)
        self.cache, self.tokens = torch.empty_like(self.base), torch.empty_like(self.base_tokens)
        self.at, self.count = source.scalar(sizes["start"]), source.scalar(sizes["count"])
        self.path = source.new(WINDOW, dtype=torch.int64)
        if place.device.type != "meta":
            order = torch.randperm(WINDOW, generator=torch.Generator().manual_seed(3))
            # Nobody may read entries past the count.
            order[sizes["count"] :] = 2**40
            self.path.copy_(order)

    def launches(self, length: int) -> list[Launch]:
        """With the tokens, and for another tier without."""
        return [
            compact.plan(self.cache, self.tokens, self.at, self.path, self.count),
            compact.plan(self.cache, None, self.at, self.path, self.count),
        ]

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """The rows before the move."""
        self.cache.copy_(self.base)
        self.tokens.copy_(self.base_tokens)

    def poison(self) -> None:
        """Nothing: the launch moves rows in place."""
        self.place(0, 0, hide=False)

    def start(self, length: int) -> None:
        """One launch."""
        self.launches(length)[0].run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """Cache and tokens."""
        return {"cache": self.cache, "tokens": self.tokens}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """The verdict compares every row."""
        return {}

    def counters(self) -> list[Tensor]:
        """None."""
        return []

    def verdicts(self, length: int) -> dict[str, float]:
        """Every bit of the cache and the tokens."""
        cache, tokens = self.base.clone(), self.base_tokens.clone().unsqueeze(1)
        path = torch.where(self.path < WINDOW, self.path, 0)
        reference.compact(cache, self.at, path, self.count)
        reference.compact(tokens, self.at, path, self.count)
        return {
            "cache": oracle.equal(self.cache, cache),
            "tokens": oracle.equal(self.tokens, tokens.squeeze(1)),
        }
