"""A Llama and its static cache, as a tier of the pyramid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyramid_rt.decoding.tiers import DeviceForward
from pyramid_rt.errors import WeightsError
from pyramid_rt.loading.weights import load_llama
from pyramid_rt.models.backends import bulk
from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import KVCache, Llama, forward, rotate_prompt

if TYPE_CHECKING:
    from pyramid_rt.kernels.launch import Launch


class ModelTier:
    """A Llama and its static cache.

    Attributes:
        name: of the tier.
        config: of its model.
        max_seq: positions the cache can hold, without the slack.
        path: its directory.
        device: where it is, or will be.
        held: token ids in the cache, see `Tier`.
        bulk: leading positions of the cache that `fill_chunk` made.
    """

    _parts: tuple[Llama, KVCache] | None

    def __init__(self, name: str, model: Llama, cache: KVCache, max_seq: int, path: Path) -> None:
        self._begin(name, path, model.config, max_seq, cache.buffer.device, model.backend.name)
        self._parts = (model, cache)

    def _begin(
        self, name: str, path: Path, config: LlamaConfig, max_seq: int, device: torch.device, backend: str
    ) -> None:
        """Everything but weights and cache."""
        self.name, self.path, self.config, self.max_seq = name, path, config, max_seq
        self.device, self._backend = device, backend
        self.held: list[int] = []
        self.bulk = 0
        self._parts = None
        # The prompt's length that the rotary table is for.
        self._rotated = self._original

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
        # A cache made in an application's inference mode could not be written to outside it.
        with torch.inference_mode(False):
            cache = KVCache.allocate(model.config, max_seq, dtype, device)
        return cls(name, model, cache, max_seq, path)

    def ready(self) -> None:
        """Take the weights and the cache, where that has not happened yet. Errors as `load`."""

    @property
    def _original(self) -> int:
        """Positions up to which the rotary embedding does not depend on the prompt's length."""
        rope = self.config.rope
        return rope.original_max_position_embeddings if rope.kind == "dynamic" else self.max_seq

    def begin(self, prompt: int) -> None:
        """See `PromptTier`."""
        length = max(prompt, self._original)
        if length != self._rotated:
            self.held, self.bulk = [], 0
            rotate_prompt(self.model, length)
            self._rotated = length

    @property
    def model(self) -> Llama:
        """The loaded model."""
        return self._loaded()[0]

    @property
    def cache(self) -> KVCache:
        """Its cache."""
        return self._loaded()[1]

    @contextmanager
    def computed_by(self, wrap: Callable[[Backend], Backend]) -> Iterator[None]:
        """Inside, passes are computed by what `wrap` makes of the model's backend: for whoever looks at their ops."""
        model, cache = self._loaded()
        self._parts = (replace(model, backend=wrap(model.backend)), cache)
        try:
            yield
        finally:
            self._parts = (model, cache)

    def _loaded(self) -> tuple[Llama, KVCache]:
        if self._parts is None:
            self.ready()
        assert self._parts is not None
        return self._parts

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def forward(self, tokens: Tensor, start: Tensor, rows: Tensor | None, kv_bound: int) -> Tensor | None:
        model, cache = self._loaded()
        return forward(model, cache, tokens, start, rows=rows, kv_bound=kv_bound)

    @property
    def device_rounds(self) -> bool:
        return self._backend == "triton"

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
            active=request.active,
        )

    def reset(self) -> None:
        self.held, self.bulk = [], 0
        if self._parts is not None:
            self._parts[1].buffer.zero_()


class LaterTier(ModelTier):
    """A tier whose weights and cache are taken when a call first needs it.

    What can be checked without reading weights was checked by then; its place in memory is planned.

    Args:
        name, path: as of `ModelTier`.
        config: read from `path`.
        max_seq, device, backend: as it will be loaded.
        load: loads it.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        config: LlamaConfig,
        *,
        max_seq: int,
        device: torch.device,
        backend: str,
        load: Callable[[], ModelTier],
    ) -> None:
        self._begin(name, path, config, max_seq, device, backend)
        self._load = load

    def ready(self) -> None:
        if self._parts is not None:
            return
        tier = self._load()
        if tier.config != self.config:
            raise WeightsError(f"{self.path}: its config is no longer the one that was read at load")
        # A device without its number is the current one; from now on it is the one that was taken.
        self.device, self._parts = tier.device, (tier.model, tier.cache)
