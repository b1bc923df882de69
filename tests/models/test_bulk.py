"""Long chunks of a prompt on the `triton` backend, interpreted: which positions they take, and what may be reused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors

import pyramid_rt
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models import llama
from pyramid_rt.models.backends import bulk


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK", 64)


def test_a_chunk_is_what_the_kernels_make_of_it(micro_dir: Path) -> None:
    """The same weights and the same cache: only roundings differ."""
    caches = []
    with pyramid_rt.load(micro_dir, device="cpu", max_seq=160, backend="triton", control="device") as pyramid:
        tier = pyramid.tiers[-1]
        tokens = torch.arange(160) * 7 % 50
        for chunked in (True, False):
            tier.reset()
            tier.forward(tokens[:16], torch.tensor(0), None, 16)
            if chunked:
                model = replace(tier.model, backend=bulk.BulkBackend())  # type: ignore[attr-defined]
                llama.forward(model, tier.cache, tokens[16:56], torch.tensor(16), rows=None, kv_bound=56)  # type: ignore[attr-defined]
            else:
                tier.forward(tokens[16:56], torch.tensor(16), None, 56)
            caches.append(tier.cache.buffer.clone())  # type: ignore[attr-defined]
    torch.testing.assert_close(caches[0], caches[1], rtol=1e-4, atol=1e-5)
    assert not caches[0][:, :, :, 56:].any()


@pytest.mark.usefixtures("short_chunks")
def test_long_prompts_go_in_chunks_in_every_tier(micro_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All whole chunks before the last token, in every tier, and the same text by every method."""
    began: list[tuple[str, int]] = []
    original = ModelTier.fill_chunk

    def noted(tier: ModelTier, tokens: torch.Tensor, begin: int) -> int:
        began.append((tier.name, begin))
        return original(tier, tokens, begin)

    monkeypatch.setattr(ModelTier, "fill_chunk", noted)
    prompt = [5 + i * 7 % 40 for i in range(130)]
    with pyramid_rt.load(micro_dir, device="cpu", max_seq=160, backend="triton", control="device") as pyramid:
        texts = [
            pyramid.generate(
                prompt, method=method, max_new_tokens=3, draft_length=2, qualifier_length=3
            ).tokens
            for method in ("psd", "ar")
        ]
        assert began == [(name, at) for name in ("target", "draft", "qualifier") for at in (0, 64)]
        assert texts[0] == texts[1]


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("first", "then", "reused"),
    [
        (97, 100, 97),  # as many whole chunks as before
        (97, 130, 64),  # a chunk more: what came after the last chunk is processed again, within it
        (97, 50, 0),  # the chunk of then is not whole now
        (20, 70, 0),
        (20, 22, 20),
    ],
)
def test_what_is_reused_is_what_the_prompt_alone_would_make(
    micro_dir: Path, first: int, then: int, reused: int
) -> None:
    tokens = [5 + i * 7 % 40 for i in range(140)]
    options: dict[str, Any] = {"max_new_tokens": 1, "ignore_eos": True}
    caches = []
    one = micro_dir / "draft"
    with pyramid_rt.load(one, device="cpu", max_seq=160, backend="triton", control="device") as pyramid:
        tier = pyramid.tiers[-1]
        for given in ([first, then], [then]):
            tier.reset()
            for length in given:
                result = pyramid.generate(tokens[:length], **options)
            if len(given) == 2:
                assert result.stats.reused_tokens == reused
            caches.append(tier.cache.buffer[:, :, :, :then].clone())  # type: ignore[attr-defined]
    assert_equal_tensors(caches[0], caches[1])
