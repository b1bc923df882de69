"""The ops of a forward pass at the granularity of the fused kernels, behind one object chosen at load."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pyramid_rt.models.matrix import Matrix
from pyramid_rt.models.trees import Tree


class Backend(Protocol):
    """One method per fused kernel. T rows, hidden size C, D head size; all tensors in the activations'
    dtype; how a weight matrix is held is its own affair.

    Methods return new tensors, or buffers of the backend that hold until the same method is called again.
    Besides those they write to the cache rows of the window alone. `window` is what the method of that name
    gave for this pass.
    """

    @property
    def name(self) -> str:
        """Its name in `make_backend`."""
        ...

    @property
    def longest_window(self) -> int | None:
        """Most rows of one pass; None for any number."""
        ...

    def window(
        self,
        rotary: Tensor,
        start: Tensor,
        length: int,
        kv_bound: int,
        group: int,
        tree: Tree | None = None,
    ) -> Any:
        """Cache rows start .. start + length - 1, start a 0-d int64 device tensor, rotary the whole table.

        Without a tree they are positions too, and a row sees all up to itself. Raises ValueError for a tree where
        the backend knows chains only.
        """
        ...

    def embed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: Any) -> Tensor:
        """[V, C] gathered by tokens [T] int64 -> residual stream [T, C], which the RMSNorm of weight `norm` reads."""
        ...

    def qkv(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        bias: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        window: Any,
    ) -> Tensor:
        """RMSNorm, joint Q, K, V projection, RoPE; writes K and V [KV, S, D] at the window's cache rows.

        x [T, C], weight [(H + 2 KV) D, C] with the rows of Q, K and V in this order -> q [T, H, D].
        """
        ...

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Any) -> Tensor:
        """q [T, H, D] against the cache's rows as the window's mask allows -> [T, H D]."""
        ...

    def project(
        self,
        x: Tensor,
        weight: Matrix,
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
        self, x: Tensor, norm: Tensor, eps: float, weight: Matrix, bias: Tensor | None, window: Any
    ) -> Tensor:
        """RMSNorm, the joint gate and up projection, silu(gate) * up: x [T, C], weight [2 I, C] -> [T, I]."""
        ...

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        """RMSNorm and logits of chosen rows: x [T, C], rows [R] int64, weight [V, C] -> [R, V] float32."""
        ...
