"""kernels/noise.py: the words are those of the reference, bit for bit, in every stream."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers.equality import assert_equal_tensors
from helpers.oracle import DEVICE, zeros

from pyramid_rt.kernels import noise
from pyramid_rt.kernels.reference import sampling as ops

SEED = 0xFEDC_BA98_7654_3210


@triton.jit
def words_kernel(
    seed_ptr: tl.tensor,
    index_ptr: tl.tensor,
    position: tl.tensor,
    stream: tl.tensor,
    words_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    gumbel_ptr: tl.tensor,
) -> None:
    at = tl.arange(0, 64)
    words = noise.consecutive_words(seed_ptr, 64, position, stream, 64)
    index = tl.load(index_ptr + at)
    chosen = noise.chosen_words(seed_ptr, index, position, stream)
    tl.store(words_ptr + at, words.to(tl.int64))
    tl.store(chosen_ptr + at, chosen.to(tl.int64))
    tl.store(uniform_ptr + at, noise.uniform(chosen))
    tl.store(gumbel_ptr + at, noise.gumbel_at(seed_ptr, index, position, stream))


@pytest.mark.parametrize("position", [3, 131071])
@pytest.mark.parametrize(
    ("purpose", "stage"), [(ops.PURPOSE_OWN, 0), (ops.PURPOSE_ACCEPT, 2), (ops.PURPOSE_RESIDUAL, 1)]
)
def test_words(purpose: int, stage: int, position: int) -> None:
    seed = torch.tensor([SEED & 0xFFFFFFFF, SEED >> 32], device=DEVICE)
    index = torch.randperm(128256, generator=torch.Generator().manual_seed(1))[:64].to(DEVICE, torch.int32)
    words, chosen = (torch.zeros(64, dtype=torch.int64, device=DEVICE) for _ in range(2))
    uniform, gumbel = zeros(64), zeros(64)
    words_kernel[(1,)](
        seed, index, position, purpose | stage << 8, words, chosen, uniform, gumbel, enable_fp_fusion=False
    )
    expected = ops.random_words(seed, torch.tensor([position], device=DEVICE), purpose, stage, 128256)[0]
    assert_equal_tensors(words, expected[64:128])
    assert_equal_tensors(chosen, expected[index.long()])
    assert_equal_tensors(uniform, ops.uniform(chosen))
    exact = -torch.log(-torch.log1p(-uniform.double()))
    error = (gumbel.double() - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) <= 2 * torch.finfo(torch.float32).eps
