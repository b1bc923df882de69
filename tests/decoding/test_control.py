"""Under device control nothing in an outer round reads a device value on the host."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.host_reads import no_host_reads
from helpers.tables import TableTier, random_tables

from pyramid_rt import Fuzzy, Match, Pyramid, Rejection
from pyramid_rt.decoding.rounds.torch_steps import TorchRoundRunner
from pyramid_rt.decoding.rules import Rule

RULES = (Match(), Rejection(), Fuzzy(0.1), Fuzzy(0.1, "topk_js", "processed", or_match=True))
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "lengths": (2, 3), "seed": 3, "logprobs": 2}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Every outer round runs under the watch; the list counts them."""
    rounds: list[int | None] = []
    real = TorchRoundRunner.outer_round

    def outer_round(self: TorchRoundRunner, known_end: int | None = None) -> None:
        rounds.append(known_end)
        with no_host_reads():
            real(self, known_end)

    monkeypatch.setattr(TorchRoundRunner, "outer_round", outer_round)
    return rounds


def test_the_watch_sees_reads() -> None:
    x = torch.arange(4)
    for read in (
        lambda: x[1].item(),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: bool(x[0]),
    ):
        with no_host_reads(), pytest.raises(AssertionError, match="reads a device value"):
            read()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rules", list(itertools.product(RULES, RULES)), ids=str)
def test_no_rule_reads(watched: list[int | None], rules: tuple[Rule, ...], temperature: float) -> None:
    tiers = [TableTier(f"t{i}", table, max_seq=60) for i, table in enumerate(random_tables(3, seed=1))]
    rt = Pyramid(tiers, rules, control="device")
    out = rt.generate([0, 1], temperature=temperature, top_k=3, top_p=0.9, **OPTIONS)
    assert len(out.tokens) == 24
    assert len(watched) >= 2


@pytest.mark.parametrize("method", ["ar", "sd", "psd", "psd_f"])
def test_no_model_reads(watched: list[int | None], tiny: Pyramid, method: str) -> None:
    rt = Pyramid(tiny.tiers, tokenizer=tiny.tokenizer, control="device", vocab_size=tiny.vocab_size)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.7, "seed": 2}
    tokens = rt.generate("def f(", method=method, **options).tokens
    assert watched
    assert method == "psd_f" or tokens == rt.generate("def f(", method="ar", **options).tokens


def test_host_control_does_read(watched: list[int | None]) -> None:
    tiers = [TableTier(f"t{i}", table, max_seq=60) for i, table in enumerate(random_tables(3, seed=1))]
    with pytest.raises(AssertionError, match="reads a device value"):
        Pyramid(tiers, [Match(), Match()], control="host").generate([0, 1], **OPTIONS)
