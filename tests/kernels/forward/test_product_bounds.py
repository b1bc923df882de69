"""The bounds that products are held to: the kernel's own result stays inside, and results of small faults do not.

Each fault is one that a kernel could have, made by giving it other inputs than those of the float64 run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.oracle import (
    CONFIG,
    assert_near,
    linear_magnitudes,
    poisoned,
    random,
    window,
    workspace,
    zeros,
)
from torch import Tensor

from pyramid_rt.kernels.forward import project
from pyramid_rt.kernels.reference import forward as reference

LENGTH, CHANNELS = 3, 24


def to_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, to nearest: what a tensor core takes of float32 unless told otherwise."""
    bits = x.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def without_a_term(x: Tensor) -> Tensor:
    changed = x.clone()
    # The smallest of the row, so that what is missing is small too.
    changed[torch.arange(LENGTH), x.abs().argmin(-1)] = 0.0
    return changed


def wrong_row(x: Tensor) -> Tensor:
    return x[[0, 1, 1]]


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a term dropped": without_a_term,
    "the row before": wrong_row,
    "operands in bfloat16": lambda x: x.bfloat16().float(),
    "operands in TF32": to_tf32,
    "the last step of K twice": lambda x: torch.cat((x[:, :-1], 2 * x[:, -1:]), -1),
}
RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "result in bfloat16": lambda y: y.bfloat16().float(),
    "result in TF32": to_tf32,
    "all a little off": lambda y: y * (1 + 2.0**-15),
}


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by the kernel, [T, N] float32."""
    buffer = poisoned(64, x.shape[1], dtype=torch.float32)
    buffer[:LENGTH] = x
    out, scaled = (poisoned(64, CHANNELS, dtype=torch.float32) for _ in range(2))
    sums, norm = poisoned(1, 64, dtype=torch.float32), torch.ones(CHANNELS, device=x.device)
    project.run(
        buffer, weight, None, zeros(64, CHANNELS), norm, LENGTH, out, scaled, sums,
        workspace(CHANNELS, CONFIG), CONFIG,
    )  # fmt: skip
    return out[:LENGTH]


def inputs(width: int) -> tuple[Tensor, Tensor]:
    x = window(LENGTH, width, dtype=torch.float32)[:LENGTH]
    return x, random(CHANNELS, width, dtype=torch.float32, scale=width**-0.5, seed=2)


def judge(result: Tensor, x: Tensor, weight: Tensor) -> None:
    exact, plain = x.double() @ weight.double().T, reference.linear(x, weight)
    magnitudes = linear_magnitudes(x, weight)
    assert_near(result, exact, plain, width=x.shape[1], magnitudes=magnitudes)


@pytest.mark.parametrize("width", [16, 80, 1024])
def test_the_kernel_is_inside(width: int) -> None:
    x, weight = inputs(width)
    judge(multiply(x, weight), x, weight)


@pytest.mark.parametrize("width", [16, 80, 1024])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_operands_is_outside(fault: str, width: int) -> None:
    x, weight = inputs(width)
    with pytest.raises(AssertionError):
        judge(multiply(FAULTS[fault](x), weight), x, weight)


@pytest.mark.parametrize("width", [16, 80, 1024])
@pytest.mark.parametrize("fault", RESULTS)
def test_a_fault_of_the_result_is_outside(fault: str, width: int) -> None:
    x, weight = inputs(width)
    with pytest.raises(AssertionError):
        judge(RESULTS[fault](multiply(x, weight)), x, weight)


def test_one_element_that_is_off_is_found_by_its_own_magnitude() -> None:
    """A row of small numbers beside a row of large ones: its error would drown in what is allowed of those."""
    x, weight = inputs(80)
    x[0] *= 1e-3
    result = multiply(x, weight)
    judge(result, x, weight)
    result[0, 5] += 1e-6
    with pytest.raises(AssertionError, match="of the bound"):
        judge(result, x, weight)
