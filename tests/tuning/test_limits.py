"""The throughput model where the answer is known by hand, and the limit that it names in each case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pyramid_rt.params import SamplingParams
from pyramid_rt.tuning.limits import WORTH, Change, Model, changes, limit, with_lengths
from pyramid_rt.tuning.replay import Costs, Curve, Setting
from pyramid_rt.tuning.search import COMMON
from pyramid_rt.tuning.throughput import Chain, alpha_of, throughput, tokens_of_a_round

COMMON_OPTIONS = {name: getattr(SamplingParams(), name) for name in COMMON}
Alphas = Callable[[Setting], tuple[float, ...]]


def flat(seconds: float) -> Curve:
    return Curve((1,), (seconds,))


def rising(seconds: float) -> Curve:
    """A pass that takes so long for every token in it."""
    return Curve((1, 64), (seconds, 64 * seconds))


# The formulas of the paper.


def test_two_tiers_are_the_papers_v_sd() -> None:
    # 1 + 1/2 + 1/4 tokens in 2 * 0.01 + 0.1 seconds; beta is 1.75 of 3 places.
    found = throughput(Chain((flat(0.01), flat(0.1)), (0.5,), (2,)))
    assert found.betas == pytest.approx((1.75 / 3,))
    v_d, v_t = 100, 10
    assert found.tokens_per_second == pytest.approx(found.betas[0] * (2 + 1) / (2 / v_d + 1 / v_t))
    assert found.tokens_per_second == pytest.approx(1.75 / 0.12)
    assert found.shares == pytest.approx((0.02 / 0.12, 0.1 / 0.12))


def test_three_tiers_are_the_papers_v_psd() -> None:
    # Every inner round gives one token, so that proposals have the qualifier's length and nothing overshoots.
    found = throughput(Chain((flat(0.01), flat(0.05), flat(0.2)), (0.0, 0.5), (2, 3)))
    v_qd = (1 / 3) * (2 + 1) / (2 / 100 + 1 / 20)
    beta_tq = (1 + 0.5 + 0.25 + 0.125) / 4
    assert found.speeds == pytest.approx((100, v_qd, beta_tq * (3 + 1) / (3 / v_qd + 1 / 5)))
    assert found.betas == pytest.approx((1 / 3, beta_tq))
    assert sum(found.shares) == pytest.approx(1)


def test_proposals_of_several_rounds() -> None:
    # Each inner round gives 3 tokens. Until 4 stand: 4, and one more on average. Two rounds: 6.
    chain = Chain((flat(0.01), flat(0.05), flat(0.2)), (1.0, 1.0), (2, 4))
    assert throughput(chain).proposals == (2, 5)
    fixed = Chain(chain.passes, chain.alphas, chain.lengths, inner_rounds=2)
    assert throughput(fixed).proposals == (2, 6)
    assert throughput(fixed).tokens_per_second == pytest.approx(7 / (2 * (0.02 + 0.05) + 0.2))


def test_a_wide_pass_costs_what_was_measured() -> None:
    found = throughput(Chain((flat(0.01), rising(0.1)), (1.0,), (4,)))
    assert found.tokens_per_second == pytest.approx(5 / (4 * 0.01 + 0.5))


def test_plain_decoding_is_a_chain_of_one() -> None:
    assert throughput(Chain((flat(0.25),))).tokens_per_second == 4


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("proposed", [1, 4, 7.5])
def test_alpha_is_found_again(alpha: float, proposed: float) -> None:
    assert alpha_of(tokens_of_a_round(alpha, proposed), proposed) == pytest.approx(alpha)


# The limit that is named.


def model(curves: Sequence[Curve], alphas: Alphas, *, thresholds: Any = None, **beside: float) -> Model:
    costs = Costs(tuple(curves), ((0.0,),) * len(curves), **beside)
    return Model(len(curves), costs, alphas, thresholds or {}, COMMON_OPTIONS, host_control=True)


def by_method(**alphas: tuple[float, ...]) -> Alphas:
    return lambda setting: alphas[setting.method]


def tuned(world: Model, setting: Setting) -> Setting:
    """With the lengths that suit it best, so that they are not what limits it."""
    return world.fastest(with_lengths(setting))


def named(world: Model, setting: Setting) -> tuple[str, Change]:
    """The limit, and the change that it stands for."""
    found = changes(world, setting)
    assert [one.gain for one in found] == sorted((one.gain for one in found), reverse=True)
    assert all(one.gain == pytest.approx(one.tokens_per_second / world.speed(setting)) for one in found)
    kind = limit(found)
    return kind, next((one for one in found if one.kind == kind), found[0])


def test_a_draft_that_is_too_slow() -> None:
    world = model([flat(0.005), flat(0.010)], by_method(sd=(0.8,)))
    kind, change = named(world, Setting("sd", 4))
    # 4 * 5 + 10 = 30 ms a round, and 20 with a draft of half the time.
    assert (kind, change.setting) == ("draft", None)
    assert change.gain == pytest.approx(1.5)


def test_verification_that_is_not_flat() -> None:
    world = model([flat(0.001), rising(0.010)], by_method(sd=(0.9,)))
    kind, change = named(world, Setting("sd", 4))
    assert kind == "verification"
    assert change.gain == pytest.approx((4 + 50) / (4 + 10))


def test_a_qualifier_that_is_not_worth_its_time() -> None:
    world = model([flat(0.001), flat(0.009), flat(0.010)], by_method(psd=(0.9, 0.9), sd=(0.85,)))
    setting = tuned(world, Setting("psd", 4, 10, 0.3))
    kind, change = named(world, setting)
    assert kind == "qualifier"
    best = tuned(world, Setting("sd", 1))
    assert change.setting == best
    assert change.gain == pytest.approx(world.speed(best) / world.speed(setting))
    assert change.tokens_per_second == pytest.approx(tokens_of_a_round(0.85, 7) / 0.017)


def test_a_qualifier_that_is_worth_its_time_and_too_slow() -> None:
    world = model([flat(0.0001), flat(0.01), flat(0.03)], by_method(psd=(0.95, 0.97), sd=(0.3,)))
    assert named(world, tuned(world, Setting("psd", 4, 10, 0.3)))[0] == "qualifier speed"


def test_a_threshold_of_a_lossless_pyramid() -> None:
    def alphas(setting: Setting) -> tuple[float, ...]:
        if setting.method == "sd":
            return (0.3,)
        return {0.0: (0.4, 0.7), 0.1: (0.3, 0.6), 0.2: (0.9, 0.9), 0.5: (1.0, 0.2)}[
            setting.qualifier_threshold or 0.0
        ]

    curves = [flat(0.0005), flat(0.003), flat(0.010)]
    world = model(curves, alphas, thresholds={"qualifier_threshold": [0.0, 0.1, 0.2, 0.5]})
    kind, change = named(world, tuned(world, Setting("psd", 4, 10, 0.1)))
    assert kind == "qualifier threshold"
    assert change.setting is not None
    assert change.setting.qualifier_threshold == 0.2  # not the largest: what it lets through must stand above


def test_a_threshold_of_a_lossy_method_is_raised_by_one_step() -> None:
    steps = {0.1: 0.2, 0.2: 0.5, 0.3: 0.9, 0.4: 0.99}
    world = model(
        [flat(0.0001), flat(0.010)],
        lambda setting: (steps[setting.target_threshold or 0.0],),
        thresholds={"target_threshold": list(steps)},
    )
    kind, change = named(world, tuned(world, Setting("fsd", 4, target_threshold=0.2)))
    assert kind == "target threshold"
    assert change.setting is not None
    assert change.setting.target_threshold == 0.3
    # From the last one on there is none.
    last = [one.kind for one in changes(world, Setting("fsd", 4, target_threshold=0.4))]
    assert "target threshold" not in last


def test_lengths_that_do_not_suit() -> None:
    world = model([flat(0.0001), flat(0.010)], by_method(sd=(0.95,)))
    kind, change = named(world, Setting("sd", 1))
    assert kind == "lengths"
    assert change.setting == Setting("sd", 16)


def test_speculation_that_does_not_pay() -> None:
    world = model([flat(0.009), flat(0.010)], by_method(sd=(0.05,)))
    kind, change = named(world, Setting("sd", 1))
    assert (kind, change.setting) == ("baseline", Setting("ar"))
    assert change.gain == pytest.approx(100 / (1.05 / 0.019))


def test_a_tier_that_is_missing() -> None:
    world = model([flat(0.0005), flat(0.002), flat(0.030)], by_method(psd=(0.8, 0.95), sd=(0.4,)))
    kind, change = named(world, tuned(world, Setting("sd", 4)))
    assert kind == "added qualifier"
    assert change.setting is not None
    assert (change.setting.method, change.setting.qualifier_threshold) == ("psd", 0.0)


def test_the_target_itself() -> None:
    world = model([flat(0.00001), flat(0.010)], by_method(sd=(0.9,)))
    setting = tuned(world, Setting("sd", 4))
    assert named(world, setting)[0] == "target"
    assert changes(world, setting)[0].gain < WORTH


def test_what_comes_beside_a_pass_counts() -> None:
    world = model([flat(0.001), flat(0.010)], by_method(sd=(0.8,)), step=0.004, match=0.02, plain=0.01)
    assert world.speed(Setting("ar")) == pytest.approx(1 / 0.020)
    assert world.speed(Setting("sd", 4)) == pytest.approx(tokens_of_a_round(0.8, 4) / (4 * 0.005 + 0.030))


def test_device_control_makes_a_fixed_number_of_rounds() -> None:
    costs = Costs((flat(0.001), flat(0.002), flat(0.01)), ((0.0,),) * 3)
    world = Model(3, costs, by_method(psd=(0.5, 0.5)), {}, COMMON_OPTIONS, host_control=False)
    assert world.chain(Setting("psd", 4, 10, 0.3)).inner_rounds == 2
