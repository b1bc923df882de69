"""Tree compaction against its oracle: placement, untouched rows, every layer, the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors
from torch import Tensor

from pyramid_rt.kernels.forward import compact
from pyramid_rt.kernels.reference import forward as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scalar(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def random_path(count: int, ascending: bool) -> Tensor:
    """Window rows 0 .. 63 in any order; those from count on are out of range, for nobody may read them."""
    path = torch.randperm(64)[:count]
    path = path.sort().values if ascending else path
    return torch.cat((path, torch.full((64 - count,), 2**40))).to(DEVICE)


def expected(rows: Tensor, start: int, path: Tensor, count: int) -> Tensor:
    """The oracle; it takes no rows out of range."""
    result = rows.clone()
    reference.compact(result, scalar(start), torch.where(path < 64, path, 0), scalar(count))
    return result


def same(left: Tensor, right: Tensor) -> bool:
    """Bits, NaN included."""
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layers", "heads", "rows", "head_dim", "start", "count", "ascending"),
    [
        (1, 1, 64, 64, 0, 1, True),
        (3, 2, 100, 96, 36, 7, True),
        (2, 3, 131, 128, 5, 63, False),
        (2, 1, 90, 64, 11, 64, False),
        (2, 2, 70, 64, 6, 0, True),
    ],
)
def test_moves_exactly_the_path(
    dtype: torch.dtype,
    layers: int,
    heads: int,
    rows: int,
    head_dim: int,
    start: int,
    count: int,
    ascending: bool,
) -> None:
    torch.manual_seed(count)
    cache = torch.randn(layers, 2, heads, rows, head_dim, device=DEVICE).to(dtype)
    cache[..., :start, :] = float("nan")
    tokens = torch.randint(0, 2**40, (rows + 3,), device=DEVICE)
    path = random_path(count, ascending)
    want = expected(cache, start, path, count)
    want_tokens = expected(tokens.unsqueeze(1), start, path, count).squeeze(1)
    compact.run(cache, tokens, scalar(start), path, scalar(count))
    assert same(cache, want)
    assert_equal_tensors(tokens, want_tokens)


def test_oracle_on_a_path_written_out() -> None:
    rows = torch.arange(70).unsqueeze(1)
    path = torch.tensor([0, 2, 5] + [9] * 61)
    reference.compact(rows, torch.tensor(4), path, torch.tensor(3))
    assert rows[:12, 0].tolist() == [0, 1, 2, 3, 4, 6, 9, 7, 8, 9, 10, 11]


def test_strided_cache_and_no_tokens() -> None:
    storage = torch.randn(2, 2, 80, 3, 64, device=DEVICE)
    cache = storage.transpose(2, 3)
    path = random_path(9, ascending=True)
    want = expected(cache.contiguous(), 10, path, 9)
    compact.run(cache, None, scalar(10), path, scalar(9))
    assert_equal_tensors(cache, want)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("cache has shape", {"cache": torch.zeros(2, 1, 80, 64)}),
        ("cache is torch.float64", {"cache": torch.zeros(2, 2, 1, 80, 64, dtype=torch.float64)}),
        ("cache has strides", {"cache": torch.zeros(2, 2, 1, 64, 80).transpose(3, 4)}),
        ("cache has 63 rows", {"cache": torch.zeros(2, 2, 1, 63, 64)}),
        ("path has shape", {"path": torch.zeros(63, dtype=torch.int64)}),
        ("path is torch.int32", {"path": torch.zeros(64, dtype=torch.int32)}),
        ("start has shape", {"start": torch.zeros(2, dtype=torch.int64)}),
        ("count is torch.float32", {"count": torch.tensor(1.0)}),
        ("tokens has shape", {"tokens": torch.zeros(2, 70, dtype=torch.int64)}),
        ("tokens is on meta", {"tokens": torch.zeros(70, dtype=torch.int64, device="meta")}),
    ],
)
def test_refuses_by_name(message: str, change: dict[str, Tensor]) -> None:
    arguments: dict[str, Any] = {
        "cache": torch.zeros(2, 2, 1, 80, 64),
        "tokens": torch.zeros(80, dtype=torch.int64),
        "start": torch.tensor(0),
        "path": torch.zeros(64, dtype=torch.int64),
        "count": torch.tensor(0),
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        compact.plan(**(arguments | change))
