"""kernels/forward/project.py against the reference, in Triton's interpreter or on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.oracle import (
    CONFIG,
    DTYPES,
    LENGTHS,
    assert_near,
    assert_untouched,
    linear_magnitudes,
    poisoned,
    random,
    sums_of_squares,
    window,
    workspace,
    zeros,
)
from torch import Tensor

from pyramid_rt.kernels.configs import ProjectionConfig
from pyramid_rt.kernels.forward import project
from pyramid_rt.kernels.reference import forward as reference


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, length: int, config: ProjectionConfig
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0]
    out = poisoned(64, channels, dtype=weight.dtype)
    sumsq = poisoned(-(-channels // 64), 64, dtype=torch.float32)
    space = workspace(channels, config)
    norm, scaled = random(channels, dtype=weight.dtype, seed=4), poisoned(64, channels, dtype=weight.dtype)
    project.run(x, weight, bias, residual, norm, length, out, scaled, sumsq, space, config)
    assert not space.counters.any()
    assert_equal_tensors(scaled[:length], out[:length] * norm)
    assert_untouched(scaled[length:])
    return out, sumsq


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("channels", "width", "splits", "sub_tiles"), [(128, 96, 1, 4), (72, 80, 2, 4), (72, 160, 4, 1)]
)
def test_matches_reference(
    dtype: torch.dtype, length: int, channels: int, width: int, splits: int, sub_tiles: int
) -> None:
    config = replace(CONFIG, splits=splits, sub_tiles=sub_tiles)
    x, residual = window(length, width, dtype=dtype), window(length, channels, dtype=dtype, seed=1)
    weight = random(channels, width, dtype=dtype, scale=width**-0.5, seed=2)
    bias = random(channels, dtype=dtype, seed=3) if splits == 2 else None
    out, sumsq = compute(x, weight, bias, residual, length, config)

    def apply(kind: torch.dtype) -> Tensor:
        b = None if bias is None else bias.to(kind)
        y = reference.linear(x[:length].to(kind), weight.to(kind), b)
        return y + residual[:length].to(kind)

    magnitudes = linear_magnitudes(x[:length], weight, bias) + residual[:length].double().abs()
    assert_near(out[:length], apply(torch.float64), apply(dtype), width=width, magnitudes=magnitudes)
    assert_untouched(out[length:])
    torch.testing.assert_close(
        sumsq[:, :length], sums_of_squares(out, length)[:, :length], rtol=1e-5, atol=1e-5
    )
    assert_untouched(sumsq[:, length:])


def test_in_place() -> None:
    x, residual = window(5, 96, dtype=torch.float32), window(5, 128, dtype=torch.float32, seed=1)
    weight = random(128, 96, dtype=torch.float32, seed=2)
    expected, _ = compute(x, weight, None, residual, 5, CONFIG)
    sumsq = poisoned(2, 64, dtype=torch.float32)
    scaled, space = poisoned(64, 128, dtype=torch.float32), workspace(128, CONFIG)
    project.run(x, weight, None, residual, residual[0].clone(), 5, residual, scaled, sumsq, space, CONFIG)
    assert_equal_tensors(residual[:5], expected[:5])


def test_two_tiles_of_channels_in_a_program() -> None:
    x, residual = window(17, 64, dtype=torch.float32), window(17, 192, dtype=torch.float32, seed=1)
    weight = random(192, 64, dtype=torch.float32, seed=2)
    out, sumsq = compute(x, weight, None, residual, 17, replace(CONFIG, block_n=128, splits=2))
    torch.testing.assert_close(out[:17], x[:17] @ weight.T + residual[:17])
    torch.testing.assert_close(sumsq[:, :17], sums_of_squares(out, 17)[:, :17])


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": zeros(64, 95)}),
        ("x", {"x": zeros(64, 96, dtype=torch.float64)}),
        ("x", {"x": zeros(96, 64).T}),
        ("weight", {"weight": zeros(128, 96, dtype=torch.int8)}),
        ("bias", {"bias": zeros(127)}),
        ("residual", {"residual": zeros(63, 128)}),
        ("residual", {"residual": zeros(64, 128, device="meta")}),
        ("out", {"out": zeros(1, 128).expand(64, 128)}),
        ("norm", {"norm": zeros(64)}),
        ("scaled", {"scaled": zeros(64, 192)[:, :128]}),
        ("sumsq", {"sumsq": zeros(2, 64, dtype=torch.float16)}),
        ("length", {"length": 65}),
        ("length", {"length": 0}),
        ("workspace.partials", {"config": replace(CONFIG, splits=2)}),
        ("config.block_n", {"config": replace(CONFIG, block_n=32)}),
    ],
)
def test_refuses(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "x": zeros(64, 96),
        "weight": zeros(128, 96),
        "bias": None,
        "residual": zeros(64, 128),
        "norm": zeros(128),
        "length": 4,
        "out": zeros(64, 128),
        "scaled": zeros(64, 128),
        "sumsq": zeros(2, 64),
        "workspace": workspace(128, CONFIG),
        "config": CONFIG,
    }
    with pytest.raises(ValueError, match=f"^{argument} "):
        project.plan(**(arguments | change))  # type: ignore[arg-type]
