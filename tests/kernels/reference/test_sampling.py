"""Noise, filters and divergences: published vectors, float64 and brute force as oracles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.equality import assert_equal_tensors, assert_everywhere
from torch import Tensor

from pyramid_rt.kernels.reference import sampling as ops

SEED = torch.tensor([0xDEADBEEF, 0x01234567])


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of the Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = map(torch.tensor, counter)
    k0, k1 = map(torch.tensor, key)
    words = ops.philox_4x32_10((c0, c1, c2, c3), (k0, k1))
    assert tuple(int(word) for word in words) == expected


def test_words_are_those_of_the_documented_counter() -> None:
    positions = torch.tensor([0, 7, 130_000])
    words = ops.random_words(SEED, positions, ops.PURPOSE_RESIDUAL, 3, 11)
    for row, position in enumerate(positions.tolist()):
        for v in range(11):
            counter = (v // 4, position, ops.PURPOSE_RESIDUAL | 3 << 8, 0)
            c0, c1, c2, c3 = map(torch.tensor, counter)
            block = ops.philox_4x32_10((c0, c1, c2, c3), (SEED[0], SEED[1]))
            assert words[row, v] == block[v % 4]


def test_streams_are_disjoint() -> None:
    """No counter serves two of: own noise, acceptance and residual of each stage, at any position or index."""
    positions = torch.arange(40)
    streams = {
        (purpose, stage): ops.random_words(SEED, positions, purpose, stage, 64).flatten()
        for purpose in (ops.PURPOSE_OWN, ops.PURPOSE_ACCEPT, ops.PURPOSE_RESIDUAL)
        for stage in range(4)
    }
    words = torch.cat(list(streams.values()))
    # 30,720 words of 32 bits: about 0.11 equal pairs by chance; streams that overlapped would share thousands.
    assert words.numel() - words.unique().numel() < 5


def test_words_do_not_depend_on_how_many_are_asked_for() -> None:
    positions = torch.arange(5, 9)
    many = ops.random_words(SEED, positions, 0, 0, 103)
    assert_equal_tensors(ops.random_words(SEED, positions[2:3], 0, 0, 50), many[2:3, :50])


def test_noise_is_finite_at_both_ends_and_accurate() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    noise = ops.gumbel(words)
    assert_everywhere(noise.isfinite(), noise)
    u = np.minimum((words.numpy().astype(np.float32) + np.float32(0.5)) * np.float64(2.0**-32), 1 - 2.0**-24)
    expected = -np.log(-np.log1p(-u))
    np.testing.assert_allclose(noise.numpy(), expected, rtol=3e-7)


def test_noise_is_gumbel() -> None:
    noise = ops.own_noise(SEED, torch.arange(200), 1000).double().flatten()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.012)  # 4 standard errors
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def brute_force_filter(row: list[float], k: int, p: float, min_p: float) -> set[int]:
    """Indices that stand, by the definition."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    if k > 0:
        kth = row[order[min(k, len(row)) - 1]]
        order = [i for i in order if row[i] >= kth]
    weights = np.exp(np.array([row[i] for i in order], dtype=np.float64) - row[order[0]])
    weights /= weights.sum()
    kept, total = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if total >= p and p < 1:
            break
        kept.append(i)
        total += weight
    kept = [i for i, weight in zip(order, weights, strict=True) if i in kept and weight >= min_p * weights[0]]
    lowest = min(row[i] for i in kept)
    return {i for i in range(len(row)) if row[i] >= lowest}


@pytest.mark.parametrize("k", [0, 1, 5, 300])
@pytest.mark.parametrize("p", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_filters_against_brute_force(k: int, p: float, min_p: float) -> None:
    generator = torch.Generator().manual_seed(k + int(10 * p))
    logits = torch.randn(6, 97, generator=generator) * 2
    logits[1] = logits[1].round()  # ties
    logits[2, 10:] = -math.inf
    out = ops.filter_logits(logits, scalar(k, torch.int64), scalar(p), scalar(min_p))
    for row in range(6):
        stands = {i for i in range(97) if out[row, i] > -math.inf}
        expected = brute_force_filter(logits[row].tolist(), k, p, min_p)
        assert stands == {i for i in expected if logits[row, i] > -math.inf}
        kept = torch.tensor(sorted(stands))
        assert_equal_tensors(out[row, kept], logits[row, kept])


def test_temperature_zero_keeps_the_argmax_and_is_one_hot() -> None:
    logits = torch.tensor([[0.5, 2.0, 2.0, -1.0]])
    off = (scalar(0, torch.int64), scalar(1.0), scalar(0.0))
    assert_equal_tensors(ops.process_logits(logits, scalar(0.0), *off, filters=False), logits)
    assert ops.one_hot_logprobs(logits).tolist() == [[-math.inf, 0.0, -math.inf, -math.inf]]


@pytest.mark.parametrize("kind", ops.DIVERGENCES)
@pytest.mark.parametrize("vocab_size", [2, 50, 61, 257])
def test_divergences_against_float64(kind: str, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    p_logits, q_logits = (torch.randn(9, vocab_size, generator=generator) * 3 for _ in range(2))
    p, q = (np.exp(torch.log_softmax(x.double(), -1).numpy()) for x in (p_logits, q_logits))
    if kind.startswith("topk_"):
        top = np.argsort(-p, -1)[:, :50]
        p, q = (
            np.concatenate(
                [np.take_along_axis(x, top, -1), 1 - np.take_along_axis(x, top, -1).sum(-1, keepdims=True)],
                -1,
            )
            for x in (p, q)
        )
        p, q = p[:, :vocab_size], q[:, :vocab_size]  # a vocabulary of at most 50 has no tail: 0 log 0 = 0
    m = (p + q) / 2

    def kl(a: Any, b: Any) -> Any:
        return (a * np.log(a / b)).sum(-1)

    expected = {
        "js": (kl(p, m) + kl(q, m)) / 2,
        "js_fsd": (kl(m, p) + kl(m, q)) / 2,
        "kl": kl(q, p),
        "kl_reversed": kl(p, q),
        "tv": np.abs(p - q).sum(-1) / 2,
    }[kind.removeprefix("topk_")]
    np.testing.assert_allclose(
        ops.divergence(kind, p_logits, q_logits).numpy(), expected, rtol=2e-4, atol=2e-6
    )


def test_divergence_at_the_edges() -> None:
    inf = math.inf
    p, q = torch.tensor([[0.0, -inf, -inf]]), torch.tensor([[-inf, 0.0, -inf]])
    assert ops.divergence("js", p, q).item() == pytest.approx(math.log(2))
    assert ops.divergence("tv", p, q).item() == 1.0
    for kind in ("kl", "kl_reversed", "js_fsd"):
        assert ops.divergence(kind, p, q).item() == inf
    for kind in ops.DIVERGENCES:
        same = torch.tensor([[1.0, -inf, 3.0]])
        assert ops.divergence(kind, same, same).item() == 0.0
    skewed = (torch.tensor([[0.99, 0.01]]).log(), torch.tensor([[0.01, 0.99]]).log())
    assert ops.divergence("js", *skewed).item() == pytest.approx(0.637, abs=1e-3)
    assert ops.divergence("js_fsd", *skewed).item() == pytest.approx(1.61, abs=1e-2)


def test_residual_token() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    q = torch.tensor([[0.6, 0.1, 0.3]]).log()
    noise = ops.gumbel(ops.random_words(SEED, torch.arange(200), ops.PURPOSE_RESIDUAL, 0, 3))
    assert_everywhere(ops.residual_token(p.expand(200, 3), q.expand(200, 3), noise) == 1)
    same = ops.residual_token(p.expand(200, 3), p.expand(200, 3), noise)
    assert_equal_tensors(same, (p + noise).argmax(-1))
