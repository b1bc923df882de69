"""The throughput model: by hand, against the real recursion, and against the closed form of the literature."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from helpers.positions import MAX_SEQ, VOCAB, PositionTier

from pyramid_rt.decoding.counters import COLUMN
from pyramid_rt.decoding.methods import tiers_of
from pyramid_rt.decoding.rounds.torch_steps import TorchRoundRunner
from pyramid_rt.decoding.rules import Fuzzy, Match
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.errors import InputError
from pyramid_rt.kernels.reference import sampling as ops
from pyramid_rt.tuning.replay import Costs, Curve, Replay, Setting, Trace, predict, replay

PROMPT, NEW = 3, 40


def run(trace: Trace, setting: Setting, tiers: int = 3, *, host_control: bool = True) -> Replay:
    return replay(trace, setting.plan({}, host_control=host_control), tiers_of(setting.method, tiers))


# By hand. The target says 0 everywhere, so a lower tier agrees where it says 0.

AGREES = Trace(
    own=((0, 0, 1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0, 0, 0), (0,) * 8),
    divergence={
        (0, 1): (0, 0, 0.5, 0, 0.1, 0, 0, 0),
        (1, 2): (0, 0, 0, 0, 0.2, 0, 0, 0),
        (0, 2): (0, 0, 0.3, 0, 0, 0, 0, 0),
    },
)


def test_plain_decoding_is_one_pass_a_token() -> None:
    assert run(AGREES, Setting("ar")) == Replay(7, 7, 0, (Counter({1: 7}),))


def test_two_tiers_by_hand() -> None:
    # Drafts of 3 from positions 1 (0 1 0: one stands, correction at 2), 3 (all stand, bonus at 6) and 7 (the
    # limit cuts it to one). After the bonus the draft has two tokens to catch up on.
    done = run(AGREES, Setting("sd", 3))
    assert done == Replay(7, 3, 0, (Counter({1: 3 + 3, 2: 1}), Counter({4: 2, 2: 1})))


def test_fuzzy_by_hand() -> None:
    # The draft's 1 at position 2 stands at 0.3 although it is not the target's: drafts from 1 (stand, bonus at
    # 4) and 5 (cut to three, whole, no room for a bonus).
    done = run(AGREES, Setting("fsd", 3, target_threshold=0.3))
    assert (done.committed, done.rounds, done.differing) == (7, 2, 1)
    assert run(AGREES, Setting("fsd", 3, target_threshold=0.29)).differing == 0


def test_three_tiers_by_hand() -> None:
    # Threshold 0.1, drafts of 2, until 3 stand. From 1: draft 0 1, position 2 falls (0.5), corrected by the
    # qualifier; two stand. From 3: draft 0 0, stands though the qualifier says 1 at 4; its bonus at 5. The
    # target takes 1..5 whole, bonus at 6. From 7: the limit leaves one token.
    done = run(AGREES, Setting("psd", 2, 3, 0.1))
    assert (done.committed, done.rounds, done.differing) == (7, 2, 0)
    draft, qualifier, target = done.passes
    assert (draft.total(), qualifier, target) == (2 + 2 + 1, Counter({3: 3}), Counter({6: 1, 2: 1}))


def test_an_infinite_divergence_never_stands() -> None:
    trace = Trace(((1, 1), (0, 0)), {(0, 1): (math.inf, math.inf)})
    assert run(trace, Setting("fsd", 1, target_threshold=math.inf), tiers=2).differing == 0


# Against the recursion itself.

SETTINGS = [
    Setting("ar"),
    Setting("sd", 1),
    Setting("sd", 5),
    Setting("fsd", 4, target_threshold=0.1),
    Setting("psd", 1, 1, 0.0),
    Setting("psd", 3, 7, 0.08),
    Setting("psd", 4, 4, 0.3),
    Setting("psd_a", 2, 6, target_threshold=0.1),
    Setting("psd_f", 3, 8, 0.06, 0.12),
]


def random_tables(seed: int, spreads: tuple[float, ...] = (1.2, 0.7)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(MAX_SEQ + 65, VOCAB, generator=generator) * 2
    return [target + torch.randn(target.shape, generator=generator) * s for s in spreads] + [target]


def trace_of(tables: list[torch.Tensor]) -> Trace:
    rows = [table[PROMPT : PROMPT + NEW] for table in tables]
    own = tuple(tuple(row.argmax(-1).tolist()) for row in rows)
    pairs = combinations(range(len(tables)), 2)
    return Trace(own, {(a, b): tuple(ops.divergence("js", rows[b], rows[a]).tolist()) for a, b in pairs})


def decode(tables: list[torch.Tensor], plan: RoundPlan, levels: Sequence[int]) -> tuple[Replay, list[int]]:
    """The real recursion over the same tables, and the tokens it wrote."""
    tiers = [PositionTier(str(level), tables[level]) for level in levels]
    state = State.allocate(plan, MAX_SEQ, VOCAB, torch.device("cpu"))
    state.limit.add_(PROMPT + NEW)
    state.end.add_(PROMPT)
    for cached in state.cached[:-1]:
        cached.add_(PROMPT)
    recursion = TorchRoundRunner(tiers, plan, state, VOCAB)
    window = state.tokens[:PROMPT]
    recursion.first_token(torch.tensor([PROMPT - 1]), PROMPT, window, torch.tensor(0))
    tiers[-1].passes.clear()
    rounds = 0
    while int(state.end) < PROMPT + NEW:
        recursion.outer_round()
        rounds += 1
    top = state.counters[max(plan.tiers - 2, 0)]
    differing = int(top[COLUMN["differs"]]) if plan.rules else 0
    passes = tuple(tier.passes for tier in tiers)
    return Replay(NEW - 1, rounds, differing, passes), state.tokens[PROMPT : PROMPT + NEW].tolist()


@pytest.mark.parametrize("host_control", [True, False])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_replay_makes_the_passes_of_the_recursion(setting: Setting, host_control: bool) -> None:
    courses = set()
    for seed in range(12):
        tables = random_tables(seed)
        trace = trace_of(tables)
        plan = setting.plan({}, host_control=host_control)
        expected, tokens = decode(tables, plan, tiers_of(setting.method, 3))
        done = run(trace, setting, host_control=host_control)
        assert done.committed == expected.committed
        assert (done.rounds, done.differing) == (expected.rounds, expected.differing)
        assert [+tier for tier in done.passes] == [+tier for tier in expected.passes]
        if setting.lossless:
            assert tokens == list(trace.own[-1])
        courses.add(str(done))
    assert setting.method == "ar" or len(courses) > 2  # or the tables would test one and the same course


@pytest.mark.parametrize("host_control", [True, False])
@pytest.mark.parametrize("inner_rounds", [None, 2])
def test_a_chain_of_four_tiers_too(inner_rounds: int | None, host_control: bool) -> None:
    rules = (Fuzzy(0.3), Match(), Fuzzy(0.05, or_match=True))
    lengths = (2, 3, 4) if inner_rounds is None else (2, 1, 1)
    plan = RoundPlan(rules, lengths, inner_rounds, host_control, sampled=False, filters=False)
    for seed in range(6):
        tables = random_tables(seed, (1.5, 1.0, 0.5))
        expected, _ = decode(tables, plan, range(4))
        done = replay(trace_of(tables), plan, range(4))
        assert (done.rounds, done.differing) == (expected.rounds, expected.differing)
        assert [+tier for tier in done.passes] == [+tier for tier in expected.passes]


# Against the closed form.


@pytest.mark.parametrize(("alpha", "length"), [(0.5, 2), (0.7, 4), (0.9, 8)])
def test_independent_tokens_give_the_mean_of_the_closed_form(alpha: float, length: int) -> None:
    generator = random.Random(5)
    size = 40_000
    draft = tuple(0 if generator.random() < alpha else 1 for _ in range(size))
    done = run(Trace((draft, (0,) * size), {}), Setting("sd", length), tiers=2)
    mean = (1 - alpha ** (length + 1)) / (1 - alpha)
    # A round commits 1 to length + 1 tokens: its standard deviation is at most length / 2.
    error = length / 2 / math.sqrt(done.rounds)
    assert abs(done.committed / done.rounds - mean) < 4 * error
    assert 4 * error < mean - (1 - alpha**length) / (1 - alpha)  # the test can tell the next length


# Prices.


def test_a_curve_is_linear_between_widths_and_flat_outside() -> None:
    curve = Curve((1, 2, 6), (10.0, 12.0, 20.0))
    assert [curve.at(width) for width in (1, 2, 3, 4, 6, 9)] == [10.0, 12.0, 14.0, 16.0, 20.0, 20.0]


def test_a_prediction_by_hand() -> None:
    costs = Costs(
        curves=(Curve((1, 2), (1.0, 3.0)), Curve((1,), (50.0,)), Curve((1, 4), (10.0, 13.0))),
        prefill=((5.0,), (900.0,), (7.0,)),
        plain=0.125,
        step=0.5,
        match=0.25,
        fuzzy=100.0,
    )
    setting = Setting("sd", 3)
    plan, levels = setting.plan({}, host_control=True), tiers_of("sd", 3)
    found = predict(setting, [AGREES], costs, plan, levels)
    draft = 6 * 1.0 + 1 * 3.0 + 7 * 0.5  # as in test_two_tiers_by_hand
    target = 2 * 13.0 + 1 * 11.0 + 3 * 0.25
    assert found.seconds == pytest.approx((5 + 7 + draft + target,))
    assert found.tokens_per_second == pytest.approx(8 / (12 + draft + target))
    assert found.tokens_per_target_forward == pytest.approx(7 / 3)
    assert found.differs == 0.0
    fuzzy = Setting("fsd", 3, target_threshold=0.3)
    lossy = predict(fuzzy, [AGREES], costs, fuzzy.plan({}, host_control=True), levels)
    assert lossy.differs == pytest.approx(1 / 7)
    assert lossy.seconds[0] > 2 * 100.0  # two verifies by a fuzzy rule
    alone = Setting("ar")
    single = predict(alone, [AGREES], costs, alone.plan({}, host_control=True), (2,))
    assert single.seconds == pytest.approx((7 + 7 * 10.0 + 7 * 0.125,))


def test_a_window_over_64_is_refused() -> None:
    with pytest.raises(InputError, match="64"):
        Setting("sd", 70).plan({}, host_control=True)
