"""The measurements of `tune`: answers of the tiers, seconds of passes, and what comes beside them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch
from helpers.positions import FakeClock, logits_of, pyramid_of, related

from pyramid_rt import Pyramid
from pyramid_rt.decoding.methods import tiers_of
from pyramid_rt.kernels.reference import sampling as ops
from pyramid_rt.params import SamplingParams
from pyramid_rt.tuning.measuring import (
    Probe,
    calibrated,
    non_decreasing,
    non_negative_solution,
    record,
    time_passes,
)
from pyramid_rt.tuning.replay import Costs, Curve, Setting, replay

PROMPT = "The quick brown fox"
NEW = 48


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("setting", [Setting("sd", 1), Setting("sd", 4), Setting("sd", 9)], ids=str)
def test_a_replay_of_models_makes_the_passes_of_the_models(
    tiny: Pyramid, setting: Setting, temperature: float
) -> None:
    assert tiny.tokenizer is not None
    prompt = tiny.tokenizer.encode(PROMPT)
    common = {"temperature": temperature, "seed": 5, "top_k": 20}
    options = {"max_new_tokens": NEW, "ignore_eos": True, **common}
    text = tiny.generate(prompt, method="ar", **options).tokens  # type: ignore[arg-type]
    trace, prefill = record(tiny, prompt, text, SamplingParams.build(common), time.perf_counter)
    assert list(trace.own[-1]) == text
    assert len(prefill) == 3
    expected = tiny.generate(prompt, **setting.options(), **options).stats  # type: ignore[arg-type]
    done = replay(trace, setting.plan(common, host_control=True), tiers_of(setting.method, 3))
    assert [tier.total() for tier in done.passes] == [tier.forwards for tier in expected.tiers]
    assert len({tier.forwards for tier in expected.tiers}) == 2 or setting.draft_length == 1
    assert tiny.generate(prompt, method="ar", **options).tokens == text  # type: ignore[arg-type]


def test_rounds_of_three_models_are_exact_past_any_threshold(tiny: Pyramid) -> None:
    assert tiny.tokenizer is not None
    prompt = tiny.tokenizer.encode(PROMPT)
    text = tiny.generate(prompt, method="ar", max_new_tokens=NEW, ignore_eos=True).tokens
    trace, _ = record(tiny, prompt, text, SamplingParams(), time.perf_counter)
    rounds = set()
    for low in (0.0, 0.02, 0.1, 0.5):
        setting = Setting("psd", 3, 5, low)
        stats = tiny.generate(prompt, **setting.options(), max_new_tokens=NEW, ignore_eos=True).stats
        done = replay(trace, setting.plan({}, host_control=True), (0, 1, 2))
        assert done.rounds == stats.tiers[-1].forwards
        rounds.add(done.rounds)
    assert len(rounds) > 1


@pytest.mark.parametrize("on", ["raw", "processed"])
def test_divergences_are_those_between_the_tiers(on: str) -> None:
    tables = [logits_of(tokens) + torch.rand(161, 5) for tokens in related([0.5, 0.8], 1)]
    pyramid = pyramid_of(tables, [lambda width: 0.0] * 3, FakeClock())
    params = SamplingParams(temperature=0.7, divergence="tv", divergence_on=on, seed=1)
    trace, _ = record(pyramid, [1, 2, 3], [0] * 40, params, FakeClock())
    rows = [table[3:43] / (0.7 if on == "processed" else 1.0) for table in tables]
    for low, high in itertools.combinations(range(3), 2):
        expected = ops.divergence("tv", rows[high], rows[low])
        assert torch.allclose(torch.tensor(trace.divergence[low, high]), expected, atol=1e-6)
    with_noise = ops.own_noise(torch.tensor([1, 0]), torch.arange(3, 43), 5)
    assert list(trace.own[1]) == (tables[1][3:43] / 0.7 + with_noise).argmax(-1).tolist()


def test_passes_are_timed_as_rounds_run_them() -> None:
    """Rounds that are graphs are timed by their replay: here twice as fast as the pass that was captured."""
    clock = FakeClock()

    class Recorder:
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            def replay() -> None:
                before = clock.now
                work()
                clock.now = before + (clock.now - before) / 2

            return replay

    tables = [logits_of(tokens) for tokens in related([0.5], 1)]
    costs = [lambda width: 0.5 + 0.125 * width, lambda width: 4.0 + width]
    pyramid = pyramid_of(tables, costs, clock, control="device", recorder=Recorder())
    draft, target = time_passes(pyramid, [1] * 14, (2, 4), clock, deadline=1e9)
    assert draft.seconds == tuple(0.25 + 0.0625 * width for width in draft.widths)
    assert target.seconds == tuple(2.0 + 0.5 * width for width in target.widths)


def test_the_caches_are_declared_unknown_afterwards() -> None:
    pyramid = pyramid_of(
        [logits_of(tokens) for tokens in related([0.5], 1)], [lambda width: 0.0] * 2, FakeClock()
    )
    for tier in pyramid.tiers:
        tier.held = [1, 2, 3]
    record(pyramid, [1, 2, 3], [0] * 4, SamplingParams(), FakeClock())
    assert [tier for tier in pyramid.tiers if tier.held != []] == []


def costs_of(*slopes: float) -> list[Callable[[int], float]]:
    return [lambda width, slope=slope: 1.0 + slope * width for slope in slopes]  # type: ignore[misc]


def test_seconds_are_taken_by_tier_and_width() -> None:
    clock = FakeClock()
    pyramid = pyramid_of([logits_of(tokens) for tokens in related([0.5], 1)], costs_of(0.5, 0.25), clock)
    _, prefill = record(pyramid, [1] * 10, [0] * 4, SamplingParams(), clock)
    assert prefill == [pytest.approx(6.0), pytest.approx(3.5)]
    draft, target = time_passes(pyramid, [1] * 14, (2, 17), clock, deadline=1e9)
    assert (draft.widths, target.widths) == ((1, 2), (1, 2, 3, 4, 5, 6, 8, 12, 16, 20))
    assert draft.seconds == pytest.approx((1.5, 2.0))
    assert target.at(10) == pytest.approx(3.5)


def test_the_deadline_ends_the_turns_but_the_first() -> None:
    spent = []
    for deadline in (0.0, 1e9):
        clock = FakeClock()
        pyramid = pyramid_of([logits_of(t) for t in related([0.5], 1)], costs_of(0.0, 0.0), clock)
        curves = time_passes(pyramid, [1] * 14, (2, 2), clock, deadline)
        assert [curve for curve in curves if curve.seconds != (1.0, 1.0)] == []
        spent.append(clock.now)
    assert spent == [4 * 2, 4 * 16]  # a warm-up and one turn; a warm-up and fifteen


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([3, 1, 2], [2, 2, 2]),
        ([1, 4, 2, 5], [1, 3, 3, 5]),
        ([5, 4, 3, 8], [4, 4, 4, 8]),
        ([2], [2]),
    ],
)
def test_non_decreasing(values: list[float], expected: list[float]) -> None:
    assert non_decreasing(values) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "values", "expected"),
    [
        ([[2, 0], [0, 4]], [6, 8], [3, 2]),
        ([[2, 0], [0, 4]], [6, -8], [3, 0]),
        ([[1, 1], [1, 2]], [5, 4], [4.5, 0]),  # without the bound (6, -1); with it the mean of 5 and 4
        ([[1], [1], [1]], [1, 2, 6], [3]),
        ([[1, 1]], [-1], [0, 0]),
        ([[1, 0], [2, 0]], [1, 2], [1, 0]),
    ],
)
def test_non_negative_solution(rows: list[list[float]], values: list[float], expected: list[float]) -> None:
    assert non_negative_solution(rows, values) == pytest.approx(expected, abs=1e-12)


def test_calibration_by_hand() -> None:
    costs = Costs((Curve((1,), (1.0,)), Curve((1,), (2.0,)), Curve((1,), (10.0,))), ((), (), ()))
    settings = (Setting("ar"), Setting("sd", 2), Setting("sd", 6), Setting("psd", 2, 2, 0.1))
    plans = [setting.plan({}, host_control=True) for setting in settings]
    probes = [
        # 10 target passes took 150 and were priced at 100; with each comes 5.
        Probe(plans[0], (2,), 200.0, (150.0,), (100.0,), (10,)),
        # 2 for a drawn token, 3 for a verify by match, 4 for a fuzzy one.
        Probe(plans[1], (0, 2), 80.0 + 8 * 2 + 4 * 3, (20.0, 60.0), (10.0, 40.0), (8, 4)),
        Probe(plans[2], (0, 2), 60.0 + 12 * 2 + 2 * 3, (30.0, 30.0), (15.0, 20.0), (12, 2)),
        Probe(
            plans[3], (0, 1, 2), 72.0 + 5 * 2 + 3 * 4 + 2 * 3, (10.0, 32.0, 30.0), (5.0, 8.0, 20.0), (5, 3, 2)
        ),
    ]
    found = calibrated(costs, probes)
    assert [curve.seconds for curve in found.curves] == [(2.0,), (8.0,), (15.0,)]
    assert (found.plain, found.step, found.match, found.fuzzy) == pytest.approx((5.0, 2.0, 3.0, 4.0))


def test_calibration_where_graphs_hide_the_tiers() -> None:
    costs = Costs((Curve((1,), (1.0,)), Curve((1,), (2.0,)), Curve((1,), (10.0,))), ((), (), ()))
    settings = (Setting("ar"), Setting("sd", 2), Setting("sd", 6), Setting("psd", 2, 2, 0.1))
    plans = [setting.plan({}, host_control=False) for setting in settings]
    # The target takes half of its price, the draft a quarter, the qualifier three quarters.
    probes = [
        Probe(plans[0], (2,), 50.0, None, (100.0,), (10,)),
        Probe(plans[1], (0, 2), 2.0 + 20.0, None, (8.0, 40.0), (8, 4)),
        Probe(plans[2], (0, 2), 3.0 + 10.0, None, (12.0, 20.0), (12, 2)),
        Probe(plans[3], (0, 1, 2), 1.0 + 6.0 + 10.0, None, (4.0, 8.0, 20.0), (4, 4, 2)),
    ]
    found = calibrated(costs, probes)
    assert [curve.seconds[0] for curve in found.curves] == pytest.approx([0.25, 1.5, 5.0])
    assert (found.plain, found.step, found.match, found.fuzzy) == (0.0, 0.0, 0.0, 0.0)
    # A draft that seems to take less than nothing is not free: it is scaled as all of it.
    probes[1:] = [Probe(plans[1], (0, 2), 19.0, None, (8.0, 40.0), (8, 4))]
    assert calibrated(costs, probes).curves[0].seconds[0] == pytest.approx(69.0 / 148.0)


def test_what_is_not_there_is_not_negative() -> None:
    costs = Costs((Curve((1,), (1.0,)),), ((),))
    plan = Setting("ar").plan({}, host_control=True)
    found = calibrated(costs, [Probe(plan, (0,), 5.0, (6.0,), (6.0,), (3,))])
    assert (found.plain, found.step, found.match, found.fuzzy) == (0.0, 0.0, 0.0, 0.0)
