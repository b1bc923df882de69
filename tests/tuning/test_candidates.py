"""The settings that the search looks at, and those that are run."""

from __future__ import annotations

import pytest

from pyramid_rt.decoding.methods import METHODS, methods_for
from pyramid_rt.tuning.candidates import (
    DEPENDS_ON,
    agreement,
    finalists,
    settings,
    standing_share,
    thresholds,
    widest,
)
from pyramid_rt.tuning.replay import Prediction, Setting, Trace

HUNDREDTHS = tuple(n / 100 for n in range(1, 101))
TWO = Trace(((0,) * 100, (0,) * 90 + (1,) * 10), {(0, 1): HUNDREDTHS})
THREE = Trace(
    ((0,) * 100, (0,) * 90 + (1,) * 10, (0,) * 100),
    {(0, 1): HUNDREDTHS, (1, 2): (0.0123,) * 100, (0, 2): (float("inf"),) * 50 + (0.0,) * 50},
)


def test_thresholds_let_shares_of_the_positions_stand() -> None:
    assert thresholds([TWO], (0, 1)) == [0.3, 0.5, 0.65, 0.8, 0.9, 0.97, 1.0]
    assert [standing_share([TWO], (0, 1), value) for value in (0.3, 0.97)] == [0.3, 0.97]


def test_thresholds_are_rounded_up_and_never_nothing() -> None:
    assert thresholds([THREE], (1, 2)) == [0.013]
    assert thresholds([THREE], (0, 2)) == []
    big = Trace(TWO.own, {(0, 1): tuple(1234.5 * value for value in HUNDREDTHS)})
    assert thresholds([big], (0, 1)) == [380.0, 620.0, 810.0, 990.0, 1200.0, 1300.0]


def test_agreement_is_the_share_of_equal_own_tokens() -> None:
    assert agreement([THREE], (0, 1)) == 0.9
    assert agreement([THREE], (0, 2)) == 1.0


@pytest.mark.parametrize(("traces", "tiers"), [([TWO], 2), ([THREE], 3)])
def test_every_setting_can_run_and_depends_on_what_it_says(traces: list[Trace], tiers: int) -> None:
    every = list(settings(traces, lossy=True))
    assert len(set(every)) == len(every)
    assert {setting.method for setting in every} <= set(methods_for(tiers))
    widths = [0] * tiers
    for setting in every:
        assert tuple(setting.options())[1:] == DEPENDS_ON[setting.method]
        for host in (True, False):
            plan = setting.plan({}, host_control=host)
            if host and tiers == plan.tiers:
                widths = [max(a, plan.window(level)) for level, a in enumerate(widths)]
    assert tuple(widths) == widest(tiers)


def test_lossy_settings_are_asked_for() -> None:
    assert {setting.method for setting in settings([THREE], lossy=False)} == {"ar", "sd", "psd"}
    # Without a threshold between draft and target that lets some stand there is no fsd to try.
    assert {setting.method for setting in settings([THREE], lossy=True)} == set(METHODS) - {"fsd"}


def prediction(rate: float, method: str, draft: int = 1, differs: float = 0.0) -> Prediction:
    setting = Setting(method, None if method == "ar" else draft)
    return Prediction(setting, (1.0,), rate, 1.0, differs)


def test_finalists_are_the_best_of_each_method_and_promising_spares() -> None:
    considered = [
        prediction(100, "sd", 4),
        prediction(99, "sd", 4, 0.0),
        prediction(98, "sd", 6),
        prediction(97, "sd", 5),
        prediction(96, "sd", 7),
        prediction(60, "psd", 3),
        prediction(59, "psd", 4),
        prediction(40, "ar"),
    ]
    current = prediction(30, "sd", 9)
    chosen = finalists(considered, current, 0.1)
    assert [(one.setting.method, one.setting.draft_length) for one in chosen] == [
        ("ar", None),
        ("sd", 4),
        ("psd", 3),
        ("sd", 9),
        ("sd", 6),
        ("sd", 5),
    ]
    assert finalists(considered, considered[0], 0.1) == [considered[i] for i in (7, 0, 5, 2, 3)]


def test_lossy_finalists_keep_to_the_bound() -> None:
    considered = [
        prediction(200, "fsd", 9, 0.3),
        prediction(150, "fsd", 8, 0.09),
        prediction(149, "fsd", 7, 0.08),
        prediction(145, "fsd", 6, 0.05),
        prediction(40, "ar"),
    ]
    # The first is too foreign; the model is an estimate, so the spare is far more careful. It must promise as much
    # as others do, and 145 is less than eight tenths of 200.
    assert finalists(considered, None, 0.1) == [considered[4], considered[1]]
    assert finalists(considered[1:], None, 0.1) == [considered[4], considered[1], considered[3]]
