"""The search for defaults, on pyramids whose speeds and answers are made up, and once on real models."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.positions import VOCAB, FakeClock, logits_of, pyramid_of, related
from rich.console import Console

from pyramid_rt import InputError, Pyramid, cli, load
from pyramid_rt.api import demo_weights
from pyramid_rt.cli.tune_report import described, print_tuning, tuning_object, words
from pyramid_rt.tuning.search import TuneOptions, Tuning, choose, tune

PROMPTS = ([1, 2, 3], [4, 3, 2, 1], [1, 1])
Cost = Callable[[int], float]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of the tiers, of the search, and of the statistics."""
    clock = FakeClock()
    monkeypatch.setattr("pyramid_rt.stats.time", SimpleNamespace(perf_counter=clock))
    return clock


def flat(seconds: float) -> Cost:
    return lambda width: seconds


def search(
    pyramid: Pyramid, clock: FakeClock, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any
) -> Tuning:
    wanted: dict[str, Any] = {"max_new_tokens": 40, "repeats": 2, "budget": 1e9, **options}
    return tune(pyramid, prompts, TuneOptions(**wanted), clock=clock)


def made_up(clock: FakeClock, shares: Sequence[float], costs: Sequence[Cost], **options: Any) -> Pyramid:
    return pyramid_of([logits_of(tokens) for tokens in related(shares, 2)], costs, clock, **options)


def said(tuning: Tuning) -> str:
    return " ".join(words(tuning))


# What is chosen.


def test_two_tiers_win_where_the_qualifier_costs_what_the_target_costs(clock: FakeClock) -> None:
    # The draft is always right: the longest proposal is best, 17 tokens for 16 * 0.001 + 1.
    pyramid = made_up(clock, [1.0, 1.0], [flat(0.001), flat(1.0), flat(1.0)])
    tuning = search(pyramid, clock, max_new_tokens=1 + 4 * 17)  # whole rounds, or a shorter one does as well
    assert tuning.defaults() == {"method": "sd", "draft_length": 16}
    assert "sd beats three tiers here: sd (draft 16)" in said(tuning)
    assert "Chosen: sd (draft 16)" in said(tuning)


def test_plain_decoding_wins_where_drafts_cost_and_fall(clock: FakeClock) -> None:
    tuning = search(made_up(clock, [0.05, 0.05], [flat(0.5), flat(0.7), flat(1.0)]), clock)
    assert tuning.defaults() == {"method": "ar"}
    assert "ar beats three tiers here" in said(tuning)
    assert "Plain decoding (ar) is chosen: nothing that was run beats it." in said(tuning)


def test_three_tiers_win_where_a_cheap_qualifier_is_right_and_the_draft_is_not(clock: FakeClock) -> None:
    tuning = search(made_up(clock, [0.5, 1.0], [flat(0.01), flat(0.05), flat(3.0)]), clock)
    chosen = tuning.chosen.setting
    assert chosen.method == "psd"
    assert chosen.qualifier_length is not None
    assert chosen.qualifier_length >= 12  # the target is dear and takes everything
    assert tuning.defaults().keys() == {
        "method",
        "draft_length",
        "qualifier_length",
        "qualifier_threshold",
        "divergence",
        "divergence_on",
    }
    assert f"Three tiers pay here: {described(chosen)}" in said(tuning)


@pytest.mark.parametrize("shares", [(0.6, 0.8), (0.3, 0.9), (0.8, 0.9)])
def test_what_was_predicted_is_what_is_measured(clock: FakeClock, shares: tuple[float, float]) -> None:
    costs = [lambda w: 0.02 + 0.001 * w, lambda w: 0.1 + 0.01 * w, lambda w: 1.0 + 0.02 * w]
    tuning = search(made_up(clock, shares, costs), clock)
    assert len(tuning.rows) >= 3
    for row in tuning.rows:
        assert row.prediction.tokens_per_second == pytest.approx(row.tokens_per_second, rel=1e-6)
        assert row.prediction.tokens_per_target_forward == pytest.approx(row.tokens_per_target_forward)
        assert row.unequal == 0
    # In a world that the model knows exactly, nothing it looked at is faster than what was chosen.
    best = max(one.tokens_per_second for one in tuning.considered)
    assert tuning.chosen.tokens_per_second == pytest.approx(best)
    assert tuning.considered[0].setting == tuning.chosen.setting


def test_under_device_control_every_pass_of_a_round_is_paid(clock: FakeClock) -> None:
    costs = [flat(0.05), flat(0.2), flat(1.0)]
    pyramid = made_up(clock, (0.7, 0.9), costs, control="device")
    tuning = search(pyramid, clock)
    for row in tuning.rows:
        # The device runs a round ahead of the host; the last one is paid and not needed.
        assert row.prediction.tokens_per_second == pytest.approx(row.tokens_per_second, rel=0.2)
        assert row.prediction.tokens_per_target_forward == pytest.approx(row.tokens_per_target_forward)


def test_seconds_that_graphs_hide_are_done_without(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid = made_up(clock, (0.7, 0.9), [flat(0.05), flat(0.2), flat(1.0)])
    open_ = search(pyramid, clock)
    monkeypatch.setattr(
        "pyramid_rt.decoding.generation.Generation.seconds", lambda self: [None] * self._plan.tiers
    )
    hidden = search(pyramid, clock)
    assert hidden.defaults() == open_.defaults()
    for row in hidden.rows:
        assert row.prediction.tokens_per_second == pytest.approx(row.tokens_per_second, rel=1e-6)


def test_two_tiers_are_enough(clock: FakeClock) -> None:
    tuning = search(made_up(clock, [0.9], [flat(0.01), flat(1.0)]), clock)
    assert tuning.defaults()["method"] == "sd"
    assert "With 2 tiers there is no method of three to try." in said(tuning)


def nearly_tied(clock: FakeClock, share: float) -> Pyramid:
    """The draft has another own token in 1 - `share` of places, but its distribution is the target's."""
    draft, target = related([share], 4)
    table = logits_of(target)
    other = table.clone()
    for place, token in enumerate(draft):
        if token != target[place]:
            table[place, token] = 6.0 - 1e-4
            other[place, token] = 6.0 + 1e-4
    return pyramid_of([other, table], [flat(0.01), flat(1.0)], clock)


def test_lossy_methods_are_considered_when_asked_for_and_within_the_bound(clock: FakeClock) -> None:
    lossless = search(nearly_tied(clock, 0.9), clock)
    lossy = search(nearly_tied(clock, 0.9), clock, lossy=True, max_differs=0.3)
    bound = search(nearly_tied(clock, 0.9), clock, lossy=True, max_differs=0.01)
    assert lossless.defaults()["method"] == bound.defaults()["method"] == "sd"
    assert {row.setting.method for row in lossless.rows} == {"ar", "sd"}
    assert lossy.defaults().keys() == {
        "method",
        "draft_length",
        "target_threshold",
        "divergence",
        "divergence_on",
    }
    assert lossy.chosen.differs is not None
    assert 0.02 < lossy.chosen.differs <= 0.3
    assert lossy.chosen.ratio > lossless.chosen.ratio
    assert "% not the target's" in said(lossy)


def test_the_bound_is_on_what_was_measured(clock: FakeClock) -> None:
    tuning = search(nearly_tied(clock, 0.9), clock, lossy=True, max_differs=0.3)
    lossy = next(row for row in tuning.rows if not row.setting.lossless)
    assert choose(tuning.rows, 0.3) == lossy
    best = max(row.ratio for row in tuning.rows if row.setting.lossless)
    others = [row for row in tuning.rows if row.setting.lossless]
    assert choose([*others, dataclasses.replace(lossy, ratio=1.04 * best)], 0.3).setting.lossless
    assert not choose([*others, dataclasses.replace(lossy, ratio=1.06 * best)], 0.3).setting.lossless
    rows = (*others, dataclasses.replace(lossy, ratio=1.04 * best))
    assert "not worth giving up" in said(dataclasses.replace(tuning, rows=rows, chosen=choose(rows, 0.3)))
    assert "not worth giving up" not in said(tuning)
    assert lossy.differs is not None
    assert choose(tuning.rows, lossy.differs - 1e-9).setting.lossless


def test_three_tiers_are_judged_among_lossless_settings_and_among_all(clock: FakeClock) -> None:
    target = related([0.5, 0.5], 4)[-1]
    # The qualifier is right and cheap, the draft is wrong but its distribution is the target's.
    table, draft = logits_of(target), logits_of(target)
    for place, token in enumerate(target):
        other = (token + 1) % VOCAB
        table[place, other], draft[place, other] = 6.0 - 1e-4, 6.0 + 1e-4
    pyramid = pyramid_of([draft, table, table], [flat(0.01), flat(0.1), flat(1.0)], clock)
    tuning = search(pyramid, clock, lossy=True, max_differs=1.0)
    assert " Three tiers pay here: psd (" in said(tuning)
    assert "With lossy methods: fsd beats three tiers here" in said(tuning)
    assert tuning.defaults()["method"] == "fsd"
    assert "With lossy methods" not in said(search(pyramid, clock))


def test_what_is_set_now_is_run_and_may_stay(clock: FakeClock) -> None:
    defaults = {"method": "sd", "draft_length": 9, "temperature": 0.7, "max_new_tokens": 7}
    pyramid = made_up(clock, [1.0, 1.0], [flat(0.001), flat(1.0), flat(1.0)], defaults=defaults)
    tuning = search(pyramid, clock)
    assert [row.setting.draft_length for row in tuning.rows if row.current] == [9]
    assert tuning.common["temperature"] == 0.7
    assert "at temperature 0.7" in said(tuning)
    assert [row for row in tuning.rows if row.unequal != 0] == []
    assert "Every lossless setting wrote ar's tokens" in said(tuning)


def test_a_threshold_of_another_divergence_is_not_what_is_set_now(clock: FakeClock) -> None:
    defaults = {"method": "psd", "draft_length": 3, "qualifier_length": 5, "qualifier_threshold": 0.2}
    costs = [flat(0.01), flat(0.05), flat(3.0)]
    for divergence, runs in (("js", [0.2]), ("tv", [])):
        pyramid = made_up(clock, [0.5, 0.9], costs, defaults=defaults)
        tuning = search(pyramid, clock, common={"divergence": divergence})
        assert [row.setting.qualifier_threshold for row in tuning.rows if row.current] == runs
        assert tuning.common["divergence"] == divergence


def test_defaults_do_not_leak_into_what_is_measured(clock: FakeClock) -> None:
    costs = [flat(0.01), flat(0.05), flat(3.0)]
    plain = search(made_up(clock, [0.5, 1.0], costs), clock)
    defaults = {"inner_rounds": 1, "max_new_tokens": 2, "draft_length": 1, "qualifier_length": 2}
    other = search(made_up(clock, [0.5, 1.0], costs, defaults=defaults), clock)
    assert other.defaults() == plain.defaults()
    assert other.chosen.tokens_per_second == pytest.approx(plain.chosen.tokens_per_second)


def test_rejection_draws_other_tokens_and_that_is_no_fault(clock: FakeClock) -> None:
    pyramid = made_up(clock, [0.8, 0.9], [flat(0.01), flat(0.1), flat(1.0)])
    tuning = search(pyramid, clock, common={"lossless_rule": "rejection", "temperature": 1.0})
    assert [row for row in tuning.rows if row.unequal is not None] == []
    assert "wrote ar's tokens" not in said(tuning)


def test_a_lossless_method_that_lost_something_is_reported(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyramid = made_up(clock, [0.8, 0.9], [flat(0.01), flat(0.1), flat(1.0)])
    honest = pyramid.generate

    def forged(prompt: Any, **options: Any) -> Any:
        result = honest(prompt, **options)
        if options["method"] == "sd" and prompt == PROMPTS[1]:
            result = dataclasses.replace(
                result, tokens=[*result.tokens[:-1], (result.tokens[-1] + 1) % VOCAB]
            )
        return result

    monkeypatch.setattr(pyramid, "generate", forged)
    tuning = search(pyramid, clock)
    assert next(row.unequal for row in tuning.rows if row.setting.method == "sd") == 1
    assert "is NOT equal to ar: 1 of 3 outputs" in said(tuning)
    assert "Every lossless setting" not in said(tuning)


# How long it takes.


@pytest.mark.parametrize(("budget", "length"), [(200.0, 20), (300.0, 30), (1500.0, 40)])
def test_it_keeps_to_its_budget(clock: FakeClock, budget: float, length: int) -> None:
    prompts = [[1, 2, place % VOCAB] for place in range(12)]
    costs = [flat(0.01), flat(0.1), flat(1.0)]
    tuning = search(made_up(clock, [0.8, 0.9], costs), clock, prompts, budget=budget, repeats=50)
    assert clock.now <= budget
    assert tuning.repeats < 50
    assert len(tuning.rows) >= 2
    assert tuning.length == length  # a token takes a second, and a text may take a tenth of the budget
    assert ("too short for 40 tokens" in said(tuning)) == (length < 40)
    assert tuning.prompts < 12
    assert "left out" in said(tuning)
    assert "The time was over before repeat" in said(tuning)


def test_without_time_everything_is_still_measured_once(clock: FakeClock) -> None:
    costs = [flat(0.01), flat(0.1), flat(1.0)]
    tuning = search(made_up(clock, [0.8, 0.9], costs), clock, budget=0.5)
    assert (tuning.length, tuning.prompts, tuning.repeats) == (16, 1, 1)
    assert len(tuning.rows) == 2
    assert clock.now < 150


def test_prompts_after_which_the_target_says_nothing_are_left_out(clock: FakeClock) -> None:
    own = related([0.9, 0.9], 2)
    for tokens in own:
        tokens[:] = [token % (VOCAB - 1) for token in tokens]
        tokens[2] = VOCAB - 1  # ends the text after a prompt of two tokens at once
    costs = [flat(0.01), flat(0.1), flat(1.0)]
    pyramid = pyramid_of([logits_of(tokens) for tokens in own], costs, clock, eos_token_ids=[VOCAB - 1])
    tuning = search(pyramid, clock)
    assert (tuning.prompts, tuning.prompts_given, tuning.prompts_silent) == (2, 3, 1)
    assert "After 1 prompt the target ended its text at once." in said(tuning)
    assert "left out" not in said(tuning)
    with pytest.raises(InputError, match="within two tokens"):
        search(pyramid, clock, [[1, 1]])


def test_prefix_reuse_is_off_meanwhile_and_comes_back(clock: FakeClock) -> None:
    pyramid = made_up(clock, [0.9], [flat(0.01), flat(1.0)])
    seen: list[bool] = []
    honest = pyramid.generate

    def generate(*arguments: Any, **options: Any) -> Any:
        seen.append(pyramid.prefix_reuse)
        return honest(*arguments, **options)

    pyramid.generate = generate  # type: ignore[method-assign]
    search(pyramid, clock)
    assert not any(seen)
    assert pyramid.prefix_reuse


# Bad input.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 1}, "max_new_tokens must be >= 2, found 1"),
        ({"repeats": 0}, "repeats must be >= 1, found 0"),
        ({"budget": 0.0}, "budget must be > 0 and finite, found 0.0"),
        ({"budget": float("nan")}, "budget"),
        ({"max_differs": 1.5}, "max_differs must be in 0..1, found 1.5"),
        ({"common": {"temperature": -1}}, "temperature"),
        ({"common": {"divergence": "nope"}}, "divergence"),
    ],
)
def test_bad_options(clock: FakeClock, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        search(made_up(clock, [0.9], [flat(0.01), flat(1.0)]), clock, **options)
    assert words in str(caught.value)


def test_one_tier_and_no_prompt_are_refused(clock: FakeClock) -> None:
    tiers = made_up(clock, [0.9], [flat(1.0), flat(1.0)]).tiers
    alone = Pyramid(tiers[1:])
    with pytest.raises(InputError, match="nothing to tune"):
        tune(alone, PROMPTS, TuneOptions(), clock=clock)
    with pytest.raises(InputError, match="at least one, found none"):
        search(made_up(clock, [0.9], [flat(0.01), flat(1.0)]), clock, [])


# What is printed.


def test_the_report_holds_predicted_and_measured(clock: FakeClock) -> None:
    tuning = search(made_up(clock, [0.6, 0.8], [flat(0.02), flat(0.1), flat(1.0)]), clock)
    out = io.StringIO()
    print_tuning(Console(file=out, width=160), tuning)
    text = out.getvalue()
    chosen = next(line for line in text.splitlines() if " * " in line)
    rate = f"{tuning.chosen.tokens_per_second:.1f}"
    assert chosen.split()[0] == tuning.chosen.setting.method
    assert chosen.split().count(rate) == 2  # predicted and measured
    assert "draft to qualifier" in text
    assert "as ar" in text
    content = json.loads(json.dumps(tuning_object(tuning, "here")))
    assert content["chosen"] == tuning.defaults()
    assert len(content["considered"]) == len(tuning.considered)
    assert content["run"][0]["prediction"]["method"] == "ar"


# The command.


def a_directory(tmp_path: Path, tiny_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "pyramid"))


def test_tune_from_end_to_end(tmp_path: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = a_directory(tmp_path, tiny_dir)
    prompts, measured = tmp_path / "prompts.txt", tmp_path / "measured.json"
    prompts.write_text("The quick\n---\nbrown fox\n")
    argv = ["tune", str(directory), "--prompts", str(prompts), "--max-new-tokens", "24", "--repeats", "1"]
    argv += ["--json", str(measured), "--device", "cpu", "--budget", "60"]
    assert cli.main([*argv, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert not (directory / "pyramid.json").exists()
    assert "Not written (--dry-run): {" in out
    assert err == ""
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "The quick"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    argv[argv.index(str(prompts))] = str(chats)
    assert cli.main([*argv, "--lossy", "--max-differs", "0.5"]) == 0
    out, _ = capsys.readouterr()
    assert f"Written to {directory.resolve() / 'pyramid.json'}: " in " ".join(out.split())
    for method in ("ar", "sd", "psd"):
        assert any(line.split()[:1] == [method] for line in out.splitlines()), method
    assert "Every lossless setting wrote ar's tokens" in out
    content = json.loads(measured.read_text())
    assert content["prompts"] == {"given": 2, "used": 2}
    written = json.loads((directory / "pyramid.json").read_text())
    assert written["defaults"] == content["chosen"]
    assert {row["prediction"]["method"] for row in content["run"]} >= {"ar", "sd", "psd", "fsd"}
    with load(directory, device="cpu") as pyramid:
        assert pyramid.default_method == content["chosen"]["method"]
        assert len(pyramid.generate("The quick", max_new_tokens=4, ignore_eos=True).tokens) == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "DIR"),
        (("/no/such/place",), "/no/such/place does not exist"),
        (("DIR",), "--prompts FILE is needed"),
        (("DIR", "--prompts", "/no/such/file"), "/no/such/file: cannot read it"),
        (("DIR/target", "--prompts", "FILE"), "nothing to tune: the pyramid has one tier"),
        (("DIR", "--prompts", "FILE", "--repeats", "0"), "repeats must be >= 1, found 0"),
        (("DIR", "--prompts", "FILE", "--budget", "-1"), "budget"),
        (("DIR", "--prompts", "FILE", "--budget", "soon"), "--budget: invalid float value: 'soon'"),
        (("DIR", "--prompts", "FILE", "--max-differs", "0.2"), "--max-differs needs --lossy"),
        (("DIR", "--prompts", "FILE", "--lossy", "--max-differs", "2"), "max_differs must be in 0..1"),
        (
            ("DIR", "--prompts", "FILE", "--json", "/no/such/place/x"),
            "--json: /no/such/place is no directory",
        ),
        (("DIR", "--prompts", "FILE", "--temperature", "-1"), "temperature"),
        (("DIR", "--prompts", "FILE", "--divergence", "nope"), "divergence"),
        (("DIR", "--prompts", "FILE", "--device", "abacus"), "abacus"),
        (("DIR", "--prompts", "FILE", "--max-seq", "6"), "FILE, line 1: the prompt has 9 tokens"),
        (("DIR", "--prompts", "CHAT"), "CHAT, line 1: "),
        (("DIR", "--weights", "DIR"), "--weights"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    file, chat = tmp_path / "FILE", tmp_path / "CHAT.jsonl"
    file.write_text("The quick")
    chat.write_text('{"messages": [{"rôle": "user"}]}')
    names = {"DIR": str(tiny_dir), "FILE": str(file), "CHAT": str(chat)}
    given = [str(tiny_dir / "target") if word == "DIR/target" else names.get(word, word) for word in argv]
    assert cli.main(["tune", *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyramid-rt: error: ")
    assert err.count("\n") == 1
    assert words.replace("CHAT", "CHAT.jsonl") in err
    assert not (tiny_dir / "pyramid.json").exists()


def test_the_demo_has_prompts_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--dry-run", "--budget", "1", "--repeats", "1", "--max-new-tokens", "6"]
    before = (demo_weights() / "pyramid.json").read_bytes()
    assert cli.main(["tune", str(demo_weights()), *short]) == 0
    assert "Not written" in capsys.readouterr().out
    assert (demo_weights() / "pyramid.json").read_bytes() == before
