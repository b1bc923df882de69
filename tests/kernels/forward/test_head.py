"""kernels/forward/head.py against the reference, in Triton's interpreter or on the GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from helpers.equality import assert_equal_tensors, assert_everywhere
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
    zeros,
)
from torch import Tensor

from pyramid_rt.kernels.forward import head
from pyramid_rt.kernels.noise import gumbel, philox_words
from pyramid_rt.kernels.reference import forward as reference
from pyramid_rt.kernels.reference import sampling as sampling_reference

EPS = 1e-5
SEED = 0xFEDC_BA98_7654_3210


def seed_words() -> Tensor:
    return torch.tensor([SEED & 0xFFFFFFFF, SEED >> 32], device=DEVICE)


def noise(positions: Tensor, temperature: float) -> head.Noise:
    return head.Noise(seed_words(), positions, torch.tensor(temperature, device=DEVICE))


def statistics(tiles: int) -> head.TileStatistics:
    peak, total, best = (poisoned(64, tiles, dtype=torch.float32) for _ in range(3))
    return head.TileStatistics(
        peak, total, best, torch.full((64, tiles), -7, dtype=torch.int32, device=DEVICE)
    )


def check_statistics(found: head.TileStatistics, logits: Tensor, scores: Tensor, block: int) -> None:
    """Against the kernel's own logits: exact but for the sums and the noise."""
    count = logits.shape[0]
    for tile in range(found.peak.shape[1]):
        part, score = (t[:, tile * block : (tile + 1) * block] for t in (logits, scores))
        peak = part.amax(-1)
        assert_equal_tensors(found.peak[:count, tile], peak)
        shift = torch.where(peak.isinf(), 0.0, peak)
        total = (part - shift.unsqueeze(1)).double().exp().sum(-1)
        torch.testing.assert_close(found.total[:count, tile].double(), total, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.best[:count, tile], score.amax(-1), rtol=1e-6, atol=1e-6)
        assert found.token[:count, tile].tolist() == (score.argmax(-1) + tile * block).tolist()
    for buffer in (found.peak, found.total, found.best):
        assert_untouched(buffer[count:])
    assert_everywhere(found.token[count:] == -7, found.token[count:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize(
    ("vocab", "padded", "temperature", "sub_tiles"),
    [(101, 104, None, 4), (128, 128, 0.7, 4), (59, 132, 1.0, 1), (70, 72, 0.0, 4)],
)
def test_matches_reference(
    dtype: torch.dtype, count: int, vocab: int, padded: int, temperature: float | None, sub_tiles: int
) -> None:
    width, config = 40, replace(CONFIG, sub_tiles=sub_tiles)
    # Rows in any order, some of them twice; the rows between them are poison.
    rows = (torch.arange(count, device=DEVICE) * 5 + 3) % 64
    if count > 2:
        rows[1] = rows[0]
    x = poisoned(64, width, dtype=dtype)
    x[rows] = random(count, width, dtype=dtype)
    norm, weight = random(width, dtype=dtype, seed=1), random(padded, width, dtype=dtype, scale=0.3, seed=2)
    positions = torch.arange(count, device=DEVICE) + (1 << 20)
    out = poisoned(64, padded, dtype=torch.float32)
    found = statistics(-(-padded // config.block_n))
    drawn = None if temperature is None else noise(positions, temperature)
    head.run(x * norm, sums_of_squares(x, 64), EPS, weight, rows, vocab, out, found, drawn, config)

    def apply(kind: torch.dtype) -> Tensor:
        return torch.nn.functional.linear(
            reference.rms_norm(x[rows].to(kind), norm.to(kind), EPS), weight[:vocab].to(kind)
        )

    assert_equal_tensors(out[:count, :vocab], out[:count, :vocab].to(dtype).float())
    normed = reference.rms_norm(x[rows].double(), norm.double(), EPS)
    magnitudes = linear_magnitudes(normed, weight[:vocab])
    exact, same = apply(torch.float64), apply(dtype)
    assert_near(out[:count, :vocab].to(dtype), exact, same, width=width, magnitudes=magnitudes)
    assert_everywhere(out[:count, vocab:] == -math.inf, out[:count, vocab:])
    assert_untouched(out[count:])
    scores = out[:count]
    if temperature:
        scores = scores / temperature + sampling_reference.own_noise(seed_words(), positions, padded)
    check_statistics(found, out[:count], scores, config.block_n)


@pytest.mark.parametrize(
    ("count", "start", "decided", "first"), [(1, 70, 71, 71), (5, 64, 70, 68), (40, 9, 30, 28)]
)
def test_placed_rows_are_the_listed_ones_somewhere_else(
    count: int, start: int, decided: int, first: int
) -> None:
    width, vocab, padded = 40, 101, 104
    x, norm = random(64, width, dtype=torch.float32), random(width, dtype=torch.float32, seed=1)
    weight = random(padded, width, dtype=torch.float32, seed=2)
    # Past the window the last row stands in, as for a proposal that is shorter than its buffer.
    rows = (torch.arange(count, device=DEVICE) + decided - 1 - start).clamp(max=63)
    positions = torch.arange(count, device=DEVICE) + decided
    expected, listed = poisoned(64, padded, dtype=torch.float32), statistics(2)
    sums = sums_of_squares(x, 64)
    head.run(x * norm, sums, EPS, weight, rows, vocab, expected, listed, noise(positions, 0.9), CONFIG)

    capacity = 38
    out, found = poisoned(capacity, padded, dtype=torch.float32), statistics(2)
    found = head.TileStatistics(
        *(getattr(found, name)[:capacity].clone() for name in ("peak", "total", "best", "token"))
    )
    at, decides, begins = (torch.tensor(value, device=DEVICE) for value in (start, decided, first))
    place = head.Placement(at, decides, begins, count)
    drawn = head.Noise(seed_words(), None, torch.tensor(0.9, device=DEVICE))
    head.run(x * norm, sums, EPS, weight, place, vocab, out, found, drawn, CONFIG)
    begin = decided - first
    kept = min(count, capacity - begin)
    assert_equal_tensors(out[begin : begin + kept], expected[:kept])
    assert_untouched(out[:begin])
    assert_untouched(out[begin + kept :])
    for name in ("peak", "total", "best", "token"):
        ours, theirs = getattr(found, name), getattr(listed, name)
        assert_equal_tensors(ours[begin : begin + kept], theirs[:kept])
        rest = torch.cat((ours[:begin], ours[begin + kept :]))
        assert bool((rest == -7).all() if name == "token" else rest.isnan().all())


def test_rows_that_belong_before_the_first_are_dropped() -> None:
    x, weight = random(64, 64, dtype=torch.float32), random(64, 64, dtype=torch.float32)
    out, found = poisoned(64, 64, dtype=torch.float32), statistics(1)
    start, decided, first = (torch.tensor(value, device=DEVICE) for value in (0, 5, 8))
    place = head.Placement(start, decided, first, 2)
    head.run(x * weight[0], sums_of_squares(x, 64), EPS, weight, place, 64, out, found, None, CONFIG)
    assert_untouched(out)
    assert_untouched(found.peak)


def test_ties_go_to_the_lowest_index() -> None:
    weight = torch.ones(64, 64, device=DEVICE)
    found, out = statistics(1), poisoned(64, 64, dtype=torch.float32)
    x, rows = torch.ones(64, 64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    head.run(x, sums_of_squares(x, 1), EPS, weight, rows, 64, out, found, None, CONFIG)
    assert found.token[0, 0] == 0


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_shows_in_the_sum(bad: float) -> None:
    weight = torch.ones(128, 64, device=DEVICE)
    weight[70] = bad
    found, out = statistics(2), poisoned(64, 128, dtype=torch.float32)
    x, rows = torch.ones(64, 64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    head.run(x, sums_of_squares(x, 1), EPS, weight, rows, 128, out, found, None, CONFIG)
    assert found.total[0].isnan().tolist() == [False, True]


@triton.jit
def words_kernel(seed_ptr: tl.tensor, position: tl.tensor, words_ptr: tl.tensor) -> None:
    block = tl.arange(0, 64)
    at = tl.zeros((64,), tl.uint32) + position.to(tl.uint32)
    key0, key1 = tl.load(seed_ptr).to(tl.uint32), tl.load(seed_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(key0, key1, block.to(tl.uint32), at, at ^ at)
    tl.store(words_ptr + block * 4, w0.to(tl.int64))
    tl.store(words_ptr + block * 4 + 1, w1.to(tl.int64))
    tl.store(words_ptr + block * 4 + 2, w2.to(tl.int64))
    tl.store(words_ptr + block * 4 + 3, w3.to(tl.int64))


@triton.jit
def gumbel_kernel(words_ptr: tl.tensor, out_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, gumbel(tl.load(words_ptr + at).to(tl.uint32)))


@pytest.mark.parametrize("position", [2, 131071])
def test_words_are_those_of_the_reference(position: int) -> None:
    words = torch.zeros(256, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](seed_words(), position, words, enable_fp_fusion=False)
    positions = torch.tensor([position], device=DEVICE)
    expected = sampling_reference.random_words(
        seed_words(), positions, sampling_reference.PURPOSE_OWN, 0, 256
    )
    assert_equal_tensors(words, expected[0])


def test_gumbel_noise_at_both_ends() -> None:
    edges = [0, 1, 2, 255, 1 << 20, 1 << 30, (1 << 32) - 1, (1 << 32) - 129, (1 << 32) - 1000, 0xA0000000]
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 1 << 32, (8192,), generator=generator)
    words[: len(edges)] = torch.tensor(edges)
    words = words.to(DEVICE)
    drawn = zeros(8192)
    gumbel_kernel[(1,)](words, drawn, 8192, enable_fp_fusion=False)
    exact = -torch.log(-torch.log1p(-sampling_reference.uniform(words).double()))
    # An error of the inner logarithm of one ulp moves g by one ulp of 1, however small g is.
    error = (drawn.double() - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": zeros(64, 63)}),
        ("sumsq", {"sumsq": zeros(2, 64)}),
        ("weight", {"weight": zeros(100, 64, dtype=torch.int32)}),
        ("rows", {"rows": torch.zeros(3, dtype=torch.int32, device=DEVICE)}),
        ("rows", {"rows": torch.zeros(65, dtype=torch.int64, device=DEVICE)}),
        ("vocab_size", {"vocab_size": 101}),
        ("vocab_size", {"vocab_size": 0}),
        ("out", {"out": zeros(64, 96)}),
        ("out", {"out": zeros(64, 101)}),
        ("out", {"out": zeros(64, 100, dtype=torch.bfloat16)}),
        ("statistics.peak", {"statistics": head.TileStatistics.allocate(3, DEVICE)}),
        ("noise.positions", {"noise": noise(torch.zeros(2, dtype=torch.int64, device=DEVICE), 1.0)}),
        ("config.splits", {"config": replace(CONFIG, splits=2)}),
    ],
)
def test_refuses(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "x": zeros(64, 64),
        "sumsq": zeros(1, 64),
        "eps": EPS,
        "weight": zeros(100, 64),
        "rows": torch.zeros(3, dtype=torch.int64, device=DEVICE),
        "vocab_size": 100,
        "out": zeros(64, 100),
        "statistics": head.TileStatistics.allocate(2, DEVICE),
        "noise": None,
        "config": CONFIG,
    }
    with pytest.raises(ValueError, match=f"^{argument} "):
        head.plan(**(arguments | change))  # type: ignore[arg-type]
