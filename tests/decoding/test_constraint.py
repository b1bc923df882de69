"""First tokens under a constraint, on table tiers: the masked distribution, and the same text by any rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.device_tables import DeviceTableTier
from helpers.tables import TableTier, random_tables

from pyramid_rt import Match, Rejection, SamplingParams
from pyramid_rt.decoding.chains import build_plan
from pyramid_rt.decoding.engine import Engine
from pyramid_rt.decoding.generation import Generation
from pyramid_rt.decoding.healing import draw
from pyramid_rt.decoding.place import HostPlace
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.state import RoundPlan, State

CPU = torch.device("cpu")
VOCAB, MAX_SEQ = 4, 80
PROMPT = [1, 2, 0]


@dataclass(frozen=True)
class Allowed:
    """One set of ids for each token."""

    sets: tuple[tuple[int, ...], ...]

    def allowed(self) -> Sequence[int]:
        return self.sets[0]

    def after(self, token_id: int) -> Allowed | None:
        assert token_id in self.sets[0]
        return Allowed(self.sets[1:]) if len(self.sets) > 1 else None


def generation(
    kind: Any,
    rules: tuple[Rule, ...],
    params: SamplingParams,
    sets: Any,
    *,
    host: bool = False,
    seed: int = 5,
) -> list[list[int]]:
    """The commits of a generation."""
    tables = random_tables(len(rules) + 1, seed=7)
    tiers = [kind(f"t{i}", table, max_seq=MAX_SEQ) for i, table in enumerate(tables)]
    engine = Engine(tiers, build_plan(params, rules, host_control=host), VOCAB, MAX_SEQ, HostPlace(CPU))
    run = Generation(engine, [0.0] * len(rules), params, seed, PROMPT, [3], constraint=Allowed(sets))
    commits = [run.start().tokens]
    while not run.finished:
        commits.append(run.advance().tokens)
    run.close()
    return commits


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("sets", [((0, 1),), ((2,), (0, 1), (1, 2))])
def test_rounds_of_all_kinds_go_on_alike(temperature: float, sets: Any) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=temperature, draft_length=2, qualifier_length=3)
    for seed in range(3):
        texts = []
        for kind, rules, host in (
            (TableTier, (), True),
            (TableTier, (Match(),), True),
            (TableTier, (Match(), Match()), False),
            (DeviceTableTier, (), False),
            (DeviceTableTier, (Match(), Match()), False),
        ):
            commits = generation(kind, rules, params, sets, host=host, seed=seed)
            assert len(commits[0]) == len(sets)
            assert all(token in allowed for token, allowed in zip(commits[0], sets, strict=True))
            texts.append([token for commit in commits for token in commit])
        # The tables of a chain end with the same target.
        assert all(text == texts[0] for text in texts[1:]), texts


def test_rejection_goes_on_from_the_same_tokens() -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.8, draft_length=2, qualifier_length=3)
    plain = generation(TableTier, (), params, ((0, 1), (2, 1)))
    other = generation(DeviceTableTier, (Rejection(), Rejection()), params, ((0, 1), (2, 1)))
    assert other[0] == plain[0]


def test_the_limit_and_stop_tokens_end_the_drawing() -> None:
    def tokens(sets: Any, **options: Any) -> list[list[int]]:
        return generation(TableTier, (Match(),), SamplingParams(draft_length=2, **options), sets)

    assert tokens(((0,), (1,), (2,)), max_new_tokens=2) == [[0, 1]]
    assert tokens(((0,), (3,), (2,)), max_new_tokens=9) == [[0, 3]]
    assert tokens(((0,),), max_new_tokens=1) == [[0]]
    assert len(tokens(((0,),), max_new_tokens=2)) == 2


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.7}])
def test_drawn_tokens_have_the_masked_distribution(filters: dict[str, Any]) -> None:
    params, samples, allowed = SamplingParams(temperature=0.7, **filters), 3000, (0, 2, 3)
    target = random_tables(1, seed=3)[0]
    tier = TableTier("target", target, max_seq=MAX_SEQ)
    state = State.allocate(RoundPlan((), (), None, False, True, params.filters), MAX_SEQ, VOCAB, CPU)
    state.temperature.fill_(params.temperature)
    state.top_k.fill_(params.top_k)
    state.top_p.fill_(params.top_p)
    counts: Counter[int] = Counter()
    for seed in range(samples):
        state.seed.copy_(torch.tensor([seed, 1]))
        drawn = draw(tier, state, Allowed((allowed,)), PROMPT, 0, 9, (), filters=params.filters)
        counts[drawn.tokens[0]] += 1
        assert torch.equal(drawn.rows[0], target[2, 0])
    # By hand: scale, leave the others out, then the filters on what is left.
    scores = {token: target[2, 0, token].item() / 0.7 for token in allowed}
    weights = {token: torch.tensor(score).exp().item() for token, score in scores.items()}
    ranked = sorted(weights, key=lambda token: -weights[token])
    total, kept, before = sum(weights.values()), [], 0.0
    for rank, token in enumerate(ranked):
        if (params.top_k and rank >= params.top_k) or before >= params.top_p:
            break
        kept.append(token)
        before += weights[token] / total
    expected = {token: weights[token] / sum(weights[one] for one in kept) for token in kept}
    assert set(counts) <= set(kept)
    distance = sum(abs(counts[token] / samples - expected.get(token, 0.0)) for token in range(VOCAB)) / 2
    assert distance < 0.03  # six standard deviations of 3,000 draws


def test_a_wrong_mask_would_be_seen() -> None:
    """The power of the test above: the distribution without the mask is far from the masked one."""
    row = random_tables(1, seed=3)[0][2, 0] / 0.7
    masked = row.clone()
    masked[1] = -torch.inf
    assert (row.softmax(-1) - masked.softmax(-1)).abs().sum() / 2 > 0.06
