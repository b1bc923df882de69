"""Kinds of matrices: their products, what they say of themselves, and that another kind can be put in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.equality import assert_equal_tensors, assert_everywhere
from helpers.llamas import load, run_windows, save_models, tokens_for
from torch import Tensor

from pyramid_rt.decoding.place.threads import intra_op_threads
from pyramid_rt.models import llama
from pyramid_rt.models.llama import KVCache, with_matrices
from pyramid_rt.models.matrix import Dense, Matrix, Packed, can_pack

CPU = torch.device("cpu")
Kind = Callable[[Tensor], Matrix]
KINDS: list[tuple[Kind, torch.dtype]] = [
    *((Dense, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((Packed.of, dtype) for dtype in (torch.float32, torch.bfloat16)),
]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 9, 17])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(kind: Kind, dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    if kind == Packed.of and not can_pack(CPU, dtype):
        pytest.skip("torch was built without oneDNN")
    x, weight = normal(rows, 97, dtype=dtype), normal(53, 97, dtype=dtype, seed=1)
    bias = normal(53, dtype=dtype, seed=2) if with_bias else None
    before = [t.clone() for t in (x, weight)]
    matrix: Matrix = kind(weight)
    out = matrix.multiply(x, bias)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    # Rounding of the result (and once more where the bias is added after), and of float32 partial sums.
    sums = x.double().abs() @ weight.double().abs().t()
    half = torch.finfo(dtype).eps / 2
    bound = 2 * half * (exact.abs() + 4) + 97 * torch.finfo(torch.float32).eps / 2 * sums
    error = (out.double() - exact).abs()
    assert_everywhere(error <= bound, error, about=float((error / bound).max()))
    assert out.dtype == dtype
    assert out.is_contiguous()
    for was, now in zip(before, (x, weight), strict=True):
        torch.testing.assert_close(was, now, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_matrix_says_how_large_it_is(kind: Kind, dtype: torch.dtype) -> None:
    if kind == Packed.of and not can_pack(CPU, dtype):
        pytest.skip("torch was built without oneDNN")
    matrix: Matrix = kind(normal(5, 7, dtype=dtype))
    assert (matrix.rows, matrix.columns, matrix.nbytes, matrix.device) == (5, 7, 35 * dtype.itemsize, CPU)


def test_no_kernel_reads_a_packed_matrix() -> None:
    if not can_pack(CPU, torch.float32):
        pytest.skip("torch was built without oneDNN")
    with pytest.raises(TypeError, match="no kernel reads a oneDNN-packed matrix"):
        _ = Packed.of(normal(5, 7, dtype=torch.float32)).operand
    weight = normal(5, 7, dtype=torch.float32)
    assert Dense(weight).operand is weight


def test_what_is_packed() -> None:
    able = torch.backends.mkldnn.is_available()
    assert can_pack(CPU, torch.float32) == able
    assert can_pack(CPU, torch.bfloat16) == (able and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(53, 97), (72, 576), (576, 1536), (33, 4001), (1, 2048)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_packed_product_has_one_result(
    dtype: torch.dtype, rows: int, columns: int, threads: int
) -> None:
    """At every number of rows and every place; among so many there are always two that are given as one."""
    if not can_pack(CPU, dtype):
        pytest.skip("torch or this processor cannot pack this type")
    x, bias = normal(72, columns, dtype=dtype), normal(rows, dtype=dtype, seed=2)
    matrix = Packed.of(normal(rows, columns, dtype=dtype, seed=1))
    with intra_op_threads(threads):
        expected = matrix.multiply(x, bias)
        for width in (*range(1, 18), 31, 48, 64):
            for begin in (0, 1, 5, 72 - width):
                part = matrix.multiply(x[begin : begin + width], bias)
                assert_equal_tensors(part, expected[begin : begin + width])


@dataclass(frozen=True)
class Rounded:
    """A kind of this test's own: eight bits and a scale per row, and a count of its uses."""

    entries: Tensor
    scales: Tensor
    uses: Counter[tuple[int, int]]

    @classmethod
    def of(cls, matrix: Matrix, uses: Counter[tuple[int, int]]) -> Rounded:
        weight = matrix.operand.float()
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales, uses)

    @property
    def rows(self) -> int:
        return self.entries.shape[0]

    @property
    def columns(self) -> int:
        return self.entries.shape[1]

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.entries.device

    @property
    def operand(self) -> Tensor:
        raise TypeError("no kernel reads it")

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.uses[(self.rows, self.columns)] += 1
        out = (x.float() @ self.entries.float().t()) * self.scales.t()
        return (out if bias is None else out + bias).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_kind_of_matrix_decodes(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "can_pack", lambda device, dtype: False)  # whose entries nobody else can read
    model, cache = load(save_models(tmp_path)["gqa3"], dtype)
    uses: Counter[tuple[int, int]] = Counter()
    other = with_matrices(model, lambda matrix: Rounded.of(matrix, uses))
    tokens = tokens_for(model, 20)
    expected = run_windows(model, cache, tokens, [17, 1, 2])
    logits = run_windows(other, KVCache.allocate(model.config, 512, dtype, CPU), tokens, [17, 1, 2])
    # Every matrix once a pass and layer; nothing else looks at how they are held.
    layer = model.layers[0]
    shapes = Counter((m.rows, m.columns) for m in (layer.qkv, layer.out, layer.gate_up, layer.down))
    expected_uses = Counter({shape: 3 * len(model.layers) * count for shape, count in shapes.items()})
    expected_uses[(model.head.rows, model.head.columns)] += 3
    assert uses == expected_uses
    assert [
        matrix
        for matrix in (other.head, other.layers[0].qkv)
        if not (matrix.nbytes < 2 * matrix.rows * matrix.columns)
    ] == []
    # Eight bits a weight are near, and not the same.
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < float(error) < 0.2
