"""The `torch` backend: every op of a forward pass is its reference in plain torch, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_rt.kernels.reference import forward as reference
from pyramid_rt.models.matrix import Matrix
from pyramid_rt.models.trees import Tree


@dataclass(frozen=True, slots=True)
class Window:
    """The places of one forward pass's rows; made once per pass, read by every layer.

    In a chain slot and position are one; the nodes of a tree that are equally deep have one position and a slot each.

    Attributes:
        slots: [T] int64, cache rows start .. start + T - 1.
        positions: [T] int64, by which a row is rotated: start + its depth. The same tensor in a chain.
        ancestors: [T] int64 as in `Tree`; None in a chain.
        cos, sin: [T, 1, D] dtype, the positions' rows of the rotary table.
        mask: [T * G, kv_bound] dtype, 0 where a row sees a cache row and -inf elsewhere.
    """

    slots: Tensor
    positions: Tensor
    ancestors: Tensor | None
    cos: Tensor
    sin: Tensor
    mask: Tensor


def cached(joint: Tensor, k_cache: Tensor, v_cache: Tensor, window: Window) -> Tensor:
    """Rotate Q and K of a joint projection [T, (H + 2 KV) D], write K and V to the window's rows -> q [T, H, D]."""
    kv_heads, _, head_dim = k_cache.shape
    joint = joint.view(joint.shape[0], -1, head_dim)
    heads = joint.shape[1] - 2 * kv_heads
    qk, v = joint.split_with_sizes((heads + kv_heads, kv_heads), 1)
    q, k = reference.apply_rope(qk, window.cos, window.sin).split_with_sizes((heads, kv_heads), 1)
    reference.write_cache(k_cache, k, window.slots)
    reference.write_cache(v_cache, v, window.slots)
    return q


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """The reference ops, on any device."""

    @property
    def name(self) -> str:
        """`torch`."""
        return "torch"

    @property
    def longest_window(self) -> int | None:
        """See `Backend`."""
        return None

    def window(
        self,
        rotary: Tensor,
        start: Tensor,
        length: int,
        kv_bound: int,
        group: int,
        tree: Tree | None = None,
    ) -> Window:
        """See `Backend`."""
        slots = torch.arange(length, dtype=torch.int64, device=start.device).add_(start)
        if tree is None:
            positions, ancestors = slots, None
            mask = reference.causal_mask(slots, kv_bound, group, rotary.dtype)
        else:
            positions, ancestors = tree.depths + start, tree.ancestors
            mask = reference.tree_mask(start, ancestors, kv_bound, group, rotary.dtype, length=length)
        cos, sin = rotary.index_select(0, positions).chunk(2, 1)
        return Window(slots, positions, ancestors, cos, sin, mask)

    def embed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: Window) -> Tensor:
        """See `Backend`."""
        return reference.embedding(table, tokens)

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
        return cached(weight.multiply(reference.rms_norm(x, norm, eps), bias), k_cache, v_cache, window)

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Window) -> Tensor:
        """See `Backend`."""
        return reference.attention(q, k_cache, v_cache, window.mask)

    def project(
        self,
        x: Tensor,
        weight: Matrix,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        window: Window,
    ) -> Tensor:
        """See `Backend`."""
        return weight.multiply(x, bias).add_(residual)

    def gate_up(
        self, x: Tensor, norm: Tensor, eps: float, weight: Matrix, bias: Tensor | None, window: Window
    ) -> Tensor:
        """See `Backend`."""
        normed = reference.rms_norm(x, norm, eps)
        return reference.silu_mul(weight.multiply(normed, bias))

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        """See `Backend`."""
        normed = reference.rms_norm(x.index_select(0, rows), norm, eps)
        return weight.multiply(normed).float()
