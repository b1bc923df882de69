"""Kinds of weight matrices: how each is held, how the `torch` backend multiplies with it, what kernels read of it.

A product is y = x W^T + b with W [rows, columns]. The type of x, y and b is the activations' own and says nothing
about how W is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# A matrix of this many bytes or more is packed where that can be; a product with a smaller one takes less time than
# the longer call. The figure is fixed, not measured at load, so that two runs, or two machines, take the same path.
PACKED_BYTES = 2**19

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
    """float32 in oneDNN's own order of entries, on a CPU.

    Products with narrow windows stream it at nearly full speed, whatever their width, and add up in one order at
    (nearly) every width; the dense form does neither.

    Attributes:
        tensor: opaque; only oneDNN's product reads it.
        rows, columns: of the matrix.
    """

    tensor: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        """A packed copy of [rows, columns] float32 on a CPU. See `can_pack`."""
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
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.tensor, bias, "none", [], "")
        return out


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True where there is `Packed` for matrices of this kind: float32 on a CPU, where torch was built with oneDNN."""
    # torch's compiler calls these two; they are not part of its public interface.
    there = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return device.type == "cpu" and dtype == torch.float32 and there and torch.backends.mkldnn.is_available()


def worth_packing(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """True where the `torch` backend computes with a packed copy of such a matrix."""
    return rows * columns * dtype.itemsize >= PACKED_BYTES and can_pack(device, dtype)
