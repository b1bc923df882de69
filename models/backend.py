"""The ops of a forward pass at the granularity of the fused kernels, behind one object chosen at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyramid_rt.errors import InputError
from pyramid_rt.kernels import reference
from pyramid_rt.models.config import LlamaConfig

BACKENDS = ("torch", "triton")

# A matrix of this many bytes or more is packed where that can be; a product with a smaller one takes less time than
# the longer call. The figure is fixed, not measured at load, so that two runs, or two machines, take the same path.
PACKED_BYTES = 2**19


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

    Methods return new tensors, or buffers of the backend that hold until the same method is called again.
    Besides those they write to the cache rows of the window alone. `window` is what the method of that name
    gave for this pass.
    """

    @property
    def name(self) -> str:
        """What `make_backend` calls it."""
        ...

    @property
    def longest_window(self) -> int | None:
        """Most rows of one pass; None for any number."""
        ...

    def window(self, rotary: Tensor, start: Tensor, length: int, kv_bound: int, group: int) -> Any:
        """Positions start .. start + length - 1, start a 0-d int64 device tensor, rotary the whole table."""
        ...

    def embed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: Any) -> Tensor:
        """[V, C] gathered by tokens [T] int64 -> residual stream [T, C], which the RMSNorm of weight `norm` reads."""
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
        window: Any,
    ) -> Tensor:
        """RMSNorm, joint Q, K, V projection, RoPE; writes K and V [KV, S, D] at the window's positions.

        x [T, C], weight [(H + 2 KV) D, C] with the rows of Q, K and V in this order -> q [T, H, D].
        """
        ...

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Any) -> Tensor:
        """q [T, H, D] against the cache's rows as the window's mask allows -> [T, H D]."""
        ...

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        window: Any,
    ) -> Tensor:
        """residual + x W^T + b: x [T, K], weight [C, K], residual [T, C] -> [T, C].

        `norm` [C] is the weight of the RMSNorm that reads the result: a backend may prepare for it here.
        """
        ...

    def gate_up(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, window: Any
    ) -> Tensor:
        """RMSNorm, the joint gate and up projection, silu(gate) * up: x [T, C], weight [2 I, C] -> [T, I]."""
        ...

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """RMSNorm and logits of chosen rows: x [T, C], rows [R] int64, weight [V, C] -> [R, V] float32."""
        ...


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

    def window(self, rotary: Tensor, start: Tensor, length: int, kv_bound: int, group: int) -> Window:
        """See `Backend`."""
        positions = torch.arange(length, device=start.device).add_(start)
        mask = reference.causal_mask(positions, kv_bound, group, rotary.dtype)
        cos, sin = rotary.index_select(0, positions).chunk(2, 1)
        return Window(positions, cos, sin, mask)

    def embed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: Window) -> Tensor:
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
        joint = reference.linear(normed, weight, bias).view(x.shape[0], -1, head_dim)
        heads = joint.shape[1] - 2 * kv_heads
        qk, v = joint.split_with_sizes((heads + kv_heads, kv_heads), 1)
        q, k = reference.apply_rope(qk, window.cos, window.sin).split_with_sizes((heads, kv_heads), 1)
        reference.write_cache(k_cache, k, window.positions)
        reference.write_cache(v_cache, v, window.positions)
        return q

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Window) -> Tensor:
        """See `Backend`."""
        return reference.attention(q, k_cache, v_cache, window.mask)

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        window: Window,
    ) -> Tensor:
        """See `Backend`."""
        return reference.linear(x, weight, bias).add_(residual)

    def gate_up(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, window: Window
    ) -> Tensor:
        """See `Backend`."""
        normed = reference.rms_norm(x, norm, eps)
        return reference.silu_mul(reference.linear(normed, weight, bias))

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """See `Backend`."""
        normed = reference.rms_norm(x.index_select(0, rows), norm, eps)
        return reference.lm_head(normed, weight)


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that is unknown or cannot run on a device; there is no silent fallback.

    Raises:
        InputError: names the backend, the device and what would do.
    """
    if name not in BACKENDS:
        raise InputError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "torch":
        return
    try:
        from triton import knobs
    except ImportError as error:
        raise InputError(f"backend 'triton' needs the package triton: {error}") from error
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise InputError(
            f"backend 'triton' runs on CUDA devices, found {str(device)!r}; on a CPU use backend='torch' "
            "(or, for tests, Triton's interpreter: TRITON_INTERPRET=1 before anything is imported)"
        )


def make_backend(
    name: str,
    config: LlamaConfig,
    device: torch.device,
    *,
    dtype: torch.dtype,
    max_seq: int,
) -> Backend:
    """The backend of one tier, chosen once at load, with whatever buffers it needs.

    Args:
        name: `torch` or `triton`.
        config: the tier's shape.
        device: where the tier lives.
        dtype: its weights' type.
        max_seq: positions of its cache, slack excluded.

    Raises:
        InputError: as `check_backend`.
        UnsupportedModelError: a shape that the kernels do not take.
    """
    check_backend(name, device)
    if name == "triton":
        # Only here: importing Triton takes longer than loading a small model.
        from pyramid_rt.models.triton_backend import TritonBackend

        return TritonBackend.allocate(config, max_seq=max_seq, dtype=dtype, device=device)
    return TorchBackend()


def worth_packing(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the `torch` backend computes with a packed copy of such a matrix (`reference.pack`)."""
    return rows * columns * dtype.itemsize >= PACKED_BYTES and reference.can_pack(device, dtype)


def workspace_bytes(
    name: str, config: LlamaConfig, max_seq: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that a tier takes besides its weights and cache; takes none. Errors as `make_backend`.

    With `triton` they are its buffers; with `torch` the packed copy of an embedding that serves as the head too.
    """
    check_backend(name, device)
    if name == "torch":
        rows, columns = config.vocab_size, config.hidden_size
        copied = config.tie_word_embeddings and worth_packing(rows, columns, device, dtype)
        return rows * columns * dtype.itemsize if copied else 0
    from pyramid_rt.models.triton_backend import buffer_bytes

    return buffer_bytes(config, max_seq, dtype, device)
