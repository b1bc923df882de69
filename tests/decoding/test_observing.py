"""Rounds of kernels that are watched tell what the steps in torch tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.device_tables import DeviceTableTier
from helpers.oracle import DEVICE
from helpers.tables import TableTier, random_tables

from pyramid_rt import Fuzzy, Match, Pyramid, Rejection
from pyramid_rt.decoding.engine import Engine
from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.result import GenerationResult
from pyramid_rt.trace import JudgedToken

MAX_SEQ = 80
CHAINS: tuple[tuple[Rule, ...], ...] = (
    (),
    (Match(),),
    (Match(), Match()),
    (Fuzzy(0.1, or_match=True), Match()),
    (Fuzzy(0.2), Fuzzy(0.3, "kl", "processed")),
    (Rejection(),),
    (Fuzzy(0.2), Rejection()),
)


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def decoded(kind: Any, rules: Sequence[Rule], **options: Any) -> GenerationResult:
    with torch.device("cpu"):
        tables = [table.to(DEVICE) for table in random_tables(len(rules) + 1, seed=5)]
    tiers = [kind(f"t{place}", table, max_seq=MAX_SEQ) for place, table in enumerate(tables)]
    rt = Pyramid(tiers, rules, control="device", eos_token_ids=[3])
    result = rt.generate([1, 2, 0], lengths=(2, 3)[: len(rules)], max_new_tokens=14, seed=6, **options)
    engines: list[Engine] = list(rt._kept.values())
    assert isinstance(engines[0]._rounds, KernelRoundRunner) == (kind is DeviceTableTier)
    return result


def rounded(judged: JudgedToken) -> JudgedToken:
    """The same without the last bits of its numbers: a kernel adds in an order of its own."""
    numbers = {
        name: None
        if getattr(judged, name) is None
        else pytest.approx(getattr(judged, name), rel=1e-4, abs=1e-6)
        for name in ("divergence", "p", "q", "uniform")
    }
    return replace(judged, **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rules", CHAINS, ids=str)
def test_kernels_and_torch_tell_the_same(rules: tuple[Rule, ...], temperature: float) -> None:
    options = {"temperature": temperature, "ignore_eos": True}
    plain = decoded(DeviceTableTier, rules, **options)
    found = decoded(DeviceTableTier, rules, trace=True, **options)
    expected = decoded(TableTier, rules, trace=True, **options)
    assert plain.tokens == found.tokens == expected.tokens
    assert found.trace is not None
    assert expected.trace is not None
    assert len(found.trace.rounds) == len(expected.trace.rounds)
    for mine, theirs in zip(found.trace.rounds, expected.trace.rounds, strict=True):
        assert replace(mine, proposed=()) == replace(theirs, proposed=())
        # What lies behind a token that fell was judged or not, as it suits the kernels.
        shown = len([one for one in theirs.proposed if one.reason != "behind"])
        assert [one.token for one in mine.proposed] == [one.token for one in theirs.proposed]
        assert list(mine.proposed[:shown]) == [rounded(one) for one in theirs.proposed[:shown]]
    assert [(one.token, one.how, one.accepted_by) for one in found.trace] == [
        (one.token, one.how, one.accepted_by) for one in expected.trace
    ]


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.9, "min_p": 0.05}], ids=str)
def test_with_filters(filters: dict[str, Any]) -> None:
    rules = (Fuzzy(0.2), Rejection())
    runs = [
        decoded(kind, rules, trace=True, temperature=0.9, **filters) for kind in (DeviceTableTier, TableTier)
    ]
    traces = [run.trace for run in runs]
    assert traces[0] is not None
    assert traces[1] is not None
    pairs = zip(traces[0].rounds, traces[1].rounds, strict=True)
    for mine, theirs in pairs:
        shown = len([one for one in theirs.proposed if one.reason != "behind"])
        assert list(mine.proposed[:shown]) == [rounded(one) for one in theirs.proposed[:shown]]
