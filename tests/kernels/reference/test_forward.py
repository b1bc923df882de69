"""The reference ops against float64 formulas written out here, and against transformers' rounding."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.equality import assert_equal_tensors, assert_everywhere
from torch import Tensor

from pyramid_rt.kernels.reference import forward as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_close(actual: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """|actual - exact| <= bound everywhere, and its RMS well inside: a bound on the maximum alone hides bias."""
    error = (actual.double() - exact).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64)
    assert_everywhere(error <= limit, error, about=float((error / limit).max()))
    assert error.square().mean().sqrt() <= 0.5 * limit.square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 9, 17])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    x, weight = normal(rows, 97, dtype=dtype), normal(53, 97, dtype=dtype, seed=1)
    bias = normal(53, dtype=dtype, seed=2) if with_bias else None
    before = [t.clone() for t in (x, weight)]
    out = reference.linear(x, weight, bias)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    # Rounding of the result (and once more where the bias is added after), and of float32 partial sums.
    sums = x.double().abs() @ weight.double().abs().t()
    bound = 2 * unit_roundoff(dtype) * (exact.abs() + 4) + 97 * unit_roundoff(torch.float32) * sums
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, exact, bound)
    for a, b in zip(before, (x, weight), strict=True):
        assert_equal_tensors(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_as_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = 3 * normal(5, 97, dtype=dtype), normal(97, dtype=dtype, seed=1)
    oracle = LlamaRMSNorm(97, 1e-3)
    oracle.weight.data = weight
    out = reference.rms_norm(x, weight, 1e-3)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert out.dtype == dtype
    assert_close(out, exact, 3 * unit_roundoff(dtype) * exact.abs() + 1e-12)
    if dtype != torch.float32:
        # Two roundings at the same places; a float32 sum in another order does not reach these bits.
        assert_equal_tensors(out, oracle(x).detach())


def float64_angles(kind: str, positions: Tensor, head_dim: int, entries: dict[str, float]) -> Tensor:
    """[rows, D / 2] float64, from the published formulas, a position at a time."""
    theta, factor = entries["theta"], entries.get("factor", 1.0)
    context = entries.get("original_context", 0)
    rows = []
    for position in positions.tolist():
        base = theta
        if kind == "dynamic" and position + 1 > context:
            growth = factor * (position + 1) / context - (factor - 1)
            base = theta * growth ** (head_dim / (head_dim - 2))
        row = []
        for i in range(head_dim // 2):
            frequency = base ** (-2 * i / head_dim)
            if kind == "linear":
                frequency /= factor
            if kind == "llama3":
                low, high = entries["low_freq_factor"], entries["high_freq_factor"]
                wavelength = 2 * math.pi / frequency
                if wavelength > context / low:
                    frequency /= factor
                elif wavelength >= context / high:
                    smooth = (context / wavelength - low) / (high - low)
                    frequency = (1 - smooth) * frequency / factor + smooth * frequency
            row.append(position * frequency)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


ROPES: list[tuple[str, dict[str, float]]] = [
    ("default", {"theta": 10000.0}),
    ("linear", {"theta": 10000.0, "factor": 4.0}),
    ("dynamic", {"theta": 10000.0, "factor": 3.0, "original_context": 64}),
    (
        "llama3",
        {
            "theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_context": 256,
        },
    ),
]


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("kind", "entries"), ROPES)
def test_rotary_table_against_float64(kind: str, entries: dict[str, float], head_dim: int) -> None:
    table = reference.rotary_table(kind, 3000, head_dim, **entries)  # type: ignore[arg-type]
    positions = torch.tensor([0, 1, 2, 62, 63, 64, 65, 127, 500, 1999, 2999])
    angles = float64_angles(kind, positions, head_dim, entries)
    cos, sin = table[positions].double().unbind(1)
    # A float32 angle of size a is off by a few a * 2^-24, and its cosine by as much.
    bound = 6 * unit_roundoff(torch.float32) * (angles.abs() + 1)
    assert table.shape == (3000, 2, head_dim)
    assert table.dtype == torch.float32
    for half in (slice(0, head_dim // 2), slice(head_dim // 2, None)):
        assert_close(cos[:, half], angles.cos(), bound)
    assert_close(sin[:, : head_dim // 2], -angles.sin(), bound)
    assert_close(sin[:, head_dim // 2 :], angles.sin(), bound)


@pytest.mark.parametrize(("kind", "entries"), [rope for rope in ROPES if rope[0] != "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_table_and_rotation_equal_transformers(
    kind: str, entries: dict[str, float], dtype: torch.dtype
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    renamed = {"theta": "rope_theta", "original_context": "original_max_position_embeddings"}
    parameters = {"rope_type": kind, **{renamed.get(key, key): value for key, value in entries.items()}}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=parameters
    )
    positions = torch.arange(1500, 1507)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])
    table = reference.rotary_table(kind, 2048, 64, **entries, dtype=dtype)  # type: ignore[arg-type]
    rotary = table[positions]
    torch.testing.assert_close(rotary[:, 0], cos[0], rtol=0, atol=2e-7)
    torch.testing.assert_close(rotary[:, 1, 32:], sin[0, :, 32:], rtol=0, atol=2e-7)
    x = normal(7, 3, 64, dtype=dtype)
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    out = reference.apply_rope(x, *rotary.split(1, 1))
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, expected[0].transpose(0, 1), rtol=4 * unit_roundoff(dtype), atol=8 * unit_roundoff(dtype)
    )


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    table = reference.rotary_table("default", 64, 32, theta=10000.0)
    q, k = normal(1, 1, 32), normal(1, 1, 32, seed=1)

    def at(x: Tensor, position: int) -> Tensor:
        return reference.apply_rope(x, *table[position : position + 1].split(1, 1))

    def score(i: int, j: int) -> float:
        return float((at(q, i) * at(k, j)).sum())

    assert score(40, 33) == pytest.approx(score(9, 2), abs=1e-4)
    assert score(40, 33) != pytest.approx(score(33, 40), abs=1e-2)
    rotated = at(q, 50)
    assert float(rotated.norm()) == pytest.approx(float(q.norm()), rel=1e-6)


def test_write_cache_touches_its_rows_alone() -> None:
    cache = torch.full((2, 10, 4), float("nan"))
    values = normal(3, 2, 4)
    reference.write_cache(cache, values, torch.tensor([4, 5, 6]))
    assert_equal_tensors(cache[:, 4:7], values.transpose(0, 1))
    assert_everywhere(cache[:, :4].isnan(), cache[:, :4])
    assert_everywhere(cache[:, 7:].isnan(), cache[:, 7:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)])
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_attention(dtype: torch.dtype, heads: int, kv_heads: int, length: int, head_dim: int) -> None:
    start, bound, group = 13, 25, heads // kv_heads
    q = normal(length, heads, head_dim, dtype=dtype)
    k = normal(kv_heads, 40, head_dim, dtype=dtype, seed=1)
    v = normal(kv_heads, 40, head_dim, dtype=dtype, seed=2)
    # Rows that no one sees: hidden ones may hold any number, those past the bound are not even read.
    k[:, start + length : bound], v[:, start + length : bound] = 100.0, -100.0
    k[:, bound:], v[:, bound:] = float("nan"), float("nan")
    positions = torch.arange(start, start + length)
    mask = reference.causal_mask(positions, bound, group, dtype)
    out = reference.attention(q, k, v, mask)
    exact = torch.empty(length, heads, head_dim, dtype=torch.float64)
    for t in range(length):
        for h in range(heads):
            keys, values = (c[h // group, : start + t + 1].double() for c in (k, v))
            exact[t, h] = torch.softmax(keys @ q[t, h].double() / math.sqrt(head_dim), 0) @ values
    assert out.dtype == dtype
    assert out.shape == (length, heads * head_dim)
    # The weights and the result are rounded to dtype; |v| is below 5.
    assert_close(out, exact.view(length, -1), 5 * 4 * unit_roundoff(dtype))


def test_causal_mask() -> None:
    inf = math.inf
    assert reference.causal_mask(torch.tensor([1, 2]), 4, 2, torch.float32).tolist() == [
        [0, 0, -inf, -inf],
        [0, 0, -inf, -inf],
        [0, 0, 0, -inf],
        [0, 0, 0, -inf],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    joint = 3 * normal(3, 2 * 37, dtype=dtype)
    gate, up = joint.double().chunk(2, -1)
    exact = gate / (1 + torch.exp(-gate)) * up
    before = joint.clone()
    assert_close(reference.silu_mul(joint), exact, 3 * unit_roundoff(dtype) * exact.abs() + 1e-7)
    assert_equal_tensors(joint, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_lm_head(dtype: torch.dtype) -> None:
    table = normal(29, 16, dtype=dtype)
    tokens = torch.tensor([28, 0, 3, 3])
    x = reference.embedding(table, tokens)
    assert_equal_tensors(x, table[tokens])
    logits = reference.lm_head(x, table)
    exact = x.double() @ table.double().t()
    assert logits.dtype == torch.float32
    assert_close(logits, exact, unit_roundoff(dtype) * (exact.abs() + 1) + 1e-6)
