"""On a CPU `sd` and `psd` give the tokens of `ar`, and a prompt that is reused its own bits: models of odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.tiny import write_tiny_pyramid

import pyramid_rt
from pyramid_rt.decoding.rounds.torch_steps import _NoiseRows
from pyramid_rt.kernels.reference import sampling
from pyramid_rt.models.backends.cpu import keeps_rows

# Groups of three and of seven heads, and heads without a group; sizes that fill no vector, and many columns.
SIZES: dict[str, dict[str, Any]] = {
    "three": {
        "hidden_size": 99,
        "intermediate_size": 1601,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 36,
    },
    "seven": {
        "hidden_size": 161,
        "intermediate_size": 77,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "attention_bias": True,
    },
    "one": {
        "hidden_size": 90,
        "intermediate_size": 135,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 18,
        "tie_word_embeddings": True,
    },
}
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("odd")
    return {
        name: write_tiny_pyramid(root / name, max_position_embeddings=1024, initializer_range=0.15, **sizes)
        for name, sizes in SIZES.items()
    }


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if not keeps_rows(torch.device("cpu"), getattr(torch, name)):
        pytest.skip("this processor or this torch promises no equal bits")
    return name


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, (length,), generator=generator).tolist()


@pytest.mark.parametrize(("sizes", "threads"), [*((name, 1) for name in SIZES), ("three", 2)])
def test_lossless_methods_give_the_tokens_of_ar(
    directories: dict[str, Path], sizes: str, dtype: str, threads: int
) -> None:
    """A prompt of one token, and one whose text crosses a step of the bound; each with lengths of its own."""
    drafts: list[dict[str, Any]] = [
        {"draft_length": 1, "qualifier_length": 3},
        {"draft_length": 5, "qualifier_length": 9},
    ]
    differing = []
    with pyramid_rt.load(directories[sizes], device="cpu", dtype=dtype, threads=threads) as rt:
        for seed, (length, lengths) in enumerate(zip((1, 243), drafts, strict=True)):
            for sampling_options in ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}):
                options: dict[str, Any] = {
                    "max_new_tokens": 24,
                    "ignore_eos": True,
                    "seed": seed,
                    **sampling_options,
                }
                prompt = text(length, seed)
                plain = rt.generate(prompt, method="ar", **options).tokens
                for method in ("sd", "psd"):
                    if rt.generate(prompt, method=method, **options, **lengths).tokens != plain:
                        differing.append((length, method, sampling_options))
    assert differing == []


def test_a_reused_prefix_has_the_bits_of_a_fresh_one(directories: dict[str, Path], dtype: str) -> None:
    """A chat that grows, verified in windows as it went, against the same text processed at once."""
    with pyramid_rt.load(directories["three"], device="cpu", dtype=dtype) as rt:
        tier: Any = rt.tiers[-1]
        prompt = text(300, 1)
        for turn in range(3):
            result = rt.generate(prompt, method="psd", max_new_tokens=30, ignore_eos=True)
            assert (result.stats.reused_tokens > 250) == (turn > 0)
            prompt = [*prompt, *result.tokens, *text(17, turn)]
        grown = rt.generate(prompt, method="psd", max_new_tokens=30, ignore_eos=True)
        assert grown.stats.reused_tokens > 350
        cache = tier.cache.buffer[:, :, :, : len(prompt)].clone()
        for one in rt.tiers:
            one.reset()
        fresh = rt.generate(prompt, method="ar", max_new_tokens=30, ignore_eos=True)
        assert fresh.stats.reused_tokens == 0
        assert_equal_tensors(tier.cache.buffer[:, :, :, : len(prompt)], cache)
        assert fresh.tokens == grown.tokens


@pytest.mark.parametrize("vocab_size", [61, 257, 4099])
def test_a_position_has_one_row_of_noise(vocab_size: int) -> None:
    """Wherever a request began, and however many rows are taken at a time."""
    seed = torch.tensor([11, 7])
    expected = torch.cat(
        [sampling.own_noise(seed, torch.arange(at, at + 16), vocab_size) for at in range(0, 320, 16)]
    )
    for first, counts in ((0, [1] * 300), (5, [3, 1, 70, 2, 9, 33] * 2), (150, [64, 64])):
        rows, at = _NoiseRows(), first
        for count in counts:
            found = rows.take(seed, at, torch.Size((count, vocab_size)))
            assert_equal_tensors(found, expected[at : at + count])
            at += max(count - 2, 1)
