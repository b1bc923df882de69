"""Llama as a pure function of (weights, tokens, positions, cache)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference.forward import pack, rotary_table
from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.backends.torch import worth_packing
from pyramid_rt.models.config import LlamaConfig

# Cache rows past the context, for a round that runs over its end.
SLACK_ROWS = WINDOW


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. C hidden size, I intermediate size, H and KV heads of size D; all in the model's dtype."""

    attn_norm: Tensor  # [C]
    # Matrices of the `torch` backend may be packed; see `with_packed_matrices`.
    qkv: Tensor  # [(H + 2 KV) D, C], rows of Q, then K, then V
    qkv_bias: Tensor | None  # [(H + 2 KV) D]
    out: Tensor  # [C, H D]
    out_bias: Tensor | None  # [C]
    mlp_norm: Tensor  # [C]
    gate_up: Tensor  # [2 I, C], rows of gate, then up
    gate_up_bias: Tensor | None  # [2 I]
    down: Tensor  # [C, I]
    down_bias: Tensor | None  # [C]

    @classmethod
    def empty(cls, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LayerWeights:
        """Uninitialised tensors of the right shapes."""

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_heads * config.head_dim
        joint = queries + 2 * config.num_kv_heads * config.head_dim
        attention, mlp = config.attention_bias, config.mlp_bias
        return cls(
            attn_norm=new(hidden),
            qkv=new(joint, hidden),
            qkv_bias=new(joint) if attention else None,
            out=new(hidden, queries),
            out_bias=new(hidden) if attention else None,
            mlp_norm=new(hidden),
            gate_up=new(2 * inner, hidden),
            gate_up_bias=new(2 * inner) if mlp else None,
            down=new(hidden, inner),
            down_bias=new(hidden) if mlp else None,
        )


@dataclass(frozen=True, slots=True)
class Llama:
    """A loaded model: what `forward` reads and never writes.

    Attributes:
        config: its shape.
        backend: who computes.
        embedding: [V, C] dtype.
        layers: from the first to the last.
        norm: [C] dtype.
        head: [V, C] dtype; the embedding itself, or a packed copy of it, where the two are tied.
        rotary: [max_seq + SLACK_ROWS, 2, D] dtype, `kernels.reference.rotary_table`.
    """

    config: LlamaConfig
    backend: Backend
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    rotary: Tensor

    @classmethod
    def empty(
        cls, config: LlamaConfig, backend: Backend, *, max_seq: int, dtype: torch.dtype, device: torch.device
    ) -> Llama:
        """Uninitialised weights for the loader to fill, and the rotary table of `max_seq` positions.

        `max_seq` may exceed what the checkpoint was trained for: the table simply goes on.
        """
        shape = (config.vocab_size, config.hidden_size)
        embedding = torch.empty(shape, dtype=dtype, device=device)
        tied = config.tie_word_embeddings
        return cls(
            config=config,
            backend=backend,
            embedding=embedding,
            layers=tuple(LayerWeights.empty(config, dtype, device) for _ in range(config.num_layers)),
            norm=torch.empty(config.hidden_size, dtype=dtype, device=device),
            head=embedding if tied else torch.empty(shape, dtype=dtype, device=device),
            rotary=_rotary(config, max_seq, dtype).to(device),
        )


def _rotary(config: LlamaConfig, max_seq: int, dtype: torch.dtype) -> Tensor:
    rope = config.rope
    return rotary_table(
        rope.kind,
        max_seq + SLACK_ROWS,
        config.head_dim,
        theta=rope.theta,
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_context=rope.original_max_position_embeddings,
        dtype=dtype,
    )


def with_packed_matrices(model: Llama) -> Llama:
    """The same model with the matrices packed that are `worth_packing`; takes their storage from `model`.

    Each is freed as soon as its copy is there, so that they are never held twice, but for an embedding that is the
    head too: rows of a packed matrix cannot be looked up.
    """

    def packed(weight: Tensor) -> Tensor:
        if not worth_packing(weight.shape[0], weight.shape[1], weight.device, weight.dtype):
            return weight
        copy = pack(weight)
        if weight is not model.embedding:
            weight.untyped_storage().resize_(0)
        return copy

    layers = tuple(
        replace(
            layer,
            qkv=packed(layer.qkv),
            out=packed(layer.out),
            gate_up=packed(layer.gate_up),
            down=packed(layer.down),
        )
        for layer in model.layers
    )
    return replace(model, layers=layers, head=packed(model.head))


@dataclass(frozen=True, slots=True)
class KVCache:
    """Static cache of one tier: keys after RoPE, and values; row = absolute position.

    Which rows are valid is known to the caller: `forward` overwrites its window's rows and hides later ones.
    """

    buffer: Tensor  # [L, 2, KV, max_seq + SLACK_ROWS, D] dtype: keys and values of every layer
    k: list[Tensor]  # per layer its [KV, max_seq + SLACK_ROWS, D]
    v: list[Tensor]  # likewise

    @classmethod
    def allocate(cls, config: LlamaConfig, max_seq: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """A cache for `max_seq` positions, all zero: hidden rows must be finite."""
        shape = (config.num_layers, 2, config.num_kv_heads, max_seq + SLACK_ROWS, config.head_dim)
        buffer = torch.zeros(shape, dtype=dtype, device=device)
        return cls(buffer, list(buffer[:, 0]), list(buffer[:, 1]))


def forward(
    model: Llama, cache: KVCache, tokens: Tensor, start: Tensor, *, rows: Tensor | None, kv_bound: int
) -> Tensor | None:
    """Run a window of tokens at absolute positions start .. start + T - 1.

    Writes their keys and values into the cache; row t attends to the cache rows 0 .. start + t. Rows of the
    window after the last real token may hold anything in the vocabulary: no earlier row sees them. The caller
    keeps start + T within the cache and every token within the vocabulary. Reads no device value on the host.
    A window longer than the backend's `longest_window` is run in parts of that length; then `rows` must lie in
    the last part.

    Args:
        model, cache: of one device and dtype.
        tokens: [T] int64.
        start: 0-d int64 on the device.
        rows: [R] int64 indices into the window whose logits are wanted; None skips the head (prefill).
        kv_bound: host number of cache rows to consider, at least start + T. It changes the cost and, by
            rounding, the last bits, nothing else.

    Returns:
        [R, V] float32 logits, or None without `rows`. They hold until the next pass of this model.
    """
    length, most = tokens.shape[0], model.backend.longest_window
    if most is None or length <= most:
        return _pass(model, cache, tokens, start, rows, kv_bound)
    last = (length - 1) // most * most
    for begin in range(0, last, most):
        _pass(model, cache, tokens[begin : begin + most], start + begin, None, kv_bound)
    rows = None if rows is None else rows - last
    return _pass(model, cache, tokens[last:], start + last, rows, kv_bound)


def _pass(
    model: Llama, cache: KVCache, tokens: Tensor, start: Tensor, rows: Tensor | None, kv_bound: int
) -> Tensor | None:
    """`forward` of a window that the backend takes as a whole."""
    backend = model.backend
    group = model.config.num_heads // model.config.num_kv_heads
    window = backend.window(model.rotary, start, tokens.shape[0], kv_bound, group)
    x = backend.embed(model.embedding, tokens, model.layers[0].attn_norm, window)
    x = run_layers(model, cache, backend, x, window, rows is None)
    return None if rows is None else backend.head(x, rows, model.norm, model.config.rms_norm_eps, model.head)


def run_layers(
    model: Llama, cache: KVCache, backend: Backend, x: Tensor, window: Any, cache_only: bool
) -> Tensor:
    """The residual stream after all layers; with `cache_only` the last one stops when its cache is written."""
    eps = model.config.rms_norm_eps
    following = [*(layer.attn_norm for layer in model.layers[1:]), model.norm]
    for layer, then, k, v in zip(model.layers, following, cache.k, cache.v, strict=True):
        q = backend.qkv(x, layer.attn_norm, eps, layer.qkv, layer.qkv_bias, k, v, window)
        if cache_only and layer is model.layers[-1]:
            break
        attended = backend.attention(q, k, v, window)
        x = backend.project(attended, layer.out, layer.out_bias, x, layer.mlp_norm, window)
        inner = backend.gate_up(x, layer.mlp_norm, eps, layer.gate_up, layer.gate_up_bias, window)
        x = backend.project(inner, layer.down, layer.down_bias, x, then, window)
    return x


def parameter_count(config: LlamaConfig) -> int:
    """Number of stored weights, a tied head counted once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = hidden * (2 * queries + 2 * keys) + 2 * hidden + 3 * hidden * inner
    if config.attention_bias:
        layer += queries + 2 * keys + hidden
    if config.mlp_bias:
        layer += 2 * inner + hidden
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_layers * layer + hidden + tables * config.vocab_size * hidden


def weight_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights in dtype."""
    return parameter_count(config) * dtype.itemsize


def cache_bytes(config: LlamaConfig, max_seq: int, dtype: torch.dtype) -> int:
    """Bytes of everything whose size follows from `max_seq`: keys, values and the rotary table."""
    rows = max_seq + SLACK_ROWS
    per_row = 2 * config.num_layers * config.num_kv_heads * config.head_dim + 2 * config.head_dim
    return rows * per_row * dtype.itemsize
