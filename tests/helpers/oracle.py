"""Tolerances that come from a float64 run, and buffers that show what a kernel left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.kernel_check.problems.oracle import UNIT32, near
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


def assert_near(actual: Tensor, exact: Tensor, reference: Tensor, *, width: int, magnitudes: Tensor) -> None:
    """A product of `width` terms is as near to the float64 result as arithmetic in its dtype keeps it.

    Always as near as the reference of the same dtype is but for the random walk of a float32 sum, see `near`:
    the reference's library may add in a luckier order. In float32 also, element by element, within the rounding
    error that no order of additions exceeds, fused or not (Higham, Accuracy and Stability, 3.1): n roundings of
    each term stray by at most n u / (1 - n u) of the magnitudes' sum. Their RMS is held to the same with sqrt(n),
    since roundings that do not conspire add like a random walk.

    Args:
        actual, reference: in dtype. exact: float64.
        width: K.
        magnitudes: float64, the exact result's formula with every term's magnitude in its place.
    """
    assert near(actual, exact, reference, width) <= 1.0
    if actual.dtype != torch.float32:
        return
    # K of the sum; as many of the mean square under a norm; those of the norm's weight, of the root, the bias,
    # the rotation, the gate and the residual.
    roundings = 2 * width + 16
    bound = roundings * UNIT32 / (1 - roundings * UNIT32) * magnitudes
    error = (actual.double() - exact).abs()
    assert_everywhere(error <= bound, error, about=f"{float((error / bound).max())} of the bound")
    rms, most = (float(x.square().mean().sqrt()) for x in (error, magnitudes))
    assert rms <= math.sqrt(roundings) * UNIT32 * most, (rms, most)


def linear_magnitudes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """|x| |W|^T + |b| in float64: what the rounding of a product is measured by."""
    sizes = x.double().abs() @ weight.double().abs().T
    return sizes if bias is None else sizes + bias.double().abs()


def assert_untouched(buffer: Tensor) -> None:
    assert_everywhere(buffer.isnan(), buffer)
