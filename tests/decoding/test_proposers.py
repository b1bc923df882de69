"""Proposers: what is offered without a model changes speed, never the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.tables import (
    VOCAB,
    TableTier,
    empirical_joint,
    exact_joint,
    noise_floor,
    random_tables,
    total_variation,
)
from torch import Tensor

from pyramid_rt import Fuzzy, InputError, Match, Pyramid, Rejection
from pyramid_rt.decoding.proposers import Proposal
from pyramid_rt.decoding.rounds import torch_steps
from pyramid_rt.tuning.search import TuneOptions, tune

PROMPT = [1, 2]
NEW = 9


class Replayer:
    """Offers what a table says for each position: some of it right, some wrong, sometimes nothing."""

    name = "replayer"

    def __init__(self, table: Sequence[int], counts: Sequence[int]) -> None:
        self.table, self.counts = torch.tensor(table), torch.tensor(counts)
        self.rows = self.resets = 0

    def propose(self, tokens: Tensor, end: int | Tensor, count: int) -> Proposal:
        places = (torch.arange(count) + end).clamp(max=self.table.shape[0] - 1)
        offered = (
            self.counts[end] if isinstance(end, int) else self.counts.gather(0, end.reshape(1)).squeeze(0)
        )
        return Proposal(self.table[places], offered.clamp(max=count))

    def heard(self, raw: Tensor, first: int | Tensor) -> None:
        assert raw.shape[-1] == VOCAB
        self.rows += raw.shape[0]

    def reset(self) -> None:
        self.resets += 1


def tiers_of(count: int) -> list[TableTier]:
    tables = random_tables(count, seed=4)
    return [TableTier(f"tier {level}", table, max_seq=32) for level, table in enumerate(tables)]


def replayer_for(tokens: Sequence[int]) -> Replayer:
    """Offers the text `tokens` with every third token wrong, 0 to 3 at a time."""
    table = [
        *PROMPT,
        *((token + 1) % VOCAB if place % 3 == 2 else token for place, token in enumerate(tokens)),
    ]
    return Replayer(table, [place % 4 for place in range(len(table) + 1)])


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("tiers", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_plain_decoding(control: str, tiers: int, temperature: float) -> None:
    """Also with a fuzzy stage above the proposer's, which hands up what stood by match."""
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "temperature": temperature,
        "seed": 5,
        "lengths": (3, 4)[:tiers],
    }
    target = tiers_of(tiers)[-1]
    plain = Pyramid([target], control=control).generate(PROMPT, method="ar", **{**options, "lengths": None})
    proposer = replayer_for(plain.tokens)
    pyramid = Pyramid([proposer, *tiers_of(tiers)], rules=[Match(), Match()][:tiers], control=control)
    found = pyramid.generate(PROMPT, **options)
    assert found.tokens == plain.tokens
    stats = found.stats.tiers[0]
    assert stats.accepted is not None
    assert stats.proposed is not None
    assert 0 < stats.accepted < stats.proposed
    assert stats.forwards == 0
    assert proposer.rows > 0
    traced = pyramid.generate(PROMPT, trace=True, **options)
    assert traced.tokens == plain.tokens
    assert traced.trace is not None
    judged = [one for record in traced.trace.rounds if record.level == 1 for one in record.proposed]
    assert len(judged) == stats.proposed
    assert sum(one.stood for one in judged) == stats.accepted
    assert {one.proposed_by for one in judged} == {"replayer"}
    if tiers == 1:
        assert (found.stats.tokens_per_target_forward or 0.0) > 1.0


@pytest.mark.parametrize("control", ["host", "device"])
def test_a_proposer_that_offers_nothing_costs_nothing_but_rounds(control: str) -> None:
    (target,) = tiers_of(1)
    plain = Pyramid([target], control=control).generate(PROMPT, max_new_tokens=NEW)
    silent = Replayer([0] * 40, [0] * 40)
    for rule in (Match(), Rejection()):
        found = Pyramid([silent, target], rules=[rule], control=control).generate(PROMPT, max_new_tokens=NEW)
        assert found.tokens == plain.tokens
        assert found.stats.tiers[0].proposed == 0
        assert found.stats.tiers[0].acceptance_rate is None
        assert found.stats.tiers[1].forwards == NEW - 1
        pyramid = Pyramid([silent, target], rules=[rule], control=control)
        traced = pyramid.generate(PROMPT, max_new_tokens=NEW, trace=True)
        assert traced.trace is not None
        assert [one.how for one in traced.trace] == ["first", *["bonus"] * (NEW - 1)]


def sampled(runs: int) -> Tensor:
    """Tokens [runs, 3] under rejection, of a proposer that insists on one text."""
    (target,) = tiers_of(1)
    pyramid = Pyramid([Replayer([1, 2, 3, 0, 1, 0], [3] * 8), target], rules=[Rejection()])
    found = [
        pyramid.generate(PROMPT, max_new_tokens=3, temperature=1.0, seed=seed).tokens for seed in range(runs)
    ]
    return torch.tensor(found)


def test_rejection_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same test fails where a proposer's tokens pass for draws from an even distribution."""
    runs = 2500
    exact = exact_joint(random_tables(1, seed=4)[0], PROMPT, 1, 3)
    bound = 1.5 * noise_floor(exact, runs)
    assert total_variation(empirical_joint(sampled(runs)), exact) < bound
    keep = torch_steps.TorchSteps._keep_rows

    def even(self: Any, level: int, offset: Any, raw: Tensor, processed: Tensor | None) -> None:
        keep(self, level, offset, raw, torch.full_like(raw, -math.log(VOCAB)))

    monkeypatch.setattr(torch_steps.TorchSteps, "_keep_rows", even)
    assert total_variation(empirical_joint(sampled(runs)), exact) > 2 * bound


def test_what_does_not_go_with_a_proposer_is_refused() -> None:
    proposer, tiers = Replayer([0] * 40, [1] * 40), tiers_of(2)
    with pytest.raises(InputError, match="'fuzzy' compares distributions, and 'replayer' is a proposer"):
        Pyramid([proposer, tiers[-1]], rules=[Fuzzy(0.1)]).generate(PROMPT)
    with pytest.raises(InputError, match="'replayer' is a proposer: it may only stand below"):
        Pyramid([tiers[0], proposer])
    with pytest.raises(InputError, match="'replayer' is a proposer: it may only stand below"):
        Pyramid([proposer])
    with pytest.raises(InputError, match="tune prices chains of models only"):
        tune(Pyramid([proposer, tiers[-1]]), [PROMPT], TuneOptions())


def test_a_token_out_of_the_vocabulary_is_named() -> None:
    proposer, (target,) = Replayer([VOCAB + 3] * 40, [2] * 40), tiers_of(1)
    with pytest.raises(InputError, match=r"'replayer' offered 2 tokens, \[7, 7\] among them"):
        Pyramid([proposer, target], rules=[Match()]).generate(PROMPT, max_new_tokens=4)


def test_a_tree_is_refused_until_steps_verify_one() -> None:
    (target,) = tiers_of(1)

    class Branching(Replayer):
        def propose(self, tokens: Tensor, end: int | Tensor, count: int) -> Proposal:
            return Proposal(torch.zeros(count, dtype=torch.int64), count, torch.full((count,), -1))

    with pytest.raises(InputError, match="'replayer' offered a tree, expected a chain"):
        Pyramid([Branching([0], [0]), target], rules=[Match()]).generate(PROMPT, max_new_tokens=4)


def test_the_window_of_a_proposal() -> None:
    """Two tokens of the text, then a root with two children, one of which has a child, and another root."""
    assert Proposal(torch.tensor([1, 2]), 2).tree(1) is None
    tree = Proposal(torch.tensor([1, 2, 3, 0, 1]), 5, torch.tensor([-1, 0, 0, 2, -1])).tree(2)
    assert tree is not None
    assert tree.depths.tolist() == [0, 1, 2, 3, 3, 4, 2]
    assert tree.ancestors.tolist() == [0b1, 0b11, 0b111, 0b1111, 0b10111, 0b110111, 0b1000011]
