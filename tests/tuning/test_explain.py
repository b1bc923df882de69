"""`explain` on pyramids whose speeds and answers are made up, and on the demo pyramid."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.positions import FakeClock, PositionTier, logits_of, pyramid_of, related
from rich.console import Console

from pyramid_rt import Fuzzy, InputError, Match, Pyramid, cli
from pyramid_rt.api import demo_weights
from pyramid_rt.cli.explain_report import explanation_object, print_explanation, words
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.tuning.explain import Explanation, explain, recorded_alphas
from pyramid_rt.tuning.replay import Trace

PROMPTS = ([1, 2, 3], [4, 3, 2, 1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("pyramid_rt.stats.time", SimpleNamespace(perf_counter=clock))
    return clock


def seconds_of(each: float, width: int) -> float:
    """A pass that takes as long whatever its width."""
    return each


def explained(
    clock: FakeClock, shares: Sequence[float], seconds: Sequence[float], **options: Any
) -> Explanation:
    costs = [partial(seconds_of, each) for each in seconds]
    defaults = options.pop("defaults", {})
    rt = pyramid_of([logits_of(t) for t in related(shares, 2)], costs, clock, defaults=defaults)
    return explain(rt, PROMPTS, clock=clock, budget=1e9, repeats=2, **options)


def test_model_replay_and_run_agree_where_all_is_known(clock: FakeClock) -> None:
    # The draft is always right: five tokens in 4 * 0.01 + 1 seconds, in whole rounds.
    found = explained(clock, [1.0], [0.01, 1.0], max_new_tokens=1 + 4 * 5, defaults={"draft_length": 4})
    plain, now = found.run
    for one, speed in ((plain, 1.0), (now, 5 / 1.04)):
        assert (one.predicted, one.replayed, one.measured) == pytest.approx((speed, speed, speed))
    [stage] = now.stages
    assert (stage.alpha, stage.beta, stage.proposed, stage.tokens) == (1.0, 1.0, 4.0, 5.0)
    assert (stage.proposing, stage.verifying) == ("draft", "target")
    assert found.model.shares == pytest.approx((0.04 / 1.04, 1 / 1.04))
    # Nothing but longer proposals would help.
    assert found.limit == "lengths"
    assert "The speculation lengths of sd (draft 4) do not suit this pyramid; lengths 16:" in words(found)[0]


def test_a_qualifier_that_costs_what_the_target_costs(clock: FakeClock) -> None:
    found = explained(clock, [1.0, 1.0], [0.001, 1.0, 1.0], max_new_tokens=60)
    assert found.limit == "qualifier"
    assert [one.setting.method for one in found.run] == ["ar", "psd", "sd"]
    said = words(found)
    assert said[0].startswith("The qualifier is not worth its time in psd (draft 4, qualifier 10")
    assert said[1].startswith("Fewer tiers would be faster: sd (draft 16) is ")
    assert "as run" in said[1]
    now, fewer = found.run[1:]
    assert fewer.measured > 1.5 * now.measured


def test_three_tiers_that_pay(clock: FakeClock) -> None:
    found = explained(clock, [0.5, 1.0], [0.01, 0.05, 3.0], max_new_tokens=60)
    assert words(found)[1].startswith("Fewer tiers would not be faster")
    assert found.names == found.tiers == ("draft", "qualifier", "target")


def test_a_slow_draft_is_named(clock: FakeClock) -> None:
    found = explained(clock, [0.8], [0.5, 1.0], defaults={"draft_length": 2})
    assert found.limit == "draft"
    assert words(found)[0].startswith("The draft is too slow: it takes 50 % of the time of sd (draft 2)")


@pytest.mark.parametrize("method", ["psd_a", "psd_f", "fsd"])
def test_lossy_methods(clock: FakeClock, method: str) -> None:
    found = explained(clock, [0.6, 0.8], [0.01, 0.1, 1.0], method=method, max_new_tokens=30)
    assert found.setting.method == method
    assert found.run[1].predicted == pytest.approx(found.run[1].measured, rel=0.25)
    if method != "fsd":
        assert found.run[2].setting.method == "fsd"


def test_acceptance_that_was_recorded() -> None:
    # Places 1 to 4 count; prefill has given the first token.
    trace = Trace(
        own=((0, 1, 2, 3, 4), (0, 1, 2, 0, 0), (0, 1, 0, 3, 0)),
        divergence={(0, 1): (0.0, 0.1, 0.9, 0.1, 0.9), (1, 2): (0.0,) * 5, (0, 2): (0.0,) * 5},
    )
    assert recorded_alphas([trace], (Match(), Match()), (0, 1, 2)) == (0.5, 0.5)
    lower: tuple[Rule, ...] = (Fuzzy(0.2, or_match=True), Match())
    # Through the threshold the draft's 3 reaches the target, whose own it is.
    assert recorded_alphas([trace], lower, (0, 1, 2)) == (0.75, 0.75)
    assert recorded_alphas([trace], (Match(),), (0, 2)) == (0.5,)


def test_the_report_fits_eighty_columns_and_json_says_the_same(clock: FakeClock) -> None:
    found = explained(clock, [0.6, 0.8], [0.01, 0.1, 1.0], method="psd_f", max_new_tokens=30)
    out = io.StringIO()
    print_explanation(Console(file=out, width=80), found)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for piece in (
        "tokens/s",
        "gain",
        "a draft of half the time",
        "verification flat in T",
        "without the qualifier",
    ):
        assert piece in text
    content = json.loads(json.dumps(explanation_object(found, "here"), allow_nan=False))
    assert content["limit"] == found.limit
    assert content["words"] == words(found)
    assert [one["gain"] for one in content["changes"]] == [one.gain for one in found.changes]
    assert content["run"][1]["setting"]["method"] == "psd_f"


def test_bad_arguments(clock: FakeClock) -> None:
    for options, said in (
        ({"method": "ar"}, "method must be one of sd"),
        ({"method": "nonsense"}, "method must be one of sd"),
        ({"method": "psd"}, "needs 3 tiers"),
        ({"max_new_tokens": 1}, "max_new_tokens must be"),
    ):
        with pytest.raises(InputError, match=said):
            explained(clock, [0.5], [0.1, 1.0], **options)
    rt = pyramid_of([logits_of(t) for t in related([0.5], 2)], [lambda w: 0.1, lambda w: 1.0], clock)
    with pytest.raises(InputError, match="prompts: expected at least one"):
        explain(rt, [])
    with pytest.raises(InputError, match=r"prompts\[1\] has 99 tokens"):
        explain(rt, [[1], [1] * 99])
    assert rt.prefix_reuse is True


def test_the_demo_pyramid_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "explain",
        str(demo_weights()),
        "--device=cpu",
        "--max-new-tokens=12",
        "--budget=5",
        "--repeats=1",
    ]
    assert cli.main([*argv, "--method=psd", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [one["setting"]["method"] for one in content["run"]] == ["ar", "psd", "sd"]
    kinds = {one["kind"] for one in content["changes"]}
    assert {"draft", "qualifier speed", "verification", "qualifier", "baseline"} <= kinds
    assert content["limit"] in kinds | {"target"}
    assert all(one["measured"] > 0 and one["predicted"] > 0 for one in content["run"])
    assert cli.main(argv) == 0
    assert "The model says" in capsys.readouterr().out


def test_the_command_line_wants_prompts_of_your_own(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", str(tiny_dir), "--device=cpu"]) == 2
    assert "--prompts FILE is needed: acceptance is measured on texts" in capsys.readouterr().err


def test_a_chain_of_four_tiers_is_explained_by_the_three_that_its_methods_use(clock: FakeClock) -> None:
    logits = [logits_of(tokens) for tokens in related([0.5, 0.9, 0.3], 2)]
    costs = (0.01, 0.1, 0.5, 1.0)
    tiers = [
        PositionTier(f"tier {place}", table, partial(seconds_of, each), clock)
        for place, (table, each) in enumerate(zip(logits, costs, strict=True))
    ]
    found = explain(Pyramid(tiers), PROMPTS, clock=clock, budget=1e9, method="psd_f", max_new_tokens=30)
    assert found.names == ("tier 0", "tier 1", "tier 3")
    assert [(s.proposing, s.verifying) for s in found.run[1].stages] == [
        ("tier 0", "tier 1"),
        ("tier 1", "tier 3"),
    ]
