"""Kinds of weight matrices: how each is held, how the `torch` backend multiplies with it, what kernels read of it.

A product is y = x W^T + b with W [rows, columns]. The type of x, y and b is the activations' own and says nothing
about how W is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

# The layout of a packed matrix is chosen for windows of this many rows, and serves all others.
PACKED_FOR_ROWS = 8


class Matrix(Protocol):
    """A weight matrix [rows, columns] as it is held."""

    @property
    def rows(self) -> int:
        """Output channels."""
        ...

    @property
    def columns(self) -> int:
        """Input channels."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes it takes on its device, scales and the like included."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that holds it."""
        ...

    @property
    def operand(self) -> Tensor:
        """The tensor for kernels: [rows, columns] in the activations' type. TypeError: no kernel takes this kind."""
        ...

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: x [T, columns] contiguous, bias [rows] of its type -> [T, rows] of its type, contiguous."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """Every entry in the activations' type, row by row.

    Attributes:
        tensor: [rows, columns] float32, bfloat16 or float16.
    """

    tensor: Tensor

    @property
    def rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def columns(self) -> int:
        return self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def operand(self) -> Tensor:
        return self.tensor

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, self.tensor, bias)


@dataclass(frozen=True, slots=True)
class Packed:
    """float32 or bfloat16 in oneDNN's own order of entries, on a CPU.

    Products with narrow windows stream it at nearly full speed, whatever their width, and a row of the result has the
    same bits at every width and place: each is a sum in one order. The dense form does neither. One row alone is the
    exception, which takes another order where there are many columns; so it never goes alone.

    Attributes:
        tensor: opaque; only oneDNN's product reads it.
        rows, columns: of the matrix.
    """

    tensor: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        """A packed copy of [rows, columns] on a CPU. See `can_pack`."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        return cls(packed, weight.shape[0], weight.shape[1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * self.tensor.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def operand(self) -> Tensor:
        raise TypeError("no kernel reads a oneDNN-packed matrix; it is for the torch backend on a CPU")

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[0] == 1:
            return onednn_product(x.expand(2, -1).contiguous(), self.tensor, bias)[:1]
        return onednn_product(x, self.tensor, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN's inner product, which adds up in one order at every number of rows from 2 on.

    x [T, K] contiguous; weight [N, K] packed, or dense, or the transpose of a dense [K, N]: other strides run a
    hundred times slower; bias [N] or None -> [T, N].
    """
    out: Tensor = _product()(x, weight, bias, "none", [], "")
    return out


@cache
def _product() -> Any:
    # The overload by itself: picking it anew takes a microsecond a call.
    return torch.ops.mkldnn._linear_pointwise.default


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True where there is `Packed` for matrices of this kind, and then the `torch` backend packs all of them.

    float32 on a CPU, where torch was built with oneDNN; bfloat16 where the processor besides has AVX-512.
    """
    # torch's compiler calls these; they are not part of its public interface.
    ops = torch.ops.mkldnn
    there = all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    if device.type != "cpu" or not there or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return hasattr(ops, "_is_mkldnn_bf16_supported") and bool(ops._is_mkldnn_bf16_supported())
    return dtype == torch.float32
