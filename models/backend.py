"""The ops of a forward pass at the granularity of the fused kernels, behind one object chosen at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyramid_rt.errors import InputError
from pyramid_rt.kernels import reference

# float32 weights of this size and more are read from memory at every step, not from a CPU's cache. The figure
# is fixed, not measured at load, so that two runs on one machine, or on two, take the same path.
STREAMING_BYTES = 24 * 2**20


@dataclass(frozen=True, slots=True)
class Window:
    """Where the rows of one forward pass stand; made once per pass, read by every layer.

    Attributes:
        positions: [T] int64, absolute positions start .. start + T - 1.
        cos, sin: [T, 1, D] dtype, their rows of the rotary table.
        mask: [T * G, kv_bound] dtype, 0 where a row sees a cache row and -inf elsewhere.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor


class Backend(Protocol):
    """One method per fused kernel. T rows, hidden size C, D head size; all tensors in the model's dtype.

    Methods may return new tensors; they write to nothing but the cache rows of the window.
    """

    @property
    def name(self) -> str:
        """What `make_backend` calls it."""
        ...

    def window(self, rotary: Tensor, start: Tensor, length: int, kv_bound: int, group: int) -> Window:
        """Positions start .. start + length - 1, start a 0-d int64 device tensor, rotary the whole table."""
        ...

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """[V, C] gathered by tokens [T] int64 -> residual stream [T, C]."""
        ...

    def qkv(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        window: Window,
    ) -> Tensor:
        """RMSNorm, joint Q, K, V projection, RoPE; writes K and V [KV, S, D] at the window's positions.

        x [T, C], weight [(H + 2 KV) D, C] with the rows of Q, K and V in this order -> q [T, H, D].
        """
        ...

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Window) -> Tensor:
        """q [T, H, D] against the cache's rows as the window's mask allows -> [T, H D]."""
        ...

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """residual + x W^T + b: x [T, K], weight [C, K], residual [T, C] -> [T, C]."""
        ...

    def gate_up(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
        """RMSNorm, the joint gate and up projection, silu(gate) * up: x [T, C], weight [2 I, C] -> [T, I]."""
        ...

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """RMSNorm and logits of chosen rows: x [T, C], rows [R] int64, weight [V, C] -> [R, V] float32."""
        ...


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """The reference ops, on any device.

    Attributes:
        swap: use the swapped form of narrow products (`reference.linear`).
    """

    swap: bool = False

    @property
    def name(self) -> str:
        """`torch`."""
        return "torch"

    def window(self, rotary: Tensor, start: Tensor, length: int, kv_bound: int, group: int) -> Window:
        """See `Backend`."""
        positions = torch.arange(length, device=start.device).add_(start)
        mask = reference.causal_mask(positions, kv_bound, group, rotary.dtype)
        cos, sin = rotary.index_select(0, positions).chunk(2, 1)
        return Window(positions, cos, sin, mask)

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """See `Backend`."""
        return reference.embedding(table, tokens)

    def qkv(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        window: Window,
    ) -> Tensor:
        """See `Backend`."""
        kv_heads, _, head_dim = k_cache.shape
        normed = reference.rms_norm(x, norm, eps)
        joint = reference.linear(normed, weight, bias, swap=self.swap).view(x.shape[0], -1, head_dim)
        heads = joint.shape[1] - 2 * kv_heads
        qk, v = joint.split_with_sizes((heads + kv_heads, kv_heads), 1)
        q, k = reference.apply_rope(qk, window.cos, window.sin).split_with_sizes((heads, kv_heads), 1)
        reference.write_cache(k_cache, k, window.positions)
        reference.write_cache(v_cache, v, window.positions)
        return q

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Window) -> Tensor:
        """See `Backend`."""
        return reference.attention(q, k_cache, v_cache, window.mask)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """See `Backend`."""
        return reference.linear(x, weight, bias, swap=self.swap).add_(residual)

    def gate_up(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Backend`."""
        normed = reference.rms_norm(x, norm, eps)
        return reference.silu_mul(reference.linear(normed, weight, bias, swap=self.swap))

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """See `Backend`."""
        normed = reference.rms_norm(x.index_select(0, rows), norm, eps)
        return reference.lm_head(normed, weight, swap=self.swap)


def make_backend(
    name: str, device: torch.device, *, dtype: torch.dtype = torch.float32, weight_bytes: int = 0
) -> Backend:
    """The backend of one tier, chosen once at load; there is no silent fallback.

    Args:
        name: `torch`.
        device: where the tier lives.
        dtype: its weights' type.
        weight_bytes: their size; on a CPU it decides which form of product is used.

    Raises:
        InputError: an unknown backend, or one that this version does not have.
    """
    if name == "triton":
        raise InputError("backend 'triton' is not in this version; use backend='torch', on the GPU too")
    if name != "torch":
        raise InputError(f"backend is {name!r}, expected 'torch'")
    # 16-bit products go through another library, whose plain form is the fast one at every width.
    streaming = weight_bytes >= STREAMING_BYTES and dtype == torch.float32
    return TorchBackend(swap=device.type == "cpu" and streaming)
