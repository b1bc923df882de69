"""The output distribution of the recursion on table tiers against its exact value, for every chain of rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.tables import (
    decode_many,
    empirical_joint,
    exact_joint,
    noise_floor,
    random_tables,
    total_variation,
)
from torch import Tensor

from pyramid_rt.decoding.rounds.torch_steps import TorchRoundRunner, TorchSteps
from pyramid_rt.decoding.rules import Evidence, Fuzzy, Match, Rejection, Rule, Verdict
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.kernels.reference import sampling as ops

RUNS = 100_000
BATCH = 12_500  # runs decoded side by side; more only spills the cache
PROMPT = (1, 2)
TABLES = {count: random_tables(count, seed=count) for count in (1, 2, 3, 4)}
LENGTHS = {1: (), 2: (2,), 3: (2, 2), 4: (1, 2, 2)}
FUZZY = Fuzzy(0.08)
LOWER: tuple[Rule, ...] = (Match(), Rejection(), FUZZY, Fuzzy(0.08, or_match=True))
# Exact samples exceed 1.5 times their mean distance less than once in 10^9 tries; the biases are 4 times and more.
MARGIN = 1.5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decode(
    rules: Sequence[Rule], inner_rounds: int | None = 1, make: type[TorchRoundRunner] = TorchRoundRunner
) -> Tensor:
    count = len(rules) + 1
    plan = RoundPlan(
        tuple(rules), LENGTHS[count], inner_rounds, host_control=False, sampled=True, filters=False
    )
    seeds = torch.arange(RUNS) * 0x9E3779B97F4A7C1 + 17
    batches = seeds.split(BATCH)
    return torch.cat([decode_many(TABLES[count], plan, batch, prompt=PROMPT, make=make) for batch in batches])


def distances(tokens: Tensor, count: int) -> list[float]:
    """For tokens 1-3 and 4-6: distance from the target's exact joint, in units of the noise floor."""
    found = []
    for first in (1, 4):
        exact = exact_joint(TABLES[count][-1], PROMPT, first, 3)
        measured = empirical_joint(tokens[:, first - 1 : first + 2]).double()
        found.append(total_variation(measured, exact) / noise_floor(exact, RUNS))
    return found


@pytest.fixture(scope="module")
def plain() -> dict[int, Tensor]:
    """Plain decoding of the target of each pyramid, same seeds."""
    return {}


def plain_tokens(cache: dict[int, Tensor], count: int) -> Tensor:
    if count not in cache:
        plan = RoundPlan((), (), None, host_control=False, sampled=True, filters=False)
        seeds = torch.arange(RUNS) * 0x9E3779B97F4A7C1 + 17
        cache[count] = torch.cat(
            [decode_many(TABLES[count][-1:], plan, batch, prompt=PROMPT) for batch in seeds.split(BATCH)]
        )
    return cache[count]


def names(rules: Sequence[Rule]) -> str:
    return "-".join(rule.name + ("+match" if getattr(rule, "or_match", False) else "") for rule in rules)


def test_plain_decoding_is_exact(plain: dict[int, Tensor]) -> None:
    assert max(distances(plain_tokens(plain, 3), 3)) < MARGIN


def test_sd_rejection_is_exact() -> None:
    assert max(distances(decode((Rejection(),)), 2)) < MARGIN


@pytest.mark.parametrize("inner_rounds", [None, 2], ids=["until", "fixed"])
@pytest.mark.parametrize("lower", LOWER, ids=lambda rule: names([rule]))
def test_three_tiers_with_rejection_on_top_are_exact(lower: Any, inner_rounds: int | None) -> None:
    assert max(distances(decode((lower, Rejection()), inner_rounds), 3)) < MARGIN


@pytest.mark.parametrize("lower", list(itertools.product(LOWER, LOWER)), ids=names)
def test_four_tiers_with_rejection_on_top_are_exact(lower: Any) -> None:
    assert max(distances(decode((*lower, Rejection())), 4)) < MARGIN


@pytest.mark.parametrize("lower", LOWER, ids=lambda rule: names([rule]))
def test_match_on_top_gives_the_tokens_of_plain_decoding(lower: Any, plain: dict[int, Tensor]) -> None:
    assert_equal_tensors(decode((lower, Match()), None), plain_tokens(plain, 3))


def test_four_tiers_with_match_on_top_give_the_tokens_of_plain_decoding(plain: dict[int, Tensor]) -> None:
    assert_equal_tensors(decode((Rejection(), FUZZY, Match())), plain_tokens(plain, 4))


def test_fuzzy_on_top_is_lossy() -> None:
    # Were it not, the tests above would not be testing anything about fuzzy rules.
    assert min(distances(decode((Match(), Fuzzy(0.3))), 3)) > 2 * MARGIN


class OwnInsteadOfEffective(TorchSteps):
    """The tempting shortcut: hand up the tier's own distribution whatever the token was drawn from."""

    def _effective_rows(
        self, verdict: Verdict, evidence: Evidence, processed: Tensor | None, prefix: Tensor
    ) -> Tensor | None:
        return processed


class OwnInsteadOfEffectiveRounds(TorchRoundRunner):
    steps_class = OwnInsteadOfEffective


def test_power_handing_up_the_own_distribution_is_seen() -> None:
    assert max(distances(decode((FUZZY, Rejection()), make=OwnInsteadOfEffectiveRounds), 3)) > 2 * MARGIN


def test_power_sharing_the_acceptance_word_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "PURPOSE_ACCEPT", ops.PURPOSE_OWN)
    assert max(distances(decode((Rejection(),)), 2)) > 2 * MARGIN


def test_power_leaving_the_stage_out_of_the_key_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.random_words

    def without_stage(seed: Tensor, positions: Tensor, purpose: int, stage: int, count: int) -> Tensor:
        return real(seed, positions, purpose, 0, count)

    monkeypatch.setattr(ops, "random_words", without_stage)
    assert max(distances(decode((Rejection(), Rejection())), 3)) > 2 * MARGIN
