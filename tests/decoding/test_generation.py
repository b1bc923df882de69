"""One generation after another on the same caches: what is reused, and that nobody can tell from the tokens."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tables import TableTier, random_tables

import pyramid_rt
from pyramid_rt import NonFiniteLogitsError, Pyramid
from pyramid_rt.decoding.rounds.recursion import Recursion
from pyramid_rt.decoding.tiers import shared_prefix

TEXT = "def area(width, height):\n    return width * height\n"


@pytest.fixture(scope="module", params=["host", "device"])
def pair(tiny_dir: Path, request: pytest.FixtureRequest) -> tuple[Pyramid, Pyramid]:
    """A pyramid that reuses prefixes and one that never does."""
    options: dict[str, Any] = {"device": "cpu", "control": request.param}
    return (
        pyramid_rt.load(tiny_dir, **options),
        pyramid_rt.load(tiny_dir, prefix_reuse=False, **options),
    )


@contextmanager
def processed(pyramid: Pyramid) -> Iterator[dict[str, int]]:
    """Counts, per tier, the tokens of forwards that give no logits, and of the first that gives some."""
    counts = {tier.name: 0 for tier in pyramid.tiers}
    originals: dict[str, Any] = {}
    tiers: tuple[Any, ...] = pyramid.tiers
    for tier in tiers:
        seen: list[int] = []

        def counting(
            tokens: Any, start: Any, rows: Any, bound: int, tier: Any = tier, seen: Any = seen
        ) -> Any:
            if rows is None or not seen:
                counts[tier.name] += tokens.shape[0]
                seen += [0] * (rows is not None)
            return originals[tier.name](tokens, start, rows, bound)

        originals[tier.name] = tier.forward
        tier.forward = counting
    try:
        yield counts
    finally:
        for tier in tiers:
            del tier.forward


def test_shared_prefix() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_prefix([], [1]) == 0
    assert shared_prefix([1, 2], [1]) == 1
    assert shared_prefix([2], [1]) == 0


@pytest.mark.parametrize("method", ["ar", "sd", "psd", "psd_f"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_growing_chat_is_not_processed_again(
    pair: tuple[Pyramid, Pyramid], method: str, temperature: float
) -> None:
    reusing, fresh = pair
    options: dict[str, Any] = {
        "max_new_tokens": 9, "method": method, "temperature": temperature, "seed": 4, "ignore_eos": True,
    }  # fmt: skip
    text = list(TEXT.encode())
    reusing.generate([7], max_new_tokens=0)
    for turn in range(4):
        first, second = reusing.generate(text, **options), fresh.generate(text, **options)
        assert first.tokens == second.tokens
        assert second.stats.reused_tokens == 0
        if turn:
            # All but at most the last token of the turn before, which no forward may have seen.
            assert len(text) - 12 - 1 <= first.stats.reused_tokens <= len(text) - 12
        text = text + first.tokens + list(b"# next turn\n")


def test_only_what_is_new_goes_through_the_tiers(pair: tuple[Pyramid, Pyramid]) -> None:
    reusing, _ = pair
    text = list(TEXT.encode())
    options: dict[str, Any] = {"max_new_tokens": 6, "method": "psd", "ignore_eos": True}
    reusing.generate([7], max_new_tokens=0)
    whole = reusing.generate(text, **options)
    with processed(reusing) as counts:
        again = reusing.generate(text, **options)
    assert again.tokens == whole.tokens
    # The target must see the last token again for its logits; the others have nothing to catch up on.
    assert again.stats.reused_tokens == len(text) - 1
    assert counts["target"] == 1
    assert counts["draft"] <= 3
    assert counts["qualifier"] <= 10
    with processed(reusing) as counts:
        other = reusing.generate([9, *text], max_new_tokens=1, method="ar")
    assert other.stats.reused_tokens == 0
    assert counts["target"] == len(text) + 1


def test_a_tier_that_sat_out_catches_up(pair: tuple[Pyramid, Pyramid]) -> None:
    reusing, fresh = pair
    text = list(TEXT.encode())
    reusing.generate([7], max_new_tokens=0)
    for method in ("psd", "ar", "psd", "sd", "ar", "psd_f"):
        options: dict[str, Any] = {"max_new_tokens": 7, "method": method, "ignore_eos": True}
        first, second = reusing.generate(text, **options), fresh.generate(text, **options)
        assert first.tokens == second.tokens, method
        text = text + first.tokens


def test_cancelled_stopped_and_failed_calls_leave_the_truth_behind(pair: tuple[Pyramid, Pyramid]) -> None:
    reusing, fresh = pair
    text = list(TEXT.encode())
    options: dict[str, Any] = {"max_new_tokens": 12, "method": "psd", "ignore_eos": True}
    expected = fresh.generate(text, **options)
    with reusing.stream(text, **options) as stream:
        next(iter(stream))
    assert reusing.generate(text, **options).tokens == expected.tokens

    stop = expected.text[4:6]
    cut = reusing.generate(text, stop=[stop], **options)
    assert cut.finish_reason == "stop"
    assert cut.text == expected.text[: expected.text.index(stop)]
    grown = text + cut.tokens + list(b"more")
    assert reusing.generate(grown, **options).tokens == fresh.generate(grown, **options).tokens

    norm: torch.Tensor = reusing.tiers[0].model.norm  # type: ignore[attr-defined]
    kept = norm.clone()
    norm.fill_(math.nan)
    with pytest.raises(NonFiniteLogitsError, match="'draft'"):
        reusing.generate(grown, **options)
    norm.copy_(kept)
    after = reusing.generate(grown, **options)
    assert after.stats.reused_tokens == 0
    assert after.tokens == fresh.generate(grown, **options).tokens


def test_the_device_runs_at_most_one_round_ahead(
    pair: tuple[Pyramid, Pyramid], monkeypatch: pytest.MonkeyPatch
) -> None:
    reusing, _ = pair
    rounds: list[int] = []
    original = Recursion.outer_round

    def counted(self: Recursion[Any], known_end: int | None = None) -> None:
        rounds.append(1)
        original(self, known_end)

    monkeypatch.setattr(Recursion, "outer_round", counted)
    ahead = 1 if reusing.control == "device" else 0
    with reusing.stream(TEXT, method="sd", max_new_tokens=40, ignore_eos=True) as stream:
        pieces = iter(stream)
        next(pieces)
        assert len(rounds) <= 1 + ahead
    assert len(rounds) <= 1 + ahead
    assert stream.result.finish_reason == "cancelled"
    # No round is started of which the host knows that it would find nothing to do.
    rounds.clear()
    result = reusing.generate(TEXT, method="ar", max_new_tokens=8, ignore_eos=True)
    assert len(result.tokens) == 8
    assert len(rounds) == 7


def test_two_hundred_calls_leave_everything_as_it_was(tiny_dir: Path) -> None:
    """Mixed methods, lengths, cancellations and errors: the tokens of a fresh pyramid, and no memory kept."""
    rng = random.Random(3)
    rt = pyramid_rt.load(tiny_dir, device="cpu", max_seq=128)
    fresh = pyramid_rt.load(tiny_dir, device="cpu", max_seq=128, prefix_reuse=False)
    text = list(TEXT.encode())

    def call(index: int) -> None:
        prompt = text[: rng.randrange(1, len(text))]
        options: dict[str, Any] = {
            "method": rng.choice(rt.methods),
            "max_new_tokens": rng.randrange(0, 12),
            "temperature": rng.choice((0.0, 0.9)),
            "seed": index,
        }
        kind = index % 5
        if kind == 1:
            with rt.stream(prompt, **options) as stream:
                for _ in zip(range(2), stream, strict=False):
                    pass
        elif kind == 2:
            with pytest.raises(pyramid_rt.InputError):
                rt.generate([*prompt, 10**6], **options)
        elif kind == 3 and index % 25 == 3:
            norm: torch.Tensor = rt.tiers[-1].model.norm  # type: ignore[attr-defined]
            kept = norm.clone()
            norm.fill_(math.nan)
            with pytest.raises(NonFiniteLogitsError):
                rt.generate(prompt, **{**options, "max_new_tokens": 3})
            norm.copy_(kept)
        else:
            assert rt.generate(prompt, **options).tokens == fresh.generate(prompt, **options).tokens

    def held() -> int:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        # oneDNN's packed matrices show no storage.
        opaque = sum(t.numel() * t.itemsize for t in tensors if t.is_mkldnn)
        plain = [t.untyped_storage() for t in tensors if not t.is_mkldnn]
        return opaque + sum({storage.data_ptr(): storage.nbytes() for storage in plain}.values())

    for index in range(40):
        call(index)
    before = held()
    for index in range(40, 240):
        call(index)
    assert held() <= before + 4096


def test_tables_reuse_too() -> None:
    """A tier is anything that gives logits; a table that was shown a prompt need not be shown it again."""
    tiers = [TableTier(f"tier{i}", table) for i, table in enumerate(random_tables(2, seed=1))]
    rt = Pyramid(tiers, vocab_size=4)
    first = rt.generate([0, 1, 2, 3], max_new_tokens=6, method="sd")
    again = rt.generate([0, 1, 2, 3], max_new_tokens=6, method="sd")
    assert again.tokens == first.tokens
    assert again.stats.reused_tokens == 3
    assert tiers[1].held[:4] == [0, 1, 2, 3]
