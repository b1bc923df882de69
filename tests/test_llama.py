"""The forward pass against transformers and against a float64 Llama written out here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyramid_rt.models.llama import (
    SLACK_ROWS,
    KVCache,
    Llama,
    cache_bytes,
    forward,
    parameter_count,
    weight_bytes,
)
from pyramid_rt.weights import load_llama

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

# name: heads, KV heads, head_dim, tied, attention bias, MLP bias, vocabulary, rope
SHAPES: dict[str, tuple[int, int, int, bool, bool, bool, int, dict[str, Any]]] = {
    "gqa1": (2, 2, 64, True, False, False, 131, {"rope_type": "default"}),
    "gqa3": (3, 1, 96, False, True, False, 257, {"rope_type": "linear", "factor": 4.0}),
    "gqa4": (8, 2, 128, True, False, True, 101, LLAMA3),
    "gqa8": (8, 1, 64, False, True, True, 255, {"rope_type": "default"}),
    "dynamic": (4, 2, 64, True, False, False, 131, {"rope_type": "dynamic", "factor": 3.0}),
}


def hf_model(shape: str, seed: int = 0) -> transformers.LlamaForCausalLM:
    """A random float32 Llama of two layers, its scores spread about as widely as a trained one's."""
    heads, kv_heads, head_dim, tied, attention_bias, mlp_bias, vocab, rope = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=72,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        # The dynamic tests leave this context behind.
        max_position_embeddings=48 if rope["rope_type"] == "dynamic" else 2048,
        rope_parameters={"rope_theta": 10000.0, **rope},
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(0.0, 0.2, generator=generator)
        if "norm" in name:
            weight.add_(1.0)
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every shape as transformers saves it."""
    root = tmp_path_factory.mktemp("models")
    for shape in SHAPES:
        hf_model(shape).save_pretrained(root / shape)
    return {shape: root / shape for shape in SHAPES}


def load(directory: Path, dtype: torch.dtype = torch.float32, max_seq: int = 512) -> tuple[Llama, KVCache]:
    model = load_llama(directory, device=CPU, dtype=dtype, max_seq=max_seq, backend="torch")
    return model, KVCache.allocate(model.config, max_seq, dtype, CPU)


def tokens_for(model: Llama, length: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator)


def run(model: Llama, cache: KVCache, tokens: Tensor, start: int = 0, kv_bound: int | None = None) -> Tensor:
    """All rows' logits of one window."""
    bound = start + len(tokens) if kv_bound is None else kv_bound
    rows = torch.arange(len(tokens))
    logits = forward(model, cache, tokens, torch.tensor(start), rows=rows, kv_bound=bound)
    assert logits is not None
    return logits


def run_windows(model: Llama, cache: KVCache, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same logits by windows of the given lengths, one after the other."""
    parts, start = [], 0
    for length in lengths:
        parts.append(run(model, cache, tokens[start : start + length], start))
        start += length
    assert start == len(tokens)
    return torch.cat(parts)


def exact_logits(hf: transformers.LlamaForCausalLM, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """[T, V] float64: Llama on the weights of `hf` rounded to dtype, nothing else rounded.

    With dynamic rope every position has its own base, as pyramid_rt defines it.
    """
    w = {name: value.to(dtype).double() for name, value in hf.state_dict().items()}
    c = hf.config

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def project(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].t() + w.get(f"{name}.bias", 0.0)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    angles = exact_angles(c, len(tokens))
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        h = norm(x, w[layer + "input_layernorm.weight"])
        q, k, v = (
            project(h, f"{layer}self_attn.{part}_proj").view(len(tokens), -1, c.head_dim) for part in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(c.head_dim)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        x = x + project(torch.einsum("hts,shd->thd", weights, v).flatten(1), layer + "self_attn.o_proj")
        h = norm(x, w[layer + "post_attention_layernorm.weight"])
        gate = project(h, layer + "mlp.gate_proj")
        x = x + project(gate * gate.sigmoid() * project(h, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    return project(norm(x, w["model.norm.weight"]), "lm_head")


def exact_angles(config: transformers.LlamaConfig, length: int) -> Tensor:
    """[length, D / 2] float64."""
    rope, dim = config.rope_parameters, config.head_dim
    positions = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    base = torch.full((length, 1), rope["rope_theta"], dtype=torch.float64)
    if rope["rope_type"] == "dynamic":
        context = config.max_position_embeddings
        stretch = rope["factor"] * (positions + 1) / context - (rope["factor"] - 1)
        base = torch.where(positions + 1 > context, base * stretch ** (dim / (dim - 2)), base)
    frequencies = base**-exponents
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (rope["original_max_position_embeddings"] * frequencies / (2 * math.pi) - low) / (high - low)
        smooth = smooth.clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
    return positions * frequencies


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding along two layers, bounded in its RMS and its maximum."""
    assert rms(actual - expected) < 5e-6 * rms(expected)
    assert float((actual - expected).abs().max()) < 5e-5 * float(expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_equal_transformers(directories: dict[str, Path], shape: str) -> None:
    model, cache = load(directories[shape])
    # transformers gives all rows of a dynamic pass one length: compare within the original context.
    tokens = tokens_for(model, 48 if shape == "dynamic" else 300)
    expected = hf_model(shape)(tokens[None]).logits[0]
    logits = run(model, cache, tokens)
    assert logits.dtype == torch.float32
    assert rms(expected) > 0.5
    assert_same(logits, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("swap", [False, True])
def test_float32_logits_are_exact_to_rounding(directories: dict[str, Path], shape: str, swap: bool) -> None:
    model, cache = load(directories[shape])
    model = replace(model, backend=replace(model.backend, swap=swap))  # type: ignore[type-var]
    tokens = tokens_for(model, 200)
    exact = exact_logits(hf_model(shape), torch.float32, tokens)
    logits = run_windows(model, cache, tokens, [60, 1, 2, 3, 4, 5, 6, 7, 1, 64, 40, 7])
    assert_same(logits, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_as_exact_as_transformers(
    directories: dict[str, Path], shape: str, dtype: torch.dtype
) -> None:
    """Against float64 on the same rounded weights, we may be no worse than transformers is."""
    model, cache = load(directories[shape], dtype)
    tokens = tokens_for(model, 48)
    hf = hf_model(shape)
    exact = exact_logits(hf, dtype, tokens)
    theirs = hf.to(dtype)(tokens[None]).logits[0].double() - exact
    ours = run_windows(model, cache, tokens, [30, 1, 17]).double() - exact
    assert rms(theirs) > 1e-4
    assert rms(ours) < 1.2 * rms(theirs)
    assert float(ours.abs().max()) < 1.6 * float(theirs.abs().max())


def test_dynamic_rope_does_not_depend_on_later_tokens(directories: dict[str, Path]) -> None:
    model, cache = load(directories["dynamic"])
    tokens = tokens_for(model, 160)
    whole = run(model, cache, tokens)
    stepwise = run_windows(
        model, KVCache.allocate(model.config, 512, torch.float32, CPU), tokens, [40, *[1] * 120]
    )
    assert_same(stepwise, whole)
    # One length for all rows, as transformers has it, is something else.
    theirs = hf_model("dynamic")(tokens[None]).logits[0]
    assert rms(whole - theirs) > 0.01 * rms(theirs)


@pytest.mark.parametrize("shape", ["gqa3", "gqa8"])
@pytest.mark.parametrize("lengths", [[1] * 70, [64, 6], [3, 64, 1, 2], [69, 1]])
def test_windows_chain_to_the_full_pass(directories: dict[str, Path], shape: str, lengths: list[int]) -> None:
    model, cache = load(directories[shape])
    tokens = tokens_for(model, 70)
    whole = run(model, cache, tokens)
    other = KVCache.allocate(model.config, 512, torch.float32, CPU)
    assert_same(run_windows(model, other, tokens, lengths), whole)
    for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
        assert_same(a, b)


def test_padding_rows_and_stale_rows_change_nothing(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa4"])
    tokens = tokens_for(model, 40)
    expected = run_windows(model, cache, tokens, [30, 4, 6])
    stale = KVCache.allocate(model.config, 512, torch.float32, CPU)
    for buffer in (*stale.k, *stale.v):
        buffer.fill_(50.0)
    padding = torch.full((9,), 3)
    parts = [
        run(model, stale, tokens[:30], 0, kv_bound=120),
        run(model, stale, torch.cat((tokens[30:34], padding)), 30, kv_bound=200)[:4],
        run(model, stale, torch.cat((tokens[34:], padding)), 34, kv_bound=512 + SLACK_ROWS)[:6],
    ]
    assert_same(torch.cat(parts), expected)


def test_rows_past_the_bound_are_not_read_and_only_the_window_is_written(
    directories: dict[str, Path],
) -> None:
    model, cache = load(directories["gqa1"])
    for buffer in (*cache.k, *cache.v):
        buffer.fill_(math.nan)
    run(model, cache, tokens_for(model, 10))
    assert bool(run(model, cache, tokens_for(model, 3), 10).isfinite().all())
    for buffer in (*cache.k, *cache.v):
        assert bool(buffer[:, :13].isfinite().all())
        assert bool(buffer[:, 13:].isnan().all())


def test_overwritten_rows_decode_as_if_the_first_text_never_was(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa8"])
    tokens = tokens_for(model, 20)
    run(model, cache, tokens_for(model, 30, seed=9))
    again = run_windows(model, cache, tokens, [12, 8])
    fresh = run_windows(model, KVCache.allocate(model.config, 512, torch.float32, CPU), tokens, [12, 8])
    assert torch.equal(again, fresh)


def test_chosen_rows_and_no_rows(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa3"])
    tokens, start = tokens_for(model, 9), torch.tensor(0)
    every = run(model, cache, tokens)
    chosen = forward(model, cache, tokens, start, rows=torch.tensor([8, 2]), kv_bound=9)
    assert chosen is not None
    assert_same(chosen, every[[8, 2]])
    other = KVCache.allocate(model.config, 512, torch.float32, CPU)
    assert forward(model, other, tokens, start, rows=None, kv_bound=9) is None
    for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
        assert torch.equal(a, b)


def test_the_last_context_row_may_be_overrun_by_the_slack(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa1"], max_seq=16)
    tokens = tokens_for(model, 16 + SLACK_ROWS)
    run(model, cache, tokens[:15])
    logits = run(model, cache, tokens[15:79], 15)
    large, large_cache = load(directories["gqa1"], max_seq=256)
    assert_same(logits, run(large, large_cache, tokens[:79])[15:])


class NoHostRead(TorchDispatchMode):
    """Fails on every op that hands a device value to Python or makes a shape depend on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))


def test_forward_reads_nothing_back_and_changes_no_input(directories: dict[str, Path]) -> None:
    model, cache = load(directories["dynamic"])
    tokens, start, rows = tokens_for(model, 5), torch.tensor(46), torch.tensor([4])
    inputs = [tokens, start, rows, model.embedding, model.rotary, *(layer.qkv for layer in model.layers)]
    before = [t.clone() for t in inputs]
    with torch.inference_mode(), NoHostRead():
        first = forward(model, cache, tokens, start, rows=rows, kv_bound=60)
        second = forward(model, cache, tokens, start, rows=rows, kv_bound=60)
    with NoHostRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        start.item()
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_allocated(directories: dict[str, Path], shape: str) -> None:
    model, cache = load(directories[shape], torch.bfloat16, max_seq=100)
    hf = hf_model(shape)
    assert parameter_count(model.config) == hf.num_parameters()
    assert weight_bytes(model.config, torch.bfloat16) == 2 * hf.num_parameters()
    held = sum(t.nbytes for t in (*cache.k, *cache.v, model.rotary))
    assert cache_bytes(model.config, 100, torch.bfloat16) == held
    assert all(t.shape == (model.config.num_kv_heads, 164, model.config.head_dim) for t in cache.k)
    assert (model.head is model.embedding) == hf.config.tie_word_embeddings
