"""Rounds of the recursion on table tiers: ends, limits, counters, and that control does not change tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.tables import VOCAB, TableTier, random_tables
from torch import Tensor

from pyramid_rt import Fuzzy, InputError, Match, NonFiniteLogitsError, Pyramid, Rejection
from pyramid_rt.decoding.rounds.torch_steps import _NoiseRows
from pyramid_rt.decoding.rules import Rule, rows_needed
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.kernels.reference import sampling as ops

EOS = 3
RULES = (Match(), Rejection(), Fuzzy(0.1), Fuzzy(0.1, or_match=True), Fuzzy(0.4, "kl", "processed"))


def make(
    tables: Sequence[Tensor],
    rules: Sequence[Rule] | None = None,
    control: str = "host",
    max_seq: int = 200,
    **options: Any,
) -> Pyramid:
    tiers = [TableTier(f"tier{i}", table, max_seq=max_seq) for i, table in enumerate(tables)]
    return Pyramid(tiers, rules, control=control, **options)


def constant(token: int) -> Tensor:
    """A table that always continues with `token`."""
    table = torch.zeros(VOCAB, VOCAB, VOCAB)
    table[..., token] = 9.0
    return table


def cycle(*, break_at: int | None = None, to: int = 0) -> Tensor:
    """A table whose greedy continuation counts 0, 1, 2, 3, 0, ...; after `break_at` it goes to `to`."""
    table = torch.zeros(VOCAB, VOCAB, VOCAB)
    for last in range(VOCAB):
        table[:, last, to if last == break_at else (last + 1) % VOCAB] = 9.0
    return table


def chains() -> Iterator[tuple[Rule, ...]]:
    for count in (2, 3):
        yield from itertools.product(RULES, repeat=count - 1)
    yield (Match(), Fuzzy(0.1), Rejection())
    yield (Rejection(), Rejection(), Fuzzy(0.1), Match())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rules", list(chains()), ids=lambda rules: "-".join(rule.name for rule in rules))
def test_host_and_device_control_give_the_same_tokens_and_statistics(
    rules: tuple[Rule, ...], temperature: float
) -> None:
    count = len(rules) + 1
    tables = random_tables(count, seed=5)
    lengths = (2, 3, 3, 3)[: count - 1]
    results = []
    for control in ("host", "device"):
        rt = make(tables, rules, control, eos_token_ids=[EOS])
        results.append(
            [
                rt.generate(
                    [1, 2],
                    max_new_tokens=23,
                    temperature=temperature,
                    seed=seed,
                    lengths=lengths,
                    inner_rounds=2,
                )
                for seed in range(6)
            ]
        )
    for host, device in zip(*results, strict=True):
        assert host.tokens == device.tokens
        assert host.finish_reason == device.finish_reason
        for mine, theirs in zip(host.stats.tiers, device.stats.tiers, strict=True):
            assert (mine.forwards, mine.proposed, mine.accepted, mine.survived, mine.block_efficiency) == (
                theirs.forwards, theirs.proposed, theirs.accepted, theirs.survived, theirs.block_efficiency,
            )  # fmt: skip


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 3, "top_p": 0.9}]
)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_lossless_methods_give_the_tokens_of_ar(temperature: float, filters: dict[str, Any]) -> None:
    rt = make(random_tables(3, seed=8), eos_token_ids=[EOS])
    for seed in range(12):
        options: dict[str, Any] = {"max_new_tokens": 40, "temperature": temperature, "seed": seed, **filters}
        plain = rt.generate([0, 1], method="ar", **options).tokens
        assert rt.generate([0, 1], method="sd", **options).tokens == plain
        for tau in (0.0, 0.1, 5.0):
            out = rt.generate([0, 1], method="psd", qualifier_threshold=tau, **options)
            assert out.tokens == plain


def test_until_and_fixed_agree_under_match() -> None:
    rt = make(random_tables(3, seed=2))
    for seed in range(5):
        options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": seed, "method": "psd"}
        tokens = rt.generate([0, 1], **options).tokens
        for inner_rounds in (1, 2, 3):
            assert rt.generate([0, 1], inner_rounds=inner_rounds, **options).tokens == tokens


def test_all_accept() -> None:
    rt = make([cycle(), cycle(), cycle()])
    out = rt.generate([0], method="psd", max_new_tokens=1 + 3 * 16, draft_length=4, qualifier_length=11)
    assert out.tokens == [(1 + i) % 4 for i in range(49)]
    draft, qualifier, target = out.stats.tiers
    # Inner rounds of 4 + 1 until 11 stand: 15, and the target's bonus makes 16 a round.
    assert (target.forwards, qualifier.forwards, draft.forwards) == (3, 9, 36)
    assert (qualifier.proposed, qualifier.accepted, qualifier.mean_accepted) == (45, 45, 15.0)
    assert (draft.proposed, draft.acceptance_rate, draft.block_efficiency) == (36, 1.0, 1.0)
    assert (draft.survived, qualifier.survived, target.survived) == (36, 9, 3)
    assert out.stats.tokens_per_target_forward == 16.0


def test_all_reject() -> None:
    rt = make([constant(0), constant(1), constant(2)])
    lengths: dict[str, Any] = {"draft_length": 3, "qualifier_length": 2}
    out = rt.generate([0], method="psd", max_new_tokens=6, qualifier_threshold=0.0, **lengths)
    assert out.tokens == [2] * 6
    draft, qualifier, target = out.stats.tiers
    # Each round: two inner rounds, each rejecting at once and correcting; then the target rejects at once. Room
    # for 5, 4, 3, 2 and 1 tokens cuts the bursts; the last round has no second inner round.
    bursts = (3 + 3) + (3 + 3) + (3 + 2) + (2 + 1) + 1
    assert (target.forwards, qualifier.forwards, draft.forwards) == (5, 9, bursts)
    assert (draft.accepted, qualifier.accepted) == (0, 0)
    assert (draft.survived, qualifier.survived, target.survived) == (0, 0, 5)
    assert out.stats.tokens_per_target_forward == 1.0


def test_statistics_by_hand() -> None:
    # The draft breaks the cycle after 1: of each 0 1 2 3 it proposes ... 1 -> 0 wrongly.
    rt = make([cycle(break_at=1), cycle()])
    out = rt.generate([1], method="sd", max_new_tokens=9, draft_length=3)
    # Prefill gives 2. Rounds: 3 0 1 (stand) + bonus 2; 3 0 1 + bonus 2: nine tokens in two rounds.
    assert out.tokens == [2, 3, 0, 1, 2, 3, 0, 1, 2]
    draft, target = out.stats.tiers
    assert (draft.proposed, draft.accepted, target.forwards) == (6, 6, 2)
    out = rt.generate([0], method="sd", max_new_tokens=9, draft_length=3)
    # Prefill 1; draft 0 falls at once -> correction 2; then 3 0 1 + 2; then 3 0 (room for 3: 3 0 1, no bonus).
    assert out.tokens == [1, 2, 3, 0, 1, 2, 3, 0, 1]
    draft, target = out.stats.tiers
    assert (draft.proposed, draft.accepted, draft.forwards, target.forwards) == (9, 6, 9, 3)
    assert draft.position_acceptance == 6 / 7
    assert draft.block_efficiency == (6 + 2) / (9 + 3)
    assert draft.mean_accepted == 2.0
    assert out.stats.tokens_per_target_forward == 8 / 3


def test_differs_counts_what_is_not_the_targets_own() -> None:
    rt = make([constant(0), cycle()])
    out = rt.generate([0], method="fsd", target_threshold=5.0, max_new_tokens=1 + 10, draft_length=4)
    # Every proposal stands whatever it is: four times 0, then the target's own after 0 0, which is 1.
    assert out.tokens == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    # In each verify the target's own tokens are 2 1 1 1 1: all four zeros differ.
    assert out.stats.differs == 8 / 10
    assert rt.generate([0], method="sd", max_new_tokens=5).stats.differs is None


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("method", ["ar", "sd", "fsd", "psd", "psd_a", "psd_f"])
def test_end_of_sequence_inside_a_block(method: str, control: str) -> None:
    rt = make([cycle(), cycle(), cycle()], control=control, eos_token_ids=[EOS])
    out = rt.generate([3, 0], method=method, max_new_tokens=50)
    assert (out.tokens, out.finish_reason) == ([1, 2, 3], "stop")
    out = rt.generate([3, 0], method=method, max_new_tokens=9, ignore_eos=True)
    assert (out.tokens, out.finish_reason) == ([1, 2, 3, 0, 1, 2, 3, 0, 1], "length")
    out = rt.generate([3, 0], method=method, max_new_tokens=50, stop_token_ids=[2])
    assert (out.tokens, out.finish_reason) == ([1, 2], "stop")


@pytest.mark.parametrize("control", ["host", "device"])
def test_a_rejected_end_of_sequence_does_not_end(control: str) -> None:
    # Lower tiers want to end after 1, the target goes on.
    ending = cycle(break_at=1, to=EOS)
    rt = make([ending, ending, cycle()], control=control, eos_token_ids=[EOS])
    out = rt.generate([0], method="psd", max_new_tokens=50)
    assert (out.tokens, out.finish_reason) == ([1, 2, 3], "stop")


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("method", ["ar", "sd", "psd", "psd_f"])
def test_limits_in_the_middle_of_a_block(method: str, control: str) -> None:
    rt = make([cycle(), cycle(), cycle()], control=control, max_seq=20)
    for most in range(8):
        out = rt.generate([0], method=method, max_new_tokens=most)
        assert (out.tokens, out.finish_reason) == ([(1 + i) % 4 for i in range(most)], "length")
    full = rt.generate([0, 1, 2], method=method, max_new_tokens=100)
    assert (len(full.tokens), full.finish_reason) == (17, "length")
    assert rt.generate([i % 4 for i in range(19)], method=method).tokens == [3]


def test_draft_length_one_and_inner_round_of_one() -> None:
    tables = random_tables(3, seed=4)
    rt = make(tables)
    plain = rt.generate([0, 1], method="ar", max_new_tokens=20).tokens
    assert (
        rt.generate([0, 1], method="psd", draft_length=1, qualifier_length=1, max_new_tokens=20).tokens
        == plain
    )


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("control", ["host", "device"])
def test_non_finite_logits_are_named_and_nothing_is_lost(
    level: int, value: Any, temperature: float, control: str
) -> None:
    tables = [cycle(), cycle(), cycle()]
    rt = make(tables, control=control)
    options: dict[str, Any] = {
        "method": "psd",
        "max_new_tokens": 40,
        "draft_length": 2,
        "qualifier_length": 4,
        "seed": 1,
    }
    expected = rt.generate([3], temperature=temperature, **options).tokens
    bad: Any = rt.tiers[level]
    healthy = bad.logits
    bad.logits = healthy.clone()
    # The row after 1 2 is broken. Prompt 3 stands at 0, then come 0 1 2: it decides positions 4, 8, 12, ...
    bad.logits[1, 2] = value
    with pytest.raises(NonFiniteLogitsError, match=f"tier{level}") as caught:
        rt.generate([3], temperature=0.0, **options)
    # The draft is asked for 2 3 | 5 6 | 9 10 | 12: at 4 and 8 stand the bonuses of the qualifier and the target.
    assert caught.value.position == (12 if level == 0 else 4)
    assert caught.value.partial is not None
    assert caught.value.partial.tokens == ([0, 1, 2, 3, 0, 1, 2, 3] if level == 0 else [0])
    bad.logits = healthy
    assert rt.generate([3], temperature=temperature, **options).tokens == expected


def test_minus_infinity_among_finite_logits_is_legal() -> None:
    table = cycle()
    table[..., 0] = -math.inf
    table[:, 3, 1] = 9.0
    out = make([table, table, table]).generate([3], method="psd_f", max_new_tokens=6, divergence="kl")
    assert out.tokens == [1, 2, 3, 1, 2, 3]


def test_windows_over_64_are_refused() -> None:
    rt = make([cycle()] * 1 + [cycle(), cycle()])
    said = "would look at 65 tokens at a time, more than 64: lower draft_length=32 or qualifier_length=32$"
    with pytest.raises(InputError, match="^the target " + said):
        rt.generate([0], method="psd", draft_length=32, qualifier_length=32)
    with pytest.raises(InputError, match="inner_rounds=13"):
        rt.generate([0], method="psd", draft_length=4, inner_rounds=13)
    assert (
        rt.generate([0], method="psd", draft_length=32, qualifier_length=31, max_new_tokens=70).tokens[-1]
        == 2
    )


def test_cached_noise_is_the_direct_noise() -> None:
    seed = torch.tensor([77, 3])
    rows = _NoiseRows()
    for first, count in ((5, 1), (6, 1), (5, 9), (20, 30), (12, 4), (300, 2), (4, 3)):
        expected = ops.own_noise(seed, torch.arange(first, first + count), 101)
        assert_equal_tensors(rows.take(seed, first, torch.Size((count, 101))), expected)


def test_only_needed_rows_are_kept() -> None:
    assert rows_needed((Match(), Match())) == ((False, False), (False, False))
    assert rows_needed((Fuzzy(0.1), Match())) == ((True, False), (False, False))
    assert rows_needed((Fuzzy(0.1), Rejection())) == ((True, False), (True, True))
    assert rows_needed((Fuzzy(0.1), Match(), Rejection())) == ((True, False, False), (False, False, True))


def test_plan_lengths() -> None:
    plan = RoundPlan((Match(), Match()), (4, 10), None, True, False, False)
    assert plan.longest == (4, 14)
    assert [plan.window(level) for level in range(3)] == [3, 6, 15]
    assert RoundPlan((Match(), Match()), (4, 10), 2, True, False, False).longest == (4, 10)
