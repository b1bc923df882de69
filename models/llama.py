"""Llama as a pure function of (weights, tokens, positions, cache)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference.forward import compact, rotary_table
from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.matrix import Dense, Matrix, Packed, can_pack
from pyramid_rt.models.trees import Tree

# Cache rows past the context, for a round that runs over its end.
SLACK_ROWS = WINDOW


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. C hidden size, I intermediate size, H and KV heads of size D; vectors in the activations' type."""

    attn_norm: Tensor  # [C]
    qkv: Matrix  # [(H + 2 KV) D, C], rows of Q, then K, then V
    qkv_bias: Tensor | None  # [(H + 2 KV) D]
    out: Matrix  # [C, H D]
    out_bias: Tensor | None  # [C]
    mlp_norm: Tensor  # [C]
    gate_up: Matrix  # [2 I, C], rows of gate, then up
    gate_up_bias: Tensor | None  # [2 I]
    down: Matrix  # [C, I]
    down_bias: Tensor | None  # [C]

    @classmethod
    def empty(cls, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LayerWeights:
        """Uninitialised parts of the right shapes, the matrices dense."""
        parts: dict[str, Any] = dict.fromkeys(cls.__slots__)
        for name, shape in layer_shapes(config).items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            parts[name] = Dense(tensor) if len(shape) == 2 else tensor
        return cls(**parts)


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each field of `LayerWeights` that the model has; two sizes for a matrix, one for a vector."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    joint = queries + 2 * config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "qkv": (joint, hidden),
        "out": (hidden, queries),
        "mlp_norm": (hidden,),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    if config.qkv_bias:
        shapes["qkv_bias"] = (joint,)
    if config.out_bias:
        shapes["out_bias"] = (hidden,)
    if config.mlp_bias:
        shapes |= {"gate_up_bias": (2 * inner,), "down_bias": (hidden,)}
    return shapes


@dataclass(frozen=True, slots=True)
class Llama:
    """A loaded model: what `forward` reads and never writes.

    Attributes:
        config: its shape.
        backend: who computes.
        embedding: [V, C] dtype: a table whose rows are looked up.
        layers: from the first to the last.
        norm: [C] dtype.
        head: [V, C]; the embedding itself, or a packed copy of it, where the two are tied.
        rotary: [max_seq + SLACK_ROWS, 2, D] dtype, `kernels.reference.rotary_table`.
    """

    config: LlamaConfig
    backend: Backend
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Matrix
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
            head=Dense(embedding if tied else torch.empty(shape, dtype=dtype, device=device)),
            rotary=_rotary(config, max_seq, dtype).to(device),
        )


def _rotary(config: LlamaConfig, max_seq: int, dtype: torch.dtype, prompt: int = 0) -> Tensor:
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
        prompt=prompt,
        dtype=dtype,
    )


def rotate_prompt(model: Llama, prompt: int) -> None:
    """Set the rotary table for texts whose prompt has so many tokens. Only `dynamic` rope depends on that.

    Keys that were cached for a prompt of another length, beyond the original context, hold no longer.
    """
    rows = model.rotary.shape[0]
    table = _rotary(model.config, rows - SLACK_ROWS, model.rotary.dtype, prompt)
    model.rotary.copy_(table)


def with_matrices(model: Llama, convert: Callable[[Matrix], Matrix]) -> Llama:
    """The same model with every matrix as `convert` makes it, one after the other; the head comes last."""
    layers = tuple(
        replace(
            layer,
            qkv=convert(layer.qkv),
            out=convert(layer.out),
            gate_up=convert(layer.gate_up),
            down=convert(layer.down),
        )
        for layer in model.layers
    )
    return replace(model, layers=layers, head=convert(model.head))


def with_packed_matrices(model: Llama) -> Llama:
    """The same model with the matrices packed where that can be; takes their storage from `model`.

    Each is freed as soon as its copy is there, so that they are never held twice, but for an embedding that is the
    head too: rows of a packed matrix cannot be looked up.
    """

    def packed(matrix: Matrix) -> Matrix:
        if not isinstance(matrix, Dense) or not can_pack(matrix.device, matrix.tensor.dtype):
            return matrix
        copy = Packed.of(matrix.tensor)
        if matrix.tensor is not model.embedding:
            matrix.tensor.untyped_storage().resize_(0)
        return copy

    return with_matrices(model, packed)


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

    def compact(self, start: Tensor, path: Tensor, count: Tensor) -> None:
        """Move the rows of a tree's accepted path together; arguments as of `kernels.reference.forward.compact`."""
        compact(self.buffer, start, path, count)


def forward(
    model: Llama,
    cache: KVCache,
    tokens: Tensor,
    start: Tensor,
    *,
    rows: Tensor | None,
    kv_bound: int,
    tree: Tree | None = None,
) -> Tensor | None:
    """Run a window of tokens in the cache rows start .. start + T - 1, which are their positions too but for a tree.

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
        tree: of the window's rows, up to 64; then no row but its ancestors sees a row of the window. None: a chain.
            Raises ValueError where the backend knows chains only.

    Returns:
        [R, V] float32 logits, or None without `rows`. They hold until the next pass of this model.
    """
    length, most = tokens.shape[0], model.backend.longest_window
    if most is None or length <= most:
        return _pass(model, cache, tokens, start, rows, kv_bound, tree)
    if tree is not None:
        raise ValueError(
            f"a tree of {length} rows, expected at most {most} on backend {model.backend.name!r}"
        )
    last = (length - 1) // most * most
    for begin in range(0, last, most):
        _pass(model, cache, tokens[begin : begin + most], start + begin, None, kv_bound)
    rows = None if rows is None else rows - last
    return _pass(model, cache, tokens[last:], start + last, rows, kv_bound)


def _pass(
    model: Llama,
    cache: KVCache,
    tokens: Tensor,
    start: Tensor,
    rows: Tensor | None,
    kv_bound: int,
    tree: Tree | None = None,
) -> Tensor | None:
    """`forward` of a window that the backend takes as a whole."""
    backend = model.backend
    group = model.config.num_heads // model.config.num_kv_heads
    window = backend.window(model.rotary, start, tokens.shape[0], kv_bound, group, tree)
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
    layer = sum(prod(shape) for shape in layer_shapes(config).values())
    tables = 1 if config.tie_word_embeddings else 2
    hidden = config.hidden_size
    return config.num_layers * layer + hidden + tables * config.vocab_size * hidden


def weight_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights in dtype."""
    return parameter_count(config) * dtype.itemsize


def cache_bytes(config: LlamaConfig, max_seq: int, dtype: torch.dtype) -> int:
    """Bytes of everything whose size follows from `max_seq`: keys, values and the rotary table."""
    rows = max_seq + SLACK_ROWS
    per_row = 2 * config.num_layers * config.num_kv_heads * config.head_dim + 2 * config.head_dim
    return rows * per_row * dtype.itemsize
