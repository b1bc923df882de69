"""Small random Llamas of every supported kind, and a float64 Llama written out here to hold them against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pyramid_rt.loading.weights import load_llama
from pyramid_rt.models.llama import KVCache, Llama, forward

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
    parts: dict[str, Any] = {"attn_implementation": "eager"}  # not declared, but taken
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
        **parts,
    )
    model = transformers.LlamaForCausalLM(config)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(0.0, 0.2, generator=generator)
        if "norm" in name:
            weight.add_(1.0)
    return model


def save_models(root: Path) -> dict[str, Path]:
    """Every shape as transformers saves it, in a folder of its own."""
    for shape in SHAPES:
        hf_model(shape).save_pretrained(root / shape)
    return {shape: root / shape for shape in SHAPES}


def load(
    directory: Path, dtype: torch.dtype = torch.float32, max_seq: int = 512, backend: str = "torch"
) -> tuple[Llama, KVCache]:
    model = load_llama(directory, device=CPU, dtype=dtype, max_seq=max_seq, backend=backend)
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
    return logits.clone()  # a backend may reuse its buffer


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
    w: dict[str, Tensor] = {name: value.to(dtype).double() for name, value in hf.state_dict().items()}
    c: Any = hf.config

    epsilon: float = c.rms_norm_eps

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight

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
    rope: Any = config.rope_parameters
    dim: Any = config.head_dim
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
    angles: Tensor = positions * frequencies
    return angles


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding along two layers, bounded in its RMS and its maximum."""
    assert rms(actual - expected) < 5e-6 * rms(expected)
    assert float((actual - expected).abs().max()) < 5e-5 * float(expected.abs().max())
