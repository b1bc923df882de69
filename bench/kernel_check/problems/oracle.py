"""Distances of a result from a float64 run, as ratios of error to tolerance (1 and below passes); bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Half a spacing of float32 at 1: the rounding of one operation.
UNIT32 = 2.0**-24


def accumulation(width: int) -> float:
    """Rounding of a float32 sum of `width` products, relative to the result's RMS.

    A running sum of independent terms has partial sums of sqrt(i) and rounds each by at most UNIT32 of it; the
    roundings add like a random walk: sqrt(sum of i) / sqrt(K) is about sqrt(K / 2). sqrt(K) bounds its RMS.
    """
    return UNIT32 * math.sqrt(width)


def near(
    actual: Tensor, exact: Tensor, reference: Tensor, width: int = 0, sizes: Tensor | None = None
) -> float:
    """Error over tolerance, the larger of those of the worst element and of the RMS; inf if not finite.

    As near to the float64 result as the plain form of the same dtype is. One rounding of dtype is added: an op
    that rounds fewer times than the kernel may hit a value exactly; and with `width` the accumulation of that
    many products in float32, whose order a library is free to choose better.

    Args:
        actual: of the kernel, any shape, dtype.
        exact: float64, the same shape.
        reference: of the plain form in dtype.
        width: K, or 0 to allow no more than the reference does.
        sizes: float64, of the shape of `exact`: how much of an error of a sum's size comes through at each element,
            where the result is not the sums themselves; by default the result's RMS, everywhere.
    """
    if not bool(actual.isfinite().all()):
        return math.inf
    eps = torch.finfo(actual.dtype).eps
    error, allowed = (actual.double() - exact).abs(), (reference.double() - exact).abs()
    scale, rms_scale = float(exact.abs().max()), float(exact.square().mean().sqrt())
    worst, rms = float(error.max()), float(error.square().mean().sqrt())
    sums = accumulation(width) * rms_scale
    # Six standard deviations: the worst of the 10^7 logits of a window lies at five and a half.
    worst_bound = 2.0 * float(allowed.max()) + eps * scale
    rms_bound = 1.5 * float(allowed.square().mean().sqrt()) + 0.5 * eps * rms_scale + sums
    if sizes is None:
        return max(_over(worst, worst_bound + 6.0 * sums), _over(rms, rms_bound))
    bound = worst_bound + 6.0 * accumulation(width) * sizes
    return max(float((error / bound).max()), _over(rms, rms_bound))


def within(actual: Tensor, exact: Tensor, bound: Tensor) -> float:
    """Error over an elementwise bound; of the RMS error half the RMS bound is asked. inf if not finite."""
    if not bool(actual.isfinite().all()):
        return math.inf
    error = (actual.double() - exact).abs()
    worst = float((error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max())
    rms = _over(float(error.square().mean().sqrt()), 0.5 * float(bound.square().mean().sqrt()))
    return max(worst, rms)


def relative(actual: Tensor, exact: Tensor, tolerance: float) -> float:
    """Largest relative error over a tolerance; inf if not finite."""
    if not bool(actual.isfinite().all()):
        return math.inf
    size = exact.double().abs().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((actual.double() - exact.double()).abs() / size).max()) / tolerance


def equal(actual: Tensor, expected: Tensor) -> float:
    """0 where the two hold the same bits, inf elsewhere."""
    return 0.0 if torch.equal(bits(actual), bits(expected)) else math.inf


def bits(x: Tensor) -> Tensor:
    """A tensor as integers of its width, so that NaN equals NaN and -0 differs from 0."""
    if not x.dtype.is_floating_point:
        return x
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def differ(actual: Tensor, expected: Tensor, *, exact: bool) -> Tensor:
    """0-d bool on their device, without reading it: two results differ.

    Args:
        exact: compare bits; else, in the interpreter, whose matmul rounds by the width of a tile, values up to
            32 roundings of the dtype.
    """
    if exact:
        return (bits(actual) != bits(expected)).any()
    left, right = actual.double(), expected.double()
    if not actual.dtype.is_floating_point:
        return (left != right).any()
    eps = torch.finfo(actual.dtype).eps
    far = (left - right).abs() > 32 * eps * right.abs().clamp(min=1.0)
    same_infinity = left.isinf() & (left == right)
    return ((far | left.isnan()) & ~same_infinity).any()


def _over(value: float, bound: float) -> float:
    if value == 0.0:
        return 0.0
    return value / bound if bound > 0.0 else math.inf
