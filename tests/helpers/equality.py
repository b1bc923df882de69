"""Assertions over tensors that say what differs: how much of it, where first, and both values."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_equal_tensors(left: Tensor, right: Tensor, about: object = "") -> None:
    """Fail unless `torch.equal` holds: the same shape and the same value at every index; NaN equals nothing.

    Args:
        about: what was compared, for the message.
    """
    said = f"{about}: " if about != "" else ""
    assert left.shape == right.shape, f"{said}shapes {tuple(left.shape)} and {tuple(right.shape)}"
    assert left.dtype == right.dtype, f"{said}types {left.dtype} and {right.dtype}"
    if torch.equal(left, right):
        return
    differ = left.to_dense() != right.to_dense() if left.is_mkldnn else left != right
    index = tuple(differ.nonzero()[0].tolist())
    first, second = (tensor.to_dense()[index].item() for tensor in (left, right))
    raise AssertionError(
        f"{said}{int(differ.sum())} of {differ.numel()} elements differ, first at {list(index)}: "
        f"{first!r} and {second!r}"
    )


def assert_everywhere(holds: Tensor, values: Tensor | None = None, about: object = "") -> None:
    """Fail unless the bool tensor `holds` is true at every index.

    Args:
        values: of the same shape: what was looked at, for the message.
        about: what was tested, for the message.
    """
    if bool(holds.all()):
        return
    failed = ~holds
    index = tuple(failed.nonzero()[0].tolist())
    value = "" if values is None else f": {values[index].item()!r}"
    said = f"{about}: " if about != "" else ""
    raise AssertionError(
        f"{said}not at {int(failed.sum())} of {failed.numel()} places, first at {list(index)}{value}"
    )
