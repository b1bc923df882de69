"""The `torch` backend on a CPU: a row's bits do not depend on the window it stands in, and are the right ones."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.equality import assert_equal_tensors, assert_everywhere
from helpers.llamas import SHAPES, load, run, run_windows, save_models, tokens_for
from torch import Tensor

from pyramid_rt.decoding.place.threads import intra_op_threads
from pyramid_rt.kernels.reference import forward as reference
from pyramid_rt.models.backends import cpu, row_check
from pyramid_rt.models.backends.choice import make_backend
from pyramid_rt.models.backends.cpu import KEYS, CpuBackend, Scratch, attend, keeps_rows, rms_norm, silu_mul
from pyramid_rt.models.backends.torch import TorchBackend
from pyramid_rt.models.llama import KVCache

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
# Query heads, key heads, size of a head.
HEADS = [(3, 3, 18), (6, 2, 36), (9, 3, 64), (5, 1, 80), (14, 2, 128)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with intra_op_threads(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    if not keeps_rows(CPU, kind):
        pytest.skip("this processor or this torch runs another backend")
    return kind


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_for(length: int, end: int, bound: int) -> Tensor:
    """Of the window of so many rows whose last one sees the cache rows below `end`."""
    return reference.causal_mask(torch.arange(end - length, end), bound, 1, torch.float32).unsqueeze(1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_attention_gives_a_row_one_result(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Alone, among others, at any place, and however many hidden rows are looked at besides."""
    keys, values = (normal(kv_heads, 1300, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    q, end, scratch = normal(40, heads, head_dim, dtype=dtype), 250, Scratch()
    expected = attend(q, keys, values, mask_for(40, end, KEYS), scratch)
    for bound in (KEYS, 2 * KEYS, 5 * KEYS, 1300):
        mask = mask_for(40, end, bound)
        for width in (1, 2, 3, 5, 8, 13, 16, 33):
            for begin in (0, 1, 7, 40 - width):
                rows = slice(begin, begin + width)
                found = attend(q[rows], keys, values, mask[rows], scratch)
                assert_equal_tensors(found, expected[rows])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_attention_is_exact_to_rounding(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    keys, values = (normal(kv_heads, 600, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    q, mask = normal(40, heads, head_dim, dtype=dtype), mask_for(40, 500, 512)
    found = attend(q, keys, values, mask, Scratch()).double()
    group = heads // kv_heads
    k, v = (part[:, :512].double().repeat_interleave(group, 0) for part in (keys, values))
    scores = torch.einsum("thd,hsd->ths", q.double(), k) * head_dim**-0.5 + mask
    exact = torch.einsum("ths,hsd->thd", scores.softmax(-1), v).flatten(1)
    # Scores, weights and the result are rounded to dtype once each; a score's error multiplies its weight. In float32
    # the sums over keys and over a head's entries count as well.
    unit = torch.finfo(dtype).eps
    error = (found - exact).abs()
    most, usual = (3, 0.08) if dtype == torch.bfloat16 else (16, 0.6)
    assert_everywhere(error <= most * unit * (exact.abs() + 0.2), error)
    assert float(error.square().mean().sqrt()) < usual * unit


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_of_any_lengths_give_the_same_bits(
    directories: dict[str, Path], shape: str, dtype: torch.dtype
) -> None:
    """Logits and caches, across the step of the bound, whether a text comes in one piece or token by token."""
    model, cache = load(directories[shape], dtype)
    assert isinstance(model.backend, CpuBackend)
    tokens = tokens_for(model, 275)
    expected = run_windows(model, cache, tokens, [275])
    for lengths in ([*[1] * 20, 220, *[1] * 35], [3, 1, 64, 2, 5, 100, 16, 33, 9, 7, 13, 4, 8, 6, 3, 1]):
        other = KVCache.allocate(model.config, 512, dtype, CPU)
        assert_equal_tensors(run_windows(model, other, tokens, lengths), expected)
        assert_equal_tensors(other.buffer, cache.buffer)


def test_the_bound_changes_no_bit(directories: dict[str, Path], dtype: torch.dtype) -> None:
    model, cache = load(directories["gqa3"], dtype)
    tokens = tokens_for(model, 40)
    expected = run(model, cache, tokens)
    for bound in (41, KEYS + 1, 512, 576):
        assert_equal_tensors(run(model, cache, tokens[30:], 30, bound), expected[30:])


def test_windows_longer_than_a_tile(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ("gqa1", "gqa4"):
        model, cache = load(directories[shape])
        tokens = tokens_for(model, 70)
        expected = run(model, cache, tokens)
        monkeypatch.setattr(cpu, "TILE_KEYS", 3 * KEYS)  # three rows each, and one in the end
        assert_equal_tensors(run(model, cache, tokens), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("inner", [77, 1531, 8200, 40000])
def test_silu_is_computed_row_by_row(inner: int, dtype: torch.dtype) -> None:
    both = normal(64, 2 * inner, dtype=dtype)
    expected = silu_mul(both)
    for width in (2, 3, 5, 17):
        for begin in (0, 1, 64 - width):
            assert_equal_tensors(silu_mul(both[begin : begin + width]), expected[begin : begin + width])
    torch.testing.assert_close(expected, reference.silu_mul(both), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [72, 577, 4099])
def test_norms_are_computed_row_by_row(size: int, dtype: torch.dtype) -> None:
    x, weight = normal(70, size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    expected = rms_norm(x, weight, 1e-5)
    for width in (1, 2, 3, 5, 16, 33):
        for begin in (0, 1, 70 - width):
            part = x[begin : begin + width]
            assert_equal_tensors(rms_norm(part, weight, 1e-5), expected[begin : begin + width])
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(expected.double(), exact, rtol=4 * unit, atol=0)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch, directories: dict[str, Path]) -> None:
    model, _ = load(directories["gqa1"], torch.float16)
    assert type(model.backend) is TorchBackend
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert type(make_backend("torch", model.config, CPU, dtype=torch.float32, max_seq=8)) is TorchBackend


def test_the_trial_holds_here(dtype: torch.dtype) -> None:
    assert row_check.keeps_bits(dtype)


def test_the_trial_notices_rounding_by_the_width(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(row_check, "CpuBackend", TorchBackend)
    row_check._tried.cache_clear()
    try:
        assert not row_check.keeps_bits(dtype)
    finally:
        row_check._tried.cache_clear()
    assert not row_check.keeps_bits(torch.float16)
