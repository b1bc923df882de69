"""kernels/forward/embed.py against the reference, in Triton's interpreter or on the GPU."""

from __future__ import annotations

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.oracle import DEVICE, DTYPES, LENGTHS, assert_untouched, poisoned, random, sums_of_squares, zeros

from pyramid_rt.kernels.forward import embed
from pyramid_rt.kernels.reference import forward as reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [64, 72, 200])
def test_matches_reference(dtype: torch.dtype, length: int, width: int) -> None:
    table = random(37, width, dtype=dtype)
    tokens = torch.full((64,), 10**9, device=DEVICE)
    tokens[:length] = (torch.arange(length, device=DEVICE) * 7) % 37
    out, sumsq = poisoned(64, width, dtype=dtype), poisoned(-(-width // 64), 64, dtype=torch.float32)
    norm, scaled = random(width, dtype=dtype, seed=1), poisoned(64, width, dtype=dtype)
    embed.run(table, tokens, norm, length, out, scaled, sumsq)
    assert_equal_tensors(out[:length], reference.embedding(table, tokens[:length]))
    assert_untouched(out[length:])
    assert_equal_tensors(scaled[:length], out[:length] * norm)
    assert_untouched(scaled[length:])
    torch.testing.assert_close(sumsq[:, :length], sums_of_squares(out, length)[:, :length], rtol=1e-6, atol=0)
    assert_untouched(sumsq[:, length:])


def test_strided_rows_and_a_longer_token_buffer() -> None:
    table, out = random(9, 160, dtype=torch.float32)[:, :80], poisoned(64, 96, dtype=torch.float32)[:, :80]
    tokens = torch.arange(100, device=DEVICE) % 9
    norm, scaled = torch.ones(80, device=DEVICE), zeros(64, 96)[:, :80]
    embed.run(table, tokens[3:], norm, 5, out, scaled, zeros(2, 64))
    assert_equal_tensors(out[:5], table[3:8])


def test_a_window_begins_where_the_device_says() -> None:
    table, out = random(9, 80, dtype=torch.float32), poisoned(64, 80, dtype=torch.float32)
    tokens = (torch.arange(100, device=DEVICE) * 5) % 9
    start = torch.tensor(61, device=DEVICE)
    norm = torch.ones(80, device=DEVICE)
    embed.run(table, tokens, norm, 17, out, zeros(64, 80), zeros(2, 64), start)
    assert_equal_tensors(out[:17], table[tokens[61:78]])
    assert_untouched(out[17:])


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("table", {"table": zeros(9, 64, dtype=torch.float64)}),
        ("table", {"table": zeros(64, 9).T}),
        ("tokens", {"tokens": torch.zeros(64, dtype=torch.int32, device=DEVICE)}),
        ("tokens", {"tokens": torch.zeros(3, dtype=torch.int64, device=DEVICE)}),
        ("tokens", {"tokens": torch.zeros(64, dtype=torch.int64, device="meta")}),
        ("norm", {"norm": zeros(65)}),
        ("length", {"length": 65}),
        ("out", {"out": zeros(64, 65)}),
        ("out", {"out": zeros(64, 64, dtype=torch.float16)}),
        ("scaled", {"scaled": zeros(64, 96)[:, :64]}),
        ("sumsq", {"sumsq": zeros(2, 64)}),
        ("start", {"start": torch.zeros(1, dtype=torch.int64, device=DEVICE)}),
    ],
)
def test_refuses(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "table": zeros(9, 64),
        "tokens": torch.zeros(64, dtype=torch.int64, device=DEVICE),
        "norm": zeros(64),
        "length": 4,
        "out": zeros(64, 64),
        "scaled": zeros(64, 64),
        "sumsq": zeros(1, 64),
    }
    with pytest.raises(ValueError, match=f"^{argument} "):
        embed.plan(**(arguments | change))  # type: ignore[arg-type]
