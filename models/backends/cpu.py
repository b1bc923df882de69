"""The `torch` backend on a CPU: a row of a window has the same bits at every width and place of the window.

Everything that adds up does so by oneDNN's products, each of which is a sum in one order however many rows there are,
or in float32's attention by BLAS's, whose rows come in fours and whose long sums are taken in blocks of fixed places;
softmax and norms are torch's, row by row. So a token verified among others has the bits of one decoded alone, and a
prompt may be processed in any pieces. `row_check` tries whether that holds on a machine.

What it takes: two rows at least, for one row alone is multiplied in another order (a window of one token is carried
as two equal rows); cache rows looked at in steps of `KEYS`, because oneDNN compiles a product for each shape; and no
thread border inside a row of silu, whose last elements torch computes by other instructions than its first.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from pyramid_rt.kernels.reference import forward as reference
from pyramid_rt.models.backends.torch import TorchBackend, Window, cached
from pyramid_rt.models.matrix import Matrix, can_pack, onednn_product
from pyramid_rt.models.trees import Tree

# The number of cache rows that a pass looks at is a multiple of this, or all of them. A product's first call with a
# new shape takes a millisecond.
KEYS = 256

# Window rows of one attention product: at most so many, and fewer over long contexts, so that the scores stay small.
TILE = 32
TILE_KEYS = 2**17

# Elements of an op that torch computes on one thread, whatever the number of threads.
ONE_THREAD_ELEMENTS = 2**15 - 1

# Query rows, and cache rows, up to which one batched product of bfloat16 gives scores sooner than one for each head.
BATCHED_ROWS = 32
BATCHED_KEYS = 4 * KEYS

# BLAS adds up fewer rows than four in another order than more.
BLAS_ROWS = 4


def keeps_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """True where `CpuBackend` runs: matrices can be packed, on a processor of the kind it was tried on."""
    return can_pack(device, dtype) and platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True, slots=True)
class CpuWindow(Window):
    """A window whose mask is one for all heads: [T, 1, bound] float32; cos and sin are those of its T rows.

    Attributes:
        count: T. The residual stream has max(T, 2) rows, of which the second repeats the first where T is 1.
        rows_mask: `row_mask` of the mask, for float32 and windows of one tile; None for others.
    """

    count: int
    rows_mask: Tensor | None


def _floats(count: int) -> Tensor:
    """Whatever the application's default type and device are."""
    return torch.empty(count, dtype=torch.float32, device="cpu")


class Scratch:
    """Memory that is kept from call to call: what is taken anew for every layer, the system clears page by page."""

    def __init__(self) -> None:
        self._buffers = [_floats(0), _floats(0)]

    def take(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Float32 of this shape, holding anything, valid until the next call with this index (0 or 1)."""
        count = prod(shape)
        if self._buffers[index].shape[0] < count:
            with torch.inference_mode(False):
                self._buffers[index] = _floats(count)
        return self._buffers[index][:count].view(shape)


@dataclass(frozen=True, slots=True)
class CpuBackend(TorchBackend):
    """oneDNN's products and torch's ops on rows; float32 or bfloat16. One pass at a time."""

    scratch: Scratch = field(default_factory=Scratch, compare=False)

    def window(
        self,
        rotary: Tensor,
        start: Tensor,
        length: int,
        kv_bound: int,
        group: int,
        tree: Tree | None = None,
    ) -> CpuWindow:
        """See `Backend`. Cache rows up to the next multiple of `KEYS` are looked at, and must be finite."""
        bound = min(-(-kv_bound // KEYS) * KEYS, rotary.shape[0])
        slots = torch.arange(length, dtype=torch.int64, device=start.device).add_(start)
        if tree is None:
            positions, ancestors = slots, None
            mask = reference.causal_mask(slots, bound, 1, torch.float32)
        else:
            positions, ancestors = tree.depths + start, tree.ancestors
            mask = reference.tree_mask(start, ancestors, bound, 1, torch.float32, length=length)
        cos, sin = rotary.index_select(0, positions).chunk(2, 1)
        mask = mask.unsqueeze(1)
        whole = rotary.dtype == torch.float32 and length <= tile_rows(bound)
        rows_mask = row_mask(mask, group) if whole else None
        return CpuWindow(slots, positions, ancestors, cos, sin, mask, length, rows_mask)

    def embed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: Window) -> Tensor:
        """See `Backend`; the result has two rows at least."""
        return reference.embedding(table, _two_at_least(tokens))

    def qkv(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        bias: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        window: Window,
    ) -> Tensor:
        """See `Backend`."""
        assert isinstance(window, CpuWindow)
        joint = weight.multiply(rms_norm(x, norm, eps), bias)
        return cached(joint[:1] if window.count == 1 else joint, k_cache, v_cache, window)

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Window) -> Tensor:
        """See `Backend`; the result has two rows at least."""
        assert isinstance(window, CpuWindow)
        rows, most = q.shape[0], tile_rows(window.mask.shape[-1])
        if rows <= most:
            attended = attend(q, k_cache, v_cache, window.mask, self.scratch, window.rows_mask)
            return attended.expand(2, -1).contiguous() if rows == 1 else attended
        tiles = zip(q.split(most), window.mask.split(most), strict=True)
        return torch.cat([attend(part, k_cache, v_cache, mask, self.scratch) for part, mask in tiles])

    def gate_up(
        self, x: Tensor, norm: Tensor, eps: float, weight: Matrix, bias: Tensor | None, window: Window
    ) -> Tensor:
        """See `Backend`."""
        return silu_mul(weight.multiply(rms_norm(x, norm, eps), bias))

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        """See `Backend`."""
        normed = rms_norm(x.index_select(0, _two_at_least(rows)), norm, eps)
        return weight.multiply(normed)[: rows.shape[0]].float()


def _two_at_least(index: Tensor) -> Tensor:
    """[n] -> [max(n, 2)]: a single one twice."""
    return index.expand(2) if index.shape[0] == 1 else index


def tile_rows(bound: int) -> int:
    """Window rows of one attention product over so many cache rows."""
    return max(min(TILE, TILE_KEYS // bound), 1)


def row_mask(mask: Tensor, group: int) -> Tensor:
    """[T, 1, bound] -> [R, bound]: a row for each of the G query heads of a token, R = T G and up to 3 of zeros."""
    length, _, bound = mask.shape
    rows = mask.expand(length, group, bound).reshape(length * group, bound)
    return functional.pad(rows, (0, 0, 0, -rows.shape[0] % BLAS_ROWS))


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    scratch: Scratch,
    rows_mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v over the first rows of a cache, query heads sharing K and V.

    The G query heads of one key head become rows of one product. Scores are rounded to dtype, as transformers' eager
    attention does; softmax is float32. A masked row must hold finite numbers.

    Args:
        q: [T, H, D] dtype.
        k_cache, v_cache: [KV, S, D] dtype.
        mask: [T, 1, bound] float32, 0 or -inf, bound <= S.
        rows_mask: `row_mask` of it, where it is there already.

    Returns:
        [T, H * D] dtype.
    """
    length, heads, head_dim = q.shape
    kv_heads, bound = k_cache.shape[0], mask.shape[-1]
    # BLAS may cut a product between threads where it has one only.
    if q.dtype == torch.float32 and kv_heads > 1:
        rows_mask = row_mask(mask, heads // kv_heads) if rows_mask is None else rows_mask
        return _attend_by_blas(q, k_cache, v_cache, rows_mask, scratch)
    if length * heads == kv_heads:  # a row alone of each product
        return attend(q.expand(2, -1, -1), k_cache, v_cache, mask.expand(2, -1, -1), scratch)[:1]
    grouped = q.reshape(length, kv_heads, -1).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    keys, values = k_cache.narrow(1, 0, bound), v_cache.narrow(1, 0, bound)
    scores = scratch.take(0, (kv_heads, length, heads // kv_heads, bound))
    _scores(grouped, keys, scores.view(kv_heads, -1, bound))
    torch.add(mask, scores, alpha=head_dim**-0.5, out=scores)
    weights = torch.softmax(scores, -1, out=scratch.take(1, scores.shape))
    out = _weighted(weights.view(kv_heads, -1, bound).to(q.dtype), values)
    return out.view(kv_heads, length, -1).transpose(0, 1).reshape(length, heads * head_dim)


def _attend_by_blas(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, scratch: Scratch) -> Tensor:
    """`attend` in float32 of two key heads or more; mask [R, bound] as of `row_mask`.

    A score is one short sum, the same however many keys there are. The sum over the cache is long, and BLAS takes it
    in pieces that depend on its length: so it is taken here in pieces of `KEYS` rows at fixed places.
    """
    length, heads, head_dim = q.shape
    kv_heads, (rows, bound) = k_cache.shape[0], mask.shape
    grouped = q.reshape(length, kv_heads, -1).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    grouped = functional.pad(grouped, (0, 0, 0, rows - grouped.shape[1]))
    keys, values = k_cache.narrow(1, 0, bound), v_cache.narrow(1, 0, bound)
    scores = torch.bmm(grouped, keys.transpose(1, 2), out=scratch.take(0, (kv_heads, rows, bound)))
    torch.add(mask, scores, alpha=head_dim**-0.5, out=scores)
    weights = torch.softmax(scores, -1, out=scratch.take(1, scores.shape))
    parts = zip(weights.split(KEYS, 2), values.split(KEYS, 1), strict=True)
    out = torch.bmm(*next(parts))
    for part in parts:
        out.baddbmm_(*part)
    used = length * heads // kv_heads
    return out[:, :used].reshape(kv_heads, length, -1).transpose(0, 1).reshape(length, heads * head_dim)


def _scores(q: Tensor, keys: Tensor, out: Tensor) -> None:
    """q k^T: [KV, R, D] and [KV, bound, D] dtype -> out [KV, R, bound] float32."""
    kv_heads, rows, head_dim = q.shape
    few = (
        kv_heads > 1 and q.dtype == torch.bfloat16 and rows <= BATCHED_ROWS and keys.shape[1] <= BATCHED_KEYS
    )
    if few and batched_scores_agree(kv_heads, head_dim, torch.get_num_threads()):
        out.copy_(_batched_scores(q, keys))
        return
    for head, of, place in zip(q.unbind(0), keys.unbind(0), out.unbind(0), strict=True):
        place.copy_(onednn_product(head, of))


def _batched_scores(q: Tensor, keys: Tensor) -> Tensor:
    """`_scores` in bfloat16 by one product, oneDNN too: [KV, R, D] and [KV, bound, D] -> [KV, R, bound]."""
    return torch.bmm(keys, q.transpose(1, 2)).transpose(1, 2)  # keys on the left are read as they lie


@cache
def batched_scores_agree(kv_heads: int, head_dim: int, threads: int) -> bool:
    """True where both products of `_scores` give the same bits for such heads, tried on the first use."""
    generator, most = torch.Generator().manual_seed(0), BATCHED_ROWS
    with torch.inference_mode():
        q, keys = (
            torch.randn(
                (kv_heads, count, head_dim), generator=generator, dtype=torch.float32, device="cpu"
            ).bfloat16()
            for count in (most, BATCHED_KEYS)
        )
        for bound in range(KEYS, BATCHED_KEYS + 1, KEYS):
            expected = torch.stack([onednn_product(*pair) for pair in zip(q, keys[:, :bound], strict=True)])
            for rows in (2, 3, 4, 6, 7, 8, 12, 15, 18, 21, 24, 28, most):
                part = slice(most - rows, most)
                if not torch.equal(_batched_scores(q[:, part], keys[:, :bound]), expected[:, part]):
                    return False
    return True


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights v: [KV, R, bound] and [KV, bound, D] dtype -> [KV, R, D] dtype."""
    if weights.dtype == torch.bfloat16:  # whose batched products are oneDNN's
        return torch.bmm(weights, values)
    pairs = zip(weights.unbind(0), values.transpose(1, 2).unbind(0), strict=True)
    return torch.stack([onednn_product(rows, of) for rows, of in pairs])


@cache
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device="cpu")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.reference.forward.rms_norm` in half its time for a few rows; x and weight float32 or bfloat16."""
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    scale = torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[1]).rsqrt_()
    if x.dtype == torch.float32:
        return x.mul(scale).mul_(weight)
    return x.float().mul_(scale).to(x.dtype).mul_(weight)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`kernels.reference.forward.silu_mul` of two rows or more, of which no thread gets a part of one."""
    rows = max(ONE_THREAD_ELEMENTS * 2 // gate_up.shape[1], 1)
    if gate_up.shape[0] <= rows:
        return reference.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return torch.cat([functional.silu(part) for part in gate.split(rows)]).mul_(up)
