"""A Llama and its static cache, as a tier of the pyramid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyramid_rt.decoding.tiers import DeviceForward
from pyramid_rt.loading.weights import load_llama
from pyramid_rt.models.backends import bulk
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import KVCache, Llama, forward

if TYPE_CHECKING:
    from pyramid_rt.kernels.launch import Launch


@dataclass
class ModelTier:
    """A Llama and its static cache.

    Attributes:
        bulk: leading positions of the cache that `fill_chunk` made.
    """

    name: str
    model: Llama
    cache: KVCache
    max_seq: int
    path: Path
    held: list[int] = field(default_factory=list)
    bulk: int = 0

    @classmethod
    def load(
        cls,
        name: str,
        path: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_seq: int,
        backend: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> ModelTier:
        """Load the model at `path` and allocate its cache. Raises WeightsError."""
        model = load_llama(
            path, device=device, dtype=dtype, max_seq=max_seq, backend=backend, progress=progress
        )
        cache = KVCache.allocate(model.config, max_seq, dtype, device)
        return cls(name, model, cache, max_seq, path)

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.cache.buffer.device

    def forward(self, tokens: Tensor, start: Tensor, rows: Tensor | None, kv_bound: int) -> Tensor | None:
        return forward(self.model, self.cache, tokens, start, rows=rows, kv_bound=kv_bound)

    @property
    def device_rounds(self) -> bool:
        return self.model.backend.name == "triton"

    def whole_chunks(self, prompt: int) -> int:
        """See `DeviceTier`."""
        return bulk.whole_chunks(prompt)

    def fill_chunk(self, tokens: Tensor, begin: int) -> int:
        """See `DeviceTier`."""
        end = begin + bulk.CHUNK
        start = torch.full((), begin, dtype=torch.int64, device=self.device)
        model = replace(self.model, backend=bulk.BulkBackend())
        forward(model, self.cache, tokens[begin:end], start, rows=None, kv_bound=end)
        self.bulk = end
        return end

    def device_forward(self, request: DeviceForward) -> Sequence[Launch]:
        from pyramid_rt.kernels.forward.head import Noise, Placement
        from pyramid_rt.models.backends.triton import HeadOutputs, plan_pass

        placement = None
        if request.count:
            placement = Placement(request.start, request.decided, request.first, request.count)
        return plan_pass(
            self.model,
            self.cache,
            request.tokens,
            request.start,
            width=request.width,
            kv_bound=request.kv_bound,
            placement=placement,
            outputs=HeadOutputs(
                request.vocab_size,
                request.rows,
                request.statistics,
                Noise(request.seed, None, request.temperature),
            ),
            live=request.live,
        )

    def reset(self) -> None:
        self.held, self.bulk = [], 0
        self.cache.buffer.zero_()
