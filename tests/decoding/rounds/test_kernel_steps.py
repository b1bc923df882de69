"""Rounds of kernels against the steps in torch, on table tiers: the same state after every outer round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from helpers.device_tables import DeviceTableTier, TableForward
from helpers.equality import assert_equal_tensors
from helpers.oracle import DEVICE
from helpers.tables import TableTier, random_tables, total_variation
from torch import Tensor

from pyramid_rt import Fuzzy, Match, Pyramid, Rejection
from pyramid_rt.decoding.counters import COLUMN
from pyramid_rt.decoding.engine import rounds_for
from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner, KernelSteps, Stage, processed_tiers
from pyramid_rt.decoding.rounds.recursion import RoundRunner
from pyramid_rt.decoding.rounds.torch_steps import TorchRoundRunner
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import NO_POSITION

RULES = (
    Match(), Rejection(), Fuzzy(0.1), Fuzzy(0.1, or_match=True), Fuzzy(0.4, "kl", "processed"),
    Fuzzy(0.1, "topk_js", "processed", or_match=True),
)  # fmt: skip
MAX_SEQ = 80
PROMPT = (1, 2)
LENGTHS = (2, 3, 3)
SAMPLES = 48


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def tables_of(count: int, seed: int) -> list[Tensor]:
    with torch.device("cpu"):
        return [table.to(DEVICE) for table in random_tables(count, seed=seed)]


def started(
    tables: Sequence[Tensor], plan: RoundPlan, *, kernels: bool, new_tokens: int, temperature: float, seed: int = 1,
    stop: int | None = 3, filters: tuple[int, float, float] = (0, 1.0, 0.0),
) -> tuple[State, RoundRunner]:  # fmt: skip
    """A sequence after its prompt and the first token."""
    vocab, n = tables[0].shape[-1], len(PROMPT)
    allocate = State.for_kernels if kernels else State.allocate
    state = allocate(plan, MAX_SEQ, vocab, DEVICE)
    kind = DeviceTableTier if kernels else TableTier
    tiers = [kind(f"t{i}", table, max_seq=MAX_SEQ) for i, table in enumerate(tables)]
    window = torch.tensor(PROMPT)
    state.tokens[:n] = window
    state.end.fill_(n)
    state.limit.fill_(n + new_tokens)
    if stop is not None:
        state.stop_mask[stop] = True
    state.seed.copy_(torch.tensor([seed, 3]))
    for name, value in zip(("top_k", "top_p", "min_p"), filters, strict=True):
        getattr(state, name).fill_(value)
    state.temperature.fill_(temperature)
    for tier, cached in zip(tiers[:-1], state.cached, strict=False):
        tier.forward(window, torch.tensor(0), None, n)
        cached.fill_(n)
    rounds = rounds_for(tiers, plan, state, vocab)
    assert isinstance(rounds, KernelRoundRunner if kernels else TorchRoundRunner)
    rounds.first_token(torch.tensor([n - 1]), n, window, torch.tensor(0))
    return state, rounds


def same(expected: State, found: State) -> None:
    """Everything that the host or a later round may look at."""
    for name in ("end", "ended", "counters", "bad"):
        assert_equal_tensors(getattr(expected, name), getattr(found, name), name)
    end = int(expected.end)
    assert found.tokens[:end].tolist() == expected.tokens[:end].tolist()
    assert found.origin[:end].tolist() == expected.origin[:end].tolist()
    assert [int(c) for c in found.cached] == [int(c) for c in expected.cached]


def compare(
    rules: Sequence[Rule], *, temperature: float, seed: int = 1, inner_rounds: int | None = 2, new_tokens: int = 9,
    filters: tuple[int, float, float] | None = None, tables: Sequence[Tensor] | None = None,
) -> State:  # fmt: skip
    """Decode both ways, and one round more than there is to do; passes run where the torch steps count one."""
    count = len(rules) + 1
    plan = RoundPlan(
        tuple(rules),
        LENGTHS[: count - 1],
        inner_rounds,
        False,
        temperature > 0,
        filters is not None,
        logprobs=1,
    )
    pairs = [
        started(
            tables or tables_of(count, 5), plan, kernels=kernels, new_tokens=new_tokens, temperature=temperature,
            seed=seed, filters=filters or (0, 1.0, 0.0),
        )
        for kernels in (False, True)
    ]  # fmt: skip
    (expected, reference), (found, rounds) = pairs
    same(expected, found)
    over = False
    while not over:
        end = int(expected.end)
        over = bool(expected.ended) or end >= int(expected.limit)
        reference.outer_round(end)
        rounds.outer_round(end)
        same(expected, found)
        made = int(expected.end) - end
        assert expected.logprob_rows is not None
        assert found.logprob_rows is not None
        assert_equal_tensors(expected.logprob_rows[:made], found.logprob_rows[:made])
    assert isinstance(rounds, KernelRoundRunner)
    passes = [tier.passes for tier in rounds.tiers if isinstance(tier, DeviceTableTier)]
    # Beside the rounds, the target has read the prompt.
    passes[-1] -= 1
    assert passes == expected.counters[:, COLUMN["forwards"]].tolist()
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_plain_decoding(temperature: float) -> None:
    assert int(compare((), temperature=temperature, inner_rounds=None).end) > 5


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_two_tiers(rule: Rule, temperature: float) -> None:
    compare((rule,), temperature=temperature)


# Half of all pairs; of the others the defaults decode a whole generation below, and (fuzzy, rejection) samples.
PAIRS = [(a, b) for (i, a), (j, b) in itertools.product(enumerate(RULES), repeat=2) if (i + j) % 2 == 0]


@pytest.mark.parametrize(
    ("rules", "temperature"), [(rules, (0.8, 0.8, 0.0)[i % 3]) for i, rules in enumerate(PAIRS)], ids=str
)
def test_three_tiers(rules: tuple[Rule, ...], temperature: float) -> None:
    compare(rules, temperature=temperature, new_tokens=6)


@pytest.mark.parametrize(
    "rules",
    [(Match(), Fuzzy(0.1), Rejection()), (Rejection(), Fuzzy(0.2, "js", "processed"), Match())],
    ids=str,
)
def test_four_tiers(rules: tuple[Rule, ...]) -> None:
    compare(rules, temperature=0.8, new_tokens=8)


@pytest.mark.parametrize(
    "rules", [(Fuzzy(0.1), Rejection()), (Match(), Match()), (Match(), Fuzzy(0.2), Rejection())], ids=str
)
def test_until_enough_stand(rules: tuple[Rule, ...]) -> None:
    compare(rules, temperature=0.8, inner_rounds=None)


@pytest.mark.parametrize(
    ("rules", "filters"),
    [
        ((Rejection(), Fuzzy(0.2, "js", "processed")), (3, 1.0, 0.0)),
        ((Rejection(), Fuzzy(0.2, "js", "processed")), (0, 1.0, 0.2)),
        ((Fuzzy(0.1, or_match=True), Rejection()), (0, 0.8, 0.0)),
        ((Fuzzy(0.1, or_match=True), Rejection()), (3, 0.9, 0.1)),
    ],
    ids=str,
)
def test_filters(rules: tuple[Rule, ...], filters: Any) -> None:
    compare(rules, temperature=0.8, new_tokens=5, filters=filters)


def test_a_vocabulary_of_several_tiles() -> None:
    vocab = 67
    generator = torch.Generator().manual_seed(vocab)
    with torch.device("cpu"):
        base = torch.randn(vocab, vocab, vocab, generator=generator) * 2
        tables = [base + torch.randn(vocab, vocab, vocab, generator=generator) * d for d in (1.0, 0.5, 0.0)]
    tables = [table.to(DEVICE) for table in tables]
    compare(
        (Fuzzy(0.15, "topk_js"), Rejection()),
        temperature=0.8,
        filters=(9, 0.9, 0.0),
        tables=tables,
        new_tokens=6,
    )


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_cannot_be_decided_are_reported_alike(level: int, value: Any) -> None:
    tables = tables_of(3, 5)
    tables[level] = tables[level].clone()
    tables[level][:, :, 1 : None if value == -math.inf else 2] = value
    tables[level][:, :, 0] = value
    plan = RoundPlan((Match(), Match()), (2, 3), 2, False, True, False)
    firsts = []
    for kernels in (False, True):
        state, rounds = started(tables, plan, kernels=kernels, new_tokens=9, temperature=0.8, stop=None)
        rounds.outer_round()
        firsts.append(state.bad.tolist().index(min(state.bad.tolist())))
        firsts.append(min(state.bad.tolist()))
    assert firsts[:2] == firsts[2:]
    assert firsts[1] != NO_POSITION
    assert firsts[0] == level


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.9}, {"method": "sd"}], ids=str)
def test_a_whole_generation(options: dict[str, Any]) -> None:
    """Through prompt, rounds, statistics and log-probabilities, end-of-sequence included."""
    results = []
    for tier in (TableTier, DeviceTableTier):
        tiers = [tier(f"t{i}", table, max_seq=MAX_SEQ) for i, table in enumerate(tables_of(3, 5))]
        rt = Pyramid(tiers, control="device", eos_token_ids=[3])
        out = rt.generate(
            [1, 2, 0], max_new_tokens=8, temperature=0.8, seed=6, draft_length=2, qualifier_length=3, logprobs=2,
            qualifier_threshold=0.1, **options,
        )  # fmt: skip
        results.append(out)
        [engine] = rt._kept.values()
        assert isinstance(engine._rounds, KernelRoundRunner) == (tier is DeviceTableTier)
    expected, found = results
    assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    assert len(found.tokens) > 2
    assert found.logprobs == expected.logprobs
    for mine, theirs in zip(expected.stats.tiers, found.stats.tiers, strict=True):
        assert replace(mine, seconds=0.0) == replace(theirs, seconds=0.0)


def kernel_name(launch: Any) -> str:
    return str(launch.kernel.__name__).removesuffix("_kernel")


def launches(stages: Sequence[Stage]) -> list[str]:
    """Names of a round's kernels, forward passes by their tier."""
    return [
        f"tier{stage.level}" if stage.level is not None else kernel_name(launch)
        for stage in stages
        for launch in stage.launches
    ]


@pytest.mark.parametrize(
    ("rules", "filters", "beside"),
    [
        ((Match(), Match()), False, {"sample": 4, "decide": 3}),
        ((Fuzzy(0.1, or_match=True), Match()), False, {"sample": 4, "decide": 3}),
        ((Fuzzy(0.1), Rejection()), False, {"sample": 4, "decide": 2, "reject": 1, "filters": 3}),
        ((Fuzzy(0.1, "js", "processed"), Match()), False, {"sample": 4, "decide": 3, "filters": 2}),
        ((Match(), Match()), True, {"sample": 4, "decide": 3, "filters": 7}),
    ],
    ids=str,
)
def test_launches_of_a_round(rules: tuple[Rule, ...], filters: Any, beside: dict[str, int]) -> None:
    plan = RoundPlan(rules, (2, 3), 2, False, True, filters)
    _, rounds = started(tables_of(3, 5), plan, kernels=True, new_tokens=40, temperature=0.8)
    assert isinstance(rounds, KernelRoundRunner)
    stages = rounds.stages(MAX_SEQ)
    names = launches(stages)
    counted = {name: names.count(name) for name in dict.fromkeys(names)}
    assert counted == {"tier0": 4, "tier1": 2, "tier2": 1} | beside
    # Written down once per bound of the cache: what a graph captures is what runs.
    assert rounds.stages(MAX_SEQ) is stages
    assert [x for stage in stages for x in stage.launches if not isinstance(x, Launch | TableForward)] == []


def test_a_round_of_kernels_calls_nothing_of_torch_and_reads_nothing() -> None:
    plan = RoundPlan((Fuzzy(0.1), Rejection()), (2, 3), 2, False, True, False)
    state, rounds = started(tables_of(3, 5), plan, kernels=True, new_tokens=40, temperature=0.8)
    assert isinstance(rounds, KernelRoundRunner)
    pointers = {t.data_ptr() for t in vars_of(state)}
    for stage in rounds.stages(MAX_SEQ):
        for launch in stage.launches:
            if isinstance(launch, Launch):
                tensors = [a for a in launch.args if isinstance(a, Tensor)]
                # Only the decode_state's own buffers, so nothing is allocated and every pointer stays.
                assert {t.data_ptr() for t in tensors} <= pointers


def test_sections_of_one_name_are_the_same_launches() -> None:
    """So a graph of each, repeated, is a round."""
    plan = RoundPlan((Match(), Match()), (2, 3), 3, False, True, False)
    _, rounds = started(tables_of(3, 5), plan, kernels=True, new_tokens=40, temperature=0.8)
    assert isinstance(rounds, KernelRoundRunner)
    written: list[tuple[str, list[Any]]] = []
    for stage in rounds.stages(MAX_SEQ):
        if not written or written[-1][0] != stage.section:
            written.append((stage.section, []))
        written[-1][1].extend(contents(launch) for launch in stage.launches)
    sections = rounds.sections(MAX_SEQ)
    inner = ["burst of 't0'", "verify of 't1'"]
    assert [name for name, _ in written] == [section.name for section in sections]
    assert [section.name for section in sections] == [*inner * 3, "verify of 't2'"]
    assert [section.level for section in sections] == [0, 1] * 3 + [2]
    by_name: dict[str, list[Any]] = {}
    for name, launches_of in written:
        assert by_name.setdefault(name, launches_of) == launches_of
    assert len({str(launches_of) for launches_of in by_name.values()}) == 3


def contents(value: Any) -> Any:
    """A launch in comparable form."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape
    if isinstance(value, tuple):
        return [contents(item) for item in value]
    if is_dataclass(value):
        return [contents(getattr(value, field.name)) for field in fields(value)]
    return repr(value)


def vars_of(state: State) -> list[Tensor]:
    assert state.decode_state is not None
    decode_state = {
        name: getattr(state.decode_state, name) for name in type(state.decode_state).__dataclass_fields__
    }
    statistics = decode_state.pop("statistics")
    return [*decode_state.values(), statistics.peak, statistics.total, statistics.best, statistics.token]


def test_which_tiers_need_processed_distributions() -> None:
    def of(*rules: Rule) -> tuple[bool, ...]:
        return processed_tiers(RoundPlan(rules, LENGTHS[: len(rules)], 1, False, True, False))

    assert of(Match(), Match()) == (False, False, False)
    assert of(Fuzzy(0.1), Match()) == (False, False, False)
    assert of(Match(), Rejection()) == (False, True, True)
    assert of(Fuzzy(0.1), Rejection()) == (True, True, True)
    assert of(Match(), Fuzzy(0.1, "js", "processed")) == (False, True, True)


def test_refuses() -> None:
    plan = RoundPlan((), (), None, False, True, False)
    state = State.for_kernels(plan, MAX_SEQ, 4, DEVICE)
    with pytest.raises(ValueError, match=r"^plan.host_control "):
        KernelRoundRunner([], replace(plan, host_control=True), state, 4)
    with pytest.raises(ValueError, match=r"^state.decode_state "):
        KernelRoundRunner([], plan, State.allocate(plan, MAX_SEQ, 4, DEVICE), 4)


def test_bytes_are_those_of_the_board() -> None:
    plan = RoundPlan((Match(),), (2,), None, False, True, False)
    state = State.for_kernels(plan, MAX_SEQ, 100, DEVICE)
    assert state.nbytes() == sum(t.numel() * t.element_size() for t in vars_of(state))


class Forgetful(KernelSteps):
    """The tempting shortcut: a tier hands up its own distribution whatever the token was drawn from."""

    def verify(self, opened: Any) -> None:
        if opened.level == 2:
            self.decide(FillSource(self.decode_state.source))
        super().verify(opened)


class ForgetfulRounds(KernelRoundRunner):
    steps_class = Forgetful


class FillSource:
    def __init__(self, source: Tensor) -> None:
        self.source = source

    def run(self) -> None:
        self.source.fill_(1)


def distance_from_target(kind: type[KernelRoundRunner]) -> tuple[float, float]:
    """Total variation of decoded tokens from the target's distribution, and what exact samples stay below.

    No tier looks at the text, so every token is an independent sample. The draft is far from the others, which
    agree, and the qualifier lets everything stand. Exact samples exceed their mean distance by s with a
    probability of at most exp(-2 N s^2) (McDiarmid; one sample moves it by 1 / N); here one in a thousand.
    """
    draft, target = torch.tensor([0.8, 0.1, 0.05, 0.05]), torch.tensor([0.05, 0.15, 0.3, 0.5])
    tables = [share.log().expand(4, 4, 4).contiguous() for share in (draft, target, target)]
    plan = RoundPlan((Fuzzy(9.0), Rejection()), (3, 2), 1, False, True, False)
    state, made = started(tables, plan, kernels=True, new_tokens=SAMPLES, temperature=1.0, seed=11, stop=None)
    assert isinstance(made, KernelRoundRunner)
    rounds = kind(made.tiers, plan, state, 4)
    while int(state.end) < int(state.limit):
        rounds.outer_round()
    tokens = state.tokens[len(PROMPT) : int(state.end)]
    share = torch.bincount(tokens, minlength=4) / tokens.shape[0]
    mean = 0.5 * float((2 * target * (1 - target) / (math.pi * SAMPLES)).sqrt().sum())
    return total_variation(share, target), mean + math.sqrt(math.log(1000) / (2 * SAMPLES))


def test_rejection_over_a_fuzzy_tier_is_exact() -> None:
    found, allowed = distance_from_target(KernelRoundRunner)
    assert found < allowed


def test_power_handing_up_the_own_distribution_is_seen() -> None:
    found, allowed = distance_from_target(ForgetfulRounds)
    assert found > allowed
