"""A Llama and its static cache, as a tier of the pyramid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import KVCache, Llama, forward
from pyramid_rt.weights import load_llama


@dataclass
class ModelTier:
    """A Llama and its static cache."""

    name: str
    model: Llama
    cache: KVCache
    max_seq: int
    path: Path
    held: list[int] = field(default_factory=list)

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

    def reset(self) -> None:
        self.held = []
        self.cache.buffer.zero_()
