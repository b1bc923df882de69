"""Tolerances that come from a float64 run, and buffers that show what a kernel left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.kernel_check.problems.oracle import near
from helpers.equality import assert_everywhere
from pyramid_rt.kernels.configs import ProjectionConfig
from pyramid_rt.kernels.forward.product import Workspace, counter_elements, partial_elements

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 7, 16, 17, 64)
# The device of every kernel test: with a GPU the same tests run there, compiled.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ProjectionConfig(
    block_n=64, block_k=32, splits=1, sub_tiles=4, num_warps=4, narrow_stages=2, wide_stages=2
)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def window(length: int, width: int, *, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[64, width], NaN after the window: whoever reads a row too many shows it."""
    x = poisoned(64, width, dtype=dtype)
    x[:length] = random(length, width, dtype=dtype, seed=seed)
    return x


def sums_of_squares(x: Tensor, length: int) -> Tensor:
    """[ceil(C / 64), 64] float32 of the rows of x [64, C], NaN after the window."""
    width = x.shape[1]
    sums = poisoned(-(-width // 64), 64, dtype=torch.float32)
    for tile in range(sums.shape[0]):
        sums[tile, :length] = x[:length, tile * 64 : tile * 64 + 64].float().square().sum(-1)
    return sums


def workspace(rows: int, config: ProjectionConfig) -> Workspace:
    """As large as a product of `rows` weight rows needs, its partials poisoned."""
    space = Workspace.allocate(
        partial_elements(rows, config.block_n, config.splits),
        counter_elements(rows, config.block_n, config.splits),
        DEVICE,
    )
    space.partials.fill_(torch.nan)
    return space


def assert_near(actual: Tensor, exact: Tensor, reference: Tensor) -> None:
    """As near to the float64 result as the reference of the same dtype is, see `near`."""
    assert near(actual, exact, reference) <= 1.0


def assert_untouched(buffer: Tensor) -> None:
    assert_everywhere(buffer.isnan(), buffer)
