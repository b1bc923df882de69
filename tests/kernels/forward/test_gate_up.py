"""kernels/forward/gate_up.py against the reference, in Triton's interpreter or on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
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

from pyramid_rt.kernels.forward import gate_up
from pyramid_rt.kernels.reference import forward as reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("inner", "width", "splits", "sub_tiles"), [(64, 64, 1, 4), (40, 72, 2, 4), (40, 128, 4, 1)]
)
def test_matches_reference(
    dtype: torch.dtype, length: int, inner: int, width: int, splits: int, sub_tiles: int
) -> None:
    config = replace(CONFIG, splits=splits, sub_tiles=sub_tiles)
    x, norm = window(length, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    weight = random(2 * inner, width, dtype=dtype, scale=width**-0.5, seed=2)
    bias = random(2 * inner, dtype=dtype, seed=3) if splits == 2 else None
    out, space = poisoned(64, inner, dtype=dtype), workspace(2 * inner, config)
    gate_up.run(x * norm, sums_of_squares(x, length), 1e-5, weight, bias, length, out, space, config)

    def apply(kind: torch.dtype) -> Tensor:
        normed = reference.rms_norm(x[:length].to(kind), norm.to(kind), 1e-5)
        b = None if bias is None else bias.to(kind)
        return reference.silu_mul(reference.linear(normed, weight.to(kind), b))

    normed = reference.rms_norm(x[:length].double(), norm.double(), 1e-5)
    gate, up = reference.linear(normed, weight.double(), None if bias is None else bias.double()).chunk(2, -1)
    of_gate, of_up = linear_magnitudes(normed, weight, bias).chunk(2, -1)
    # An error of the gate goes through silu, whose slope nowhere exceeds 1.1, and one of up through the gate.
    magnitudes = 1.1 * of_gate * up.abs() + torch.nn.functional.silu(gate).abs() * of_up
    assert_near(out[:length], apply(torch.float64), apply(dtype), width=width, magnitudes=magnitudes)
    assert_untouched(out[length:])
    assert not space.counters.any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_gates() -> None:
    """silu goes to 0 on the far left, not to the NaN of infinity over infinity."""
    x = zeros(64, 64)
    x[0], x[1] = 100.0, -100.0
    weight = torch.cat((torch.eye(64) * 1e3, torch.eye(64))).to(x.device)
    out = poisoned(64, 64, dtype=torch.float32)
    gate_up.run(x, sums_of_squares(x, 2), 1e-5, weight, None, 2, out, workspace(128, CONFIG), CONFIG)
    torch.testing.assert_close(out[0], torch.full_like(out[0], 1e3), rtol=1e-5, atol=0)
    assert not out[1].any()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": zeros(64, 63)}),
        ("sumsq", {"sumsq": zeros(64)}),
        ("weight", {"weight": zeros(63, 64)}),
        ("weight", {"weight": zeros(64, 64, dtype=torch.float64)}),
        ("bias", {"bias": zeros(32)}),
        ("length", {"length": 0}),
        ("out", {"out": zeros(64, 64)}),
        ("out", {"out": zeros(64, 32, device="meta")}),
        ("workspace.partials", {"config": replace(CONFIG, splits=2)}),
    ],
)
def test_refuses(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "x": zeros(64, 64),
        "sumsq": zeros(1, 64),
        "eps": 1e-5,
        "weight": zeros(64, 64),
        "bias": None,
        "length": 4,
        "out": zeros(64, 32),
        "workspace": workspace(64, CONFIG),
        "config": CONFIG,
    }
    with pytest.raises(ValueError, match=f"^{argument} "):
        gate_up.plan(**(arguments | change))  # type: ignore[arg-type]
