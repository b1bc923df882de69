"""A small Llama through the triton backend as a problem (see `problems.base`), and whole steps to time."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bench.kernel_check.problems import oracle
from bench.kernel_check.problems.base import EPS, ROWS, Case, Judge, Place, Source, fill
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.backends.choice import make_backend
from pyramid_rt.models.backends.torch import TorchBackend
from pyramid_rt.models.backends.triton import TritonBackend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.families import read_config
from pyramid_rt.models.llama import KVCache, LayerWeights, Llama, forward
from pyramid_rt.models.matrix import Dense
from pyramid_rt.models.shapes import Shape


def llama_config(shape: Shape, *, tied: bool, positions: int) -> LlamaConfig:
    """A Llama of a shape."""
    entries: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
        "rope_theta": 5e5,
    }
    return read_config(entries, source=shape.name)


def random_llama(config: LlamaConfig, source: Source, *, backend: str, max_seq: int) -> Llama:
    """Weights that keep the residual stream near its size, behind `torch` or `triton`."""
    device, dtype = source.place.device, source.dtype
    made: Backend
    if device.type == "meta" and backend == "triton":
        # For a compiler without a GPU, which nobody who loads a model is.
        made = TritonBackend.allocate(config, max_seq=max_seq, dtype=dtype, device=device)
    else:
        made = make_backend(
            backend,
            config,
            device,
            dtype=dtype,
            max_seq=max_seq,
        )
    model = Llama.empty(config, made, max_seq=max_seq, dtype=dtype, device=device)
    tables = {tensor.data_ptr(): tensor for tensor in (model.embedding, model.head.operand)}
    for tensor in (*(part for layer in model.layers for part in parts(layer)), model.norm, *tables.values()):
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=source.generator)
    return model


def parts(layer: LayerWeights) -> list[Tensor]:
    """The tensors of a layer whose matrices are dense, in the order of its fields."""
    held = [getattr(layer, part.name) for part in fields(LayerWeights)]
    return [part.operand if isinstance(part, Dense) else part for part in held if part is not None]


def converted(model: Llama, dtype: torch.dtype) -> Llama:
    """The same weights in another type behind the plain ops."""

    def to(layer: LayerWeights) -> LayerWeights:
        made: dict[str, Any] = {part.name: getattr(layer, part.name) for part in fields(LayerWeights)}
        for name, part in made.items():
            if isinstance(part, Dense):
                made[name] = Dense(part.tensor.to(dtype))
            elif part is not None:
                made[name] = part.to(dtype)
        return LayerWeights(**made)

    layers = tuple(to(layer) for layer in model.layers)
    return replace(
        model,
        backend=TorchBackend(),
        embedding=model.embedding.to(dtype),
        layers=layers,
        norm=model.norm.to(dtype),
        head=Dense(model.head.operand.to(dtype)),
        rotary=model.rotary.to(dtype),
    )


class Forward:
    """Whole passes. Sizes: those of a `Shape`, start: the cached rows before the window, and optional rows.

    The rows' true keys and values come from passes of one row, so every window is held against those.
    """

    rowwise = True

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), dict(case.sizes)
        self.base_start, count = sizes.pop("start"), sizes.pop("rows", ROWS)
        shape = Shape(case.name, **sizes)
        self.max_seq = self.base_start + count + 1
        self.config = llama_config(shape, tied=True, positions=self.max_seq)
        self.model = random_llama(self.config, source, backend="triton", max_seq=self.max_seq)
        self.cache = KVCache.allocate(self.config, self.max_seq, source.dtype, place.device)
        self.base = source.integers(self.base_start + count, high=shape.vocab)
        self.at, self.tokens = source.scalar(0), source.new(WINDOW, dtype=torch.int64)
        self.rows = torch.arange(WINDOW, device=place.device)
        self.first = 0
        self.prefill(1)
        self.filled = self.cache.buffer.clone()
        self.judge = Judge()

    def prefill(self, chunk: int) -> None:
        """Prefill the whole sequence in windows of `chunk` tokens, from an empty cache."""
        self.cache.buffer.zero_()
        for begin in range(0, self.base.shape[0], chunk):
            tokens = self.base[begin : begin + chunk]
            self.at.fill_(begin)
            # With rows, so that the last layer runs too, though a prefill would leave it out.
            rows = None if begin + chunk < self.base.shape[0] else self.rows[:1]
            if rows is not None:
                rows = rows + tokens.shape[0] - 1
            forward(self.model, self.cache, tokens, self.at, rows=rows, kv_bound=begin + tokens.shape[0])

    def chunked_differs(self, chunk: int, *, exact: bool) -> Tensor:
        """0-d bool: the cache depends on the width of the prefill's windows."""
        self.prefill(chunk)
        return oracle.differ(self.cache.buffer, self.filled, exact=exact)

    def launches(self, length: int) -> list[Launch]:
        """None of its own: the kernels are those of the shape's other problems."""
        return []

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Tokens, position, and the cache before the window."""
        self.first = first
        begin = self.base_start + first
        fill(self.tokens, self.base, begin)
        self.at.fill_(begin)
        self.cache.buffer.copy_(self.filled)

    def poison(self) -> None:
        """The cache from the window on, and every buffer."""
        self.cache.buffer[:, :, :, self.base_start + self.first :] = math.nan
        buffers: Any = self.model.backend.buffers  # type: ignore[attr-defined]
        scratch = (buffers.products.partials, buffers.splits.acc, buffers.splits.stats)
        streams = (
            buffers.stream,
            buffers.scaled,
            buffers.squares,
            buffers.q,
            buffers.attended,
            buffers.inner,
            buffers.logits,
        )
        for tensor in (*scratch, *streams):
            tensor.fill_(math.nan)

    def start(self, length: int) -> None:
        """One pass with logits of every row. Odd windows cover the whole cache, which must change nothing."""
        end = self.base_start + self.first + length
        bound = self.cache.buffer.shape[3] if length % 2 else end
        self.logits = forward(
            self.model, self.cache, self.tokens[:length], self.at, rows=self.rows[:length], kv_bound=bound
        )

    def outputs(self, length: int) -> dict[str, Tensor]:
        """Logits, and the rows' keys and values of every layer."""
        begin = self.base_start + self.first
        cached = self.cache.buffer[:, :, :, begin : begin + length].permute(3, 0, 1, 2, 4)
        assert self.logits is not None
        return {"logits": self.logits, "cache": cached}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """The cache after the window."""
        return {"cache": self.cache.buffer[:, :, :, self.base_start + self.first + length :]}

    def counters(self) -> list[Tensor]:
        """Arrivals of both kinds of splits."""
        buffers: Any = self.model.backend.buffers  # type: ignore[attr-defined]
        return [buffers.products.counters, buffers.splits.arrivals]

    def _apply(self, kind: torch.dtype) -> dict[str, Tensor]:
        model = converted(self.model, kind)
        cache = KVCache.allocate(self.config, self.max_seq, kind, self.at.device)
        begin = self.base_start
        end = min(begin + WINDOW, self.base.shape[0])
        rows = torch.arange(begin, end, device=self.at.device)
        logits = forward(model, cache, self.base[:end], torch.zeros_like(self.at), rows=rows, kv_bound=end)
        if logits is None:
            raise RuntimeError("a pass with rows gave no logits")
        # The float64 pass rounds its logits to float32, far below any dtype's tolerance.
        cached = cache.buffer[:, :, :, begin:end].permute(3, 0, 1, 2, 4)
        return {"logits": logits.to(kind), "cache": cached}

    def verdicts(self, length: int) -> dict[str, float]:
        """Against a float64 run of the whole sequence, as near as the plain ops come."""
        if not self.judge.exact:
            self.judge = Judge(self._apply(torch.float64), self._apply(self.model.norm.dtype))
        found = self.outputs(length)
        dtype = self.model.norm.dtype
        width = self.config.intermediate_size
        return self.judge.near(found | {"logits": found["logits"].to(dtype)}, length, width)


class Step:
    """A forward step of a whole model with logits of all rows, behind either backend."""

    def __init__(self, shape: Shape, dtype: str, place: Place, context: int) -> None:
        self.source = Source(place, Case("step", dtype, shape.name, {}))
        self.context, self.max_seq = context, context + WINDOW
        # As published: the head of the two small ones is the embedding.
        tied = shape.hidden < 4096
        self.config = llama_config(shape, tied=tied, positions=self.max_seq)
        self.model = random_llama(self.config, self.source, backend="torch", max_seq=self.max_seq)
        self.cache = KVCache.allocate(self.config, self.max_seq, self.source.dtype, place.device)
        self.cache.buffer.normal_(generator=self.source.generator)
        self.at = self.source.scalar(context)
        self.tokens = self.source.integers(WINDOW, high=shape.vocab)
        self.rows = torch.arange(WINDOW, device=place.device)

    def use(self, backend: str) -> None:
        """Swap the backend; the weights stay."""
        dtype, device = self.source.dtype, self.source.place.device
        made = make_backend(
            backend,
            self.config,
            device,
            dtype=dtype,
            max_seq=self.max_seq,
        )
        self.model = replace(self.model, backend=made)

    def run(self, length: int) -> Tensor | None:
        """One step of T rows."""
        return forward(
            self.model,
            self.cache,
            self.tokens[:length],
            self.at,
            rows=self.rows[:length],
            kv_bound=self.context + length,
        )
