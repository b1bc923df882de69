"""The assertions over tensors that other tests use: they fail where they should, and say where."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.equality import assert_equal_tensors, assert_everywhere


def test_equal_tensors_pass() -> None:
    assert_equal_tensors(torch.arange(6).view(2, 3), torch.arange(6).view(2, 3))
    assert_equal_tensors(torch.empty(0), torch.empty(0))
    assert_equal_tensors(torch.tensor(3.0), torch.tensor(3.0))


def test_the_first_difference_is_named() -> None:
    left = torch.zeros(2, 3)
    right = left.clone()
    right[1, 0], right[1, 2] = 0.5, -1.0
    with pytest.raises(
        AssertionError, match=r"^rows: 2 of 6 elements differ, first at \[1, 0\]: 0.0 and 0.5$"
    ):
        assert_equal_tensors(left, right, "rows")
    with pytest.raises(AssertionError, match=r"^1 of 1 elements differ, first at \[\]: 1 and 2$"):
        assert_equal_tensors(torch.tensor(1), torch.tensor(2))


def test_nan_shape_and_type_differ() -> None:
    nan = torch.tensor([1.0, math.nan])
    with pytest.raises(AssertionError, match=r"first at \[1\]: nan and nan"):
        assert_equal_tensors(nan, nan.clone())
    with pytest.raises(AssertionError, match=r"shapes \(2,\) and \(2, 1\)"):
        assert_equal_tensors(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(AssertionError, match=r"types torch\.float32 and torch\.int64"):
        assert_equal_tensors(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_everywhere_names_the_first_place() -> None:
    values = torch.tensor([[-1, -2], [3, -4]])
    assert_everywhere(values > -9, values)
    with pytest.raises(AssertionError, match=r"^not at 1 of 4 places, first at \[1, 0\]: 3$"):
        assert_everywhere(values < 0, values)
    with pytest.raises(AssertionError, match=r"^sign: not at 1 of 1 places, first at \[\]$"):
        assert_everywhere(torch.tensor(False), about="sign")
