"""kernels/forward/qkv.py against the reference, in Triton's interpreter or on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.oracle import (
    CONFIG,
    DEVICE,
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

from pyramid_rt.kernels.forward import qkv
from pyramid_rt.kernels.reference import forward as reference

EPS = 1e-5
ROWS = 160


def table(head_dim: int, dtype: torch.dtype) -> Tensor:
    return reference.rotary_table("default", ROWS, head_dim, theta=1e4, dtype=dtype).to(DEVICE)


def scalar(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "splits", "sub_tiles"),
    [(2, 1, 64, 1, 4), (1, 1, 96, 2, 4), (1, 1, 128, 1, 4), (3, 1, 16, 3, 1)],
)
def test_matches_reference(
    dtype: torch.dtype, length: int, heads: int, kv_heads: int, head_dim: int, splits: int, sub_tiles: int
) -> None:
    width, start = 40, 80
    config = replace(CONFIG, splits=splits, sub_tiles=sub_tiles)
    rows = (heads + 2 * kv_heads) * head_dim
    x, norm = window(length, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    weight = random(rows, width, dtype=dtype, scale=width**-0.5, seed=2)
    bias = random(rows, dtype=dtype, seed=3) if splits == 2 else None
    rotary = table(head_dim, dtype)
    q, space = poisoned(64, heads, head_dim, dtype=dtype), workspace(rows, config)
    # K and V as views of one buffer: their strides are not those of a tensor of their own.
    cache = poisoned(kv_heads, ROWS, 2, head_dim, dtype=dtype)
    k, v = cache.unbind(2)
    qkv.run(
        x * norm,
        sums_of_squares(x, length),
        EPS,
        weight,
        bias,
        rotary,
        scalar(start),
        length,
        q,
        k,
        v,
        space,
        config,
    )

    def apart(joint: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk, values = joint.view(length, -1, head_dim).split((heads + kv_heads, kv_heads), 1)
        queries, keys = reference.apply_rope(qk, *table.split(1, 1)).split((heads, kv_heads), 1)
        return queries, keys.transpose(0, 1), values.transpose(0, 1)

    turns = rotary[start : start + length]

    def apply(kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        normed = reference.rms_norm(x[:length].to(kind), norm.to(kind), EPS)
        joint = reference.linear(normed, weight.to(kind), None if bias is None else bias.to(kind))
        return apart(joint, turns.to(kind))

    normed = reference.rms_norm(x[:length].double(), norm.double(), EPS)
    sizes = apart(linear_magnitudes(normed, weight, bias), turns.double().abs())
    actual = (q[:length], k[:, start : start + length], v[:, start : start + length])
    for got, exact, same, size in zip(actual, apply(torch.float64), apply(dtype), sizes, strict=True):
        assert_near(got, exact, same, width=width, magnitudes=size)
    assert_untouched(q[length:])
    assert_untouched(cache[:, :start])
    assert_untouched(cache[:, start + length :])
    assert not space.counters.any()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": zeros(63, 64)}),
        ("sumsq", {"sumsq": zeros(1, 64, dtype=torch.bfloat16)}),
        ("weight", {"weight": zeros(65, 64)}),
        ("bias", {"bias": zeros(1)}),
        ("rotary", {"rotary": zeros(99, 2, 8)}),
        ("rotary", {"rotary": zeros(99, 4, 16)[:, :2]}),
        ("start", {"start": torch.zeros((), dtype=torch.int32, device=DEVICE)}),
        ("start", {"start": torch.zeros(1, dtype=torch.int64, device=DEVICE)}),
        ("length", {"length": 65}),
        ("q", {"q": zeros(64, 2, 32)[:, :, ::2]}),
        ("k_cache", {"k_cache": zeros(1, 99, 8)}),
        ("v_cache", {"v_cache": zeros(1, 98, 16)}),
        ("v_cache", {"v_cache": zeros(1, 99, 16, device="meta")}),
        ("workspace.counters", {"config": replace(CONFIG, splits=2)}),
    ],
)
def test_refuses(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "x": zeros(64, 64),
        "sumsq": zeros(1, 64),
        "eps": EPS,
        "weight": zeros(64, 64),
        "bias": None,
        "rotary": zeros(99, 2, 16),
        "start": scalar(0),
        "length": 4,
        "q": zeros(64, 2, 16),
        "k_cache": zeros(1, 99, 16),
        "v_cache": zeros(1, 99, 16),
        "workspace": replace(workspace(64, CONFIG), partials=zeros(1 << 16)),
        "config": CONFIG,
    }
    with pytest.raises(ValueError, match=f"^{argument} "):
        qkv.plan(**(arguments | change))  # type: ignore[arg-type]
