"""A rule of one's own: nothing but the rule itself needs to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers.tables import TableTier, random_tables

from pyramid_rt import Fuzzy, InputError, Match, Pyramid, Rejection
from pyramid_rt.decoding.rules import Evidence, Replayed, RuleFacts, Verdict
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.tuning.replay import Trace, replay

PROMPT = [1, 2]


@dataclass(frozen=True, slots=True)
class Likely(RuleFacts):
    """A token stands while it is among the verifying tier's k most likely ones."""

    k: int
    name: ClassVar[str] = "likely"

    def judge(self, evidence: Evidence) -> Verdict:
        best = evidence.raw.topk(self.k, -1).indices
        return Verdict((best == evidence.proposed.unsqueeze(-1)).any(-1), None)

    def captured(self) -> Likely:
        return self


@dataclass(frozen=True, slots=True)
class ReplayedLikely(Likely):
    """The same, which tells the tuner to take it for a match."""

    replayed: ClassVar[Replayed] = Replayed(None, match=True)


def pyramid_of(rules: list[object], control: str = "host") -> Pyramid:
    tables = random_tables(len(rules) + 1, seed=4)
    tiers = [TableTier(f"tier {level}", table, max_seq=64) for level, table in enumerate(tables)]
    return Pyramid(tiers, rules=rules, control=control)  # type: ignore[arg-type]


@pytest.mark.parametrize("control", ["host", "device"])
def test_its_bounds_are_what_they_should_be(control: str) -> None:
    """Of the one most likely token it is a match; of all, everything stands and the draft writes the text."""
    options: dict[str, Any] = {"max_new_tokens": 30, "draft_length": 3}
    match = pyramid_of([Match()], control).generate(PROMPT, **options)
    assert pyramid_of([Likely(1)], control).generate(PROMPT, **options).tokens == match.tokens
    every = pyramid_of([Likely(4)], control).generate(PROMPT, **options, temperature=1.0, seed=3)
    assert every.stats.tiers[0].acceptance_rate == 1.0
    assert every.stats.differs is not None
    assert every.stats.differs > 0


def test_it_may_stand_below_a_lossless_one() -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "lengths": (2, 4), "temperature": 1.0, "seed": 3}
    plain = pyramid_of([]).generate(PROMPT, **{**options, "lengths": None})
    tables = random_tables(3, seed=4)
    tiers = [TableTier(f"tier {level}", table, max_seq=64) for level, table in enumerate(tables)]
    target = Pyramid(tiers[-1:]).generate(PROMPT, **{**options, "lengths": None})
    assert len(plain.tokens) == 30
    found = Pyramid(tiers, rules=[Likely(2), Match()]).generate(PROMPT, **options)
    assert found.tokens == target.tokens
    assert found.stats.differs is None


def test_the_tuner_goes_by_its_facts() -> None:
    trace = Trace(own=((1, 2, 3, 1), (1, 2, 0, 1)), divergence={(0, 1): (0.0, 0.0, 1.0, 0.0)})

    def plan(rule: object) -> RoundPlan:
        return RoundPlan((rule,), (2,), None, host_control=True, sampled=False, filters=False)  # type: ignore[arg-type]

    assert replay(trace, plan(ReplayedLikely(2)), (0, 1)) == replay(trace, plan(Match()), (0, 1))
    with pytest.raises(InputError, match="rule 'likely' cannot be tuned"):
        replay(trace, plan(Likely(2)), (0, 1))


def test_facts_of_the_rules_there_are() -> None:
    assert Fuzzy(0.2).captured() == Fuzzy(0.0)
    assert Fuzzy(0.2, or_match=True).kernel_name == "fuzzy_or_match"
    assert [rule.lossless for rule in (Match(), Rejection(), Fuzzy(0.1))] == [True, True, False]
    assert not Fuzzy(0.1).needs_processed
    assert Fuzzy(0.1, divergence_on="processed").needs_below_processed
    assert torch.tensor([Match().threshold, Fuzzy(0.25).threshold]).tolist() == [0.0, 0.25]
