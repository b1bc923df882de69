"""A trial of this machine: whether the `torch` backend gives a row the same bits at every width of a window.

That it does is built on what oneDNN does with products of every shape tried so far. Other processors and versions may
choose otherwise, so whoever says that outputs are equal bit for bit tries it first, in a tenth of a second.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pyramid_rt.models.backends.cpu import KEYS, CpuBackend, keeps_rows
from pyramid_rt.models.config import LlamaConfig, RopeConfig
from pyramid_rt.models.llama import SLACK_ROWS, KVCache, Llama, forward, with_packed_matrices

# Odd sizes, a group of three heads, and more columns than a single row is multiplied with in the usual order.
_CONFIG = LlamaConfig(
    vocab_size=301,
    hidden_size=147,
    intermediate_size=1631,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=40,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    max_position_embeddings=2 * KEYS,
    rope=RopeConfig("default", 10000.0, 1.0, 1.0, 1.0, 2 * KEYS),
    eos_token_ids=(),
    bos_token_id=None,
)
# Windows over a text that crosses the step in which cache rows are looked at; the longest is a prompt's.
_LENGTHS = (KEYS - 15, 1, 5, 2, 13, 1, 3, 9, 1)


def keeps_bits(dtype: torch.dtype) -> bool:
    """True where lossless methods give the tokens of plain decoding bit for bit on the `torch` backend on this CPU.

    Tried on a small model of random weights with the calling thread's number of threads; once for each number.
    """
    return keeps_rows(torch.device("cpu"), dtype) and _tried(dtype, torch.get_num_threads())


@cache
def _tried(dtype: torch.dtype, threads: int) -> bool:
    with torch.inference_mode():
        model, generator = _model(dtype), torch.Generator().manual_seed(1)
        shape = (sum(_LENGTHS),)
        tokens = torch.randint(
            0, _CONFIG.vocab_size, shape, generator=generator, dtype=torch.int64, device="cpu"
        )
        singly = [_LENGTHS[0], *[1] * sum(_LENGTHS[1:])]
        first, second = (_logits(model, tokens, lengths) for lengths in (_LENGTHS, singly))
        return torch.equal(first, second)


def _model(dtype: torch.dtype) -> Llama:
    """Random weights whose scores spread about as widely as a trained model's."""
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    model = Llama.empty(_CONFIG, CpuBackend(), max_seq=2 * KEYS, dtype=dtype, device=cpu)
    for layer in model.layers:
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
            matrix.operand.normal_(0.0, matrix.columns**-0.5, generator=generator)
        assert layer.qkv_bias is not None
        for vector in (layer.attn_norm, layer.mlp_norm, layer.qkv_bias):
            vector.normal_(1.0, 0.2, generator=generator)
    model.norm.fill_(1.0)
    model.embedding.normal_(generator=generator)
    model.head.operand.normal_(generator=generator)
    return with_packed_matrices(model)


def _logits(model: Llama, tokens: Tensor, lengths: tuple[int, ...] | list[int]) -> Tensor:
    """[text after the first window, V]: of windows of these lengths."""
    cache_rows = model.rotary.shape[0] - SLACK_ROWS
    cache = KVCache.allocate(_CONFIG, cache_rows, model.rotary.dtype, tokens.device)
    parts, begin = [], 0
    for length in lengths:
        rows = torch.arange(length, dtype=torch.int64, device="cpu") if begin else None
        start, end = torch.tensor(begin, dtype=torch.int64, device="cpu"), begin + length
        logits = forward(model, cache, tokens[begin:end], start, rows=rows, kv_bound=end)
        parts += [] if logits is None else [logits.clone()]
        begin = end
    return torch.cat(parts)
