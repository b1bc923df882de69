"""The trace of a call: the same tokens with it, facts that add up with the statistics, and its views."""

from __future__ import annotations

import html
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.positions import PositionTier, logits_of

import pyramid_rt
from pyramid_rt import Fuzzy, GenerationResult, GenerationTrace, InputError, Match, Pyramid, SamplingParams
from pyramid_rt.cli import main
from pyramid_rt.decoding.observing import Observer
from pyramid_rt.decoding.rounds.torch_steps import TorchSteps
from pyramid_rt.kernels.reference import sampling as ops
from pyramid_rt.trace import JudgedToken, TokenTrace, VerifyRecord

PROMPT = "def fib(n):\n    "
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 5}
SETTINGS: list[dict[str, Any]] = [
    {"method": "ar"},
    {"method": "sd"},
    {"method": "sd", "lossless_rule": "rejection"},
    {"method": "psd", "qualifier_threshold": 0.05},
    {"method": "psd", "qualifier_threshold": 0.05, "lossless_rule": "rejection"},
    {"method": "psd_f", "qualifier_threshold": 0.05, "target_threshold": 0.1},
    {"method": "psd_a", "target_threshold": 0.1, "divergence": "kl"},
]


@pytest.fixture(scope="module", params=["host", "device"])
def rt(request: pytest.FixtureRequest, tiny_dir: Path) -> Any:
    with pyramid_rt.load(tiny_dir, device="cpu", control=request.param) as pyramid:
        yield pyramid


def both(rt: Pyramid, prompt: Any, **options: Any) -> tuple[GenerationResult, GenerationTrace]:
    """A call with a trace, after the same without one gave the same tokens and text."""
    plain = rt.generate(prompt, max_new_tokens=24, **options)
    traced = rt.generate(prompt, max_new_tokens=24, trace=True, **options)
    assert plain.trace is None
    assert (traced.tokens, traced.text, traced.finish_reason) == (
        plain.tokens,
        plain.text,
        plain.finish_reason,
    )
    assert traced.trace is not None
    check(traced)
    return traced, traced.trace


def check(result: GenerationResult) -> None:
    """The trace of a result: one entry per token, each as the rounds and the statistics have it."""
    trace = result.trace
    assert trace is not None
    assert [one.token for one in trace] == result.tokens
    first = result.stats.prompt_tokens
    assert [one.position for one in trace] == list(range(first, first + len(trace)))
    assert trace.tiers == tuple(tier.name for tier in result.stats.tiers)
    for record in trace.rounds:
        assert [one.position for one in record.proposed] == [
            record.position + place for place in range(len(record.proposed))
        ]
        assert [one.stood for one in record.proposed] == [
            place < record.accepted for place in range(len(record.proposed))
        ]
        assert [one.reason == "behind" for one in record.fell] == [False, *[True] * len(record.fell)][
            : len(record.fell)
        ]
        assert record.tier == trace.tiers[record.level]
    for one in trace:
        top = [r for r in trace.rounds if r.round == one.round and r.level == len(trace.tiers) - 1]
        if one.round is None or not top:
            assert (one.proposed_by, one.accepted_by) == (trace.tiers[-1], ())
            continue
        [record] = top
        place = one.position - record.position
        if place < record.accepted:
            assert one.how == "proposed"
            assert record.proposed[place] == one.judgements[-1]
            above = trace.tiers[trace.tiers.index(one.proposed_by) + 1 :]
            assert one.accepted_by == above == tuple(judged.judged_by for judged in one.judgements)
            assert all(judged.stood and judged.token == one.token for judged in one.judgements)
        else:
            assert one.how == ("correction" if record.replaces else "bonus")
            assert (one.token, one.proposed_by) == (record.replacement, trace.tiers[-1])
        assert all(fallen.position == one.position and not fallen.stood for fallen in one.fell)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_trace_changes_no_token_and_adds_up(rt: Pyramid, options: dict[str, Any], sampled: bool) -> None:
    result, trace = both(rt, PROMPT, ignore_eos=True, **options, **(SAMPLED if sampled else {}))
    for level, tier in enumerate(result.stats.tiers):
        records = [record for record in trace.rounds if record.level == level + 1]
        if tier.proposed is not None:
            assert sum(len(record.proposed) for record in records) == tier.proposed
            assert sum(record.accepted for record in records) == tier.accepted
        committed = [one for one in trace if one.proposed_by == tier.name and one.how != "first"]
        assert len(committed) == tier.survived


@pytest.mark.parametrize(
    "options", [{"top_k": 5, **SAMPLED}, {"top_p": 0.8, "lossless_rule": "rejection", **SAMPLED}], ids=str
)
def test_filters(rt: Pyramid, options: dict[str, Any]) -> None:
    both(rt, PROMPT, method="psd", **options)


@pytest.mark.parametrize("method", ["ar", "sd", "psd"])
def test_healed_tokens_and_stop_strings(rt: Pyramid, method: str) -> None:
    plain = rt.generate(PROMPT, method=method, max_new_tokens=24, **SAMPLED)
    stop = plain.text[len(plain.text) // 2 :][:2]
    _, trace = both(rt, PROMPT, method=method, stop=stop, **SAMPLED)
    assert len(trace) < 24
    result, trace = both(rt, "import o", method=method, heal=True, **SAMPLED)
    assert trace[0].how == "healed"
    assert [one.how for one in trace].count("first") == 1
    assert result.stats.new_tokens == len(trace)


def test_streams_and_calls_that_end_early_have_one_too(rt: Pyramid) -> None:
    with rt.stream(PROMPT, max_new_tokens=24, trace=True, method="psd") as stream:
        next(stream)
    check(stream.result)
    never = rt.generate(PROMPT, max_new_tokens=0, trace=True)
    assert never.trace == []
    calls = [rt.generate(PROMPT, max_new_tokens=9, trace=True, method="psd_f", **SAMPLED) for _ in range(2)]
    assert calls[0].trace is not None
    assert calls[1].trace is not None
    assert calls[0].trace.rounds == calls[1].trace.rounds  # nothing is left over from the first


def test_without_a_trace_a_verify_makes_nothing_for_one(
    tiny: Pyramid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of observers, copies or measured numbers is called."""

    def refuse(*_: object) -> None:
        raise AssertionError("a call without trace=True made an observer work")

    monkeypatch.setattr(Observer, "saw", refuse)
    monkeypatch.setattr(Observer, "take", refuse)
    monkeypatch.setattr("pyramid_rt.decoding.rounds.torch_steps.Verify.of", refuse)
    monkeypatch.setattr(Fuzzy, "measured", refuse)
    tiny.generate(PROMPT, max_new_tokens=12, method="psd")
    with pytest.raises(AssertionError, match="made an observer work"):
        tiny.generate(PROMPT, max_new_tokens=12, method="psd", trace=True)
    assert TorchSteps(tiny.tiers, *arguments(tiny)).observer is None


def arguments(rt: Pyramid) -> tuple[Any, ...]:
    from pyramid_rt.decoding.state import State

    plan = rt.make_plan(SamplingParams(), (Match(), Match()))
    return plan, State.allocate(plan, 64, rt.vocab_size, rt.device), rt.vocab_size


# Facts, where they are known by hand.


def chain(*answers: list[int], rules: Any, **options: Any) -> GenerationTrace:
    """A pyramid whose tiers say these tokens at positions 2, 3, ...; its trace after a prompt of two."""
    names = ("draft", "qualifier", "target")[-len(answers) :] if len(answers) == 3 else ("draft", "target")
    tiers = [
        PositionTier(name, logits_of([0, 0, *tokens])) for name, tokens in zip(names, answers, strict=True)
    ]
    result = Pyramid(tiers, rules=rules).generate([1, 1], trace=True, **options)
    assert result.trace is not None
    check(result)
    return result.trace


def test_what_stood_and_what_fell_by_match() -> None:
    trace = chain(
        [0, 1, 2, 4, 1, 1, 1], [0, 1, 2, 3, 1, 1, 1], [0, 1, 3, 3, 1, 1, 1], rules=[Match(), Match()],
        lengths=(3, 3), max_new_tokens=5,
    )  # fmt: skip
    # After the target's first token the draft says 1 2 4, the qualifier makes it 1 2 3, and the target lets 1 stand.
    lower, upper = trace.rounds[:2]
    assert [(one.token, one.reason, one.own) for one in lower.proposed] == [
        (1, "match", 1), (2, "match", 2), (4, "mismatch", 3),
    ]  # fmt: skip
    assert (lower.position, lower.accepted, lower.replacement, lower.replaces) == (3, 2, 3, True)
    assert [(one.token, one.proposed_by, one.reason) for one in upper.proposed] == [
        (1, "draft", "match"), (2, "draft", "mismatch"), (3, "qualifier", "behind"),
    ]  # fmt: skip
    assert (upper.tier, upper.rule, upper.accepted, upper.replacement) == ("target", "match", 1, 3)
    assert [(one.token, one.how, one.proposed_by) for one in trace[:3]] == [
        (0, "first", "target"), (1, "proposed", "draft"), (3, "correction", "target"),
    ]  # fmt: skip
    assert trace[1].accepted_by == ("qualifier", "target")
    assert [(one.token, one.judged_by, one.reason) for one in trace[2].fell] == [(2, "target", "mismatch")]


def test_divergence_and_threshold_of_a_fuzzy_rule() -> None:
    near, far = [0, 1, 1, 1], [0, 2, 2, 2]
    between = float(ops.divergence("js", logits_of([1]), logits_of([2])))
    trace = chain(far, near, rules=[Fuzzy(between / 2)], draft_length=2, max_new_tokens=3)
    [judged] = trace[1].fell
    assert judged.divergence == pytest.approx(between)
    assert judged.threshold == pytest.approx(between / 2)
    assert (judged.reason, judged.token, judged.own, judged.stood) == ("far", 2, 1, False)
    assert judged.said == f"target: divergence {between:.3g} > {between / 2:.3g}"
    trace = chain(far, near, rules=[Fuzzy(2 * between)], draft_length=2, max_new_tokens=3)
    assert [one.reason for one in trace[1].judgements] == ["close"]
    # Equal tiers are at distance 0; with or_match a token may stand by being the same alone.
    trace = chain(near, near, rules=[Fuzzy(0.0, or_match=True)], draft_length=2, max_new_tokens=3)
    assert [(one.reason, one.divergence) for one in trace[1].judgements] == [("close", 0.0)]


def test_probabilities_of_a_rejection(tiny: Pyramid) -> None:
    trace = tiny.generate(
        PROMPT, method="sd", lossless_rule="rejection", max_new_tokens=24, trace=True, **SAMPLED
    ).trace
    assert trace is not None
    judged = [one for record in trace.rounds for one in record.proposed if one.reason != "behind"]
    assert {one.reason for one in judged} == {"accepted", "rejected"}
    for one in judged:
        assert one.p is not None
        assert one.q is not None
        assert one.uniform is not None
        assert (one.uniform * one.q < one.p) == one.stood
        assert one.ratio == pytest.approx(one.p / one.q)


# Views.


def token(text: str, by: str = "draft", **more: Any) -> TokenTrace:
    return TokenTrace(7, text, 3, 0, by, (), "proposed", **more)


def made_up(*texts: str) -> GenerationTrace:
    judged = JudgedToken(3, 8, "draft", "target", "fuzzy", False, "far", 7, 0.5, 0.25, text="<b>&")
    record = VerifyRecord(0, 1, "target", "fuzzy", 3, (judged,), 0, 7, True)
    tokens = [token(text) for text in texts[1:]]
    return GenerationTrace(
        [token(texts[0], "target", fell=(judged,)), *tokens], [record], ("draft", "target")
    )


def test_no_colours_where_there_is_no_terminal_and_80_columns(
    tiny: Pyramid, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tiny.generate(PROMPT, method="psd_f", max_new_tokens=24, trace=True).trace
    assert trace is not None
    shown = str(trace)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.startswith("draft: ")
    for one in trace:
        assert re.search(rf"^ *{one.position} .*{one.proposed_by}", shown, re.MULTILINE), one
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    painted = str(trace)
    assert painted == trace.view(colour=True) != shown
    assert set(re.findall(r"\x1b\[(\d+)m", painted)) >= {"32", "33", "35", "0"}
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(trace) == shown


class Terminal:
    def isatty(self) -> bool:
        return True


def test_the_view_of_known_tokens() -> None:
    assert str(made_up("a\n", "\x1b[2J")).splitlines() == [
        "draft: 1 of 2 tokens; 0 of 1 proposed stood",
        "target: 1 of 2 tokens",
        "",
        "at token     by     what the rules said; what fell there",
        " 3 'a\\n'     target proposed; '<b>&' of draft fell (target: divergence 0.5 >",
        "                    0.25)",
        " 3 '\\x1b[2J' draft  proposed",
    ]


@pytest.mark.parametrize("colour", [False, True])
def test_a_token_cannot_command_the_terminal(colour: bool) -> None:
    trace = made_up("\x1b]0;title\x07", "\u202egnp", "[red]x[/red]", "\r")
    shown = re.sub(r"\x1b\[\d+m", "", trace.view(colour=colour))
    assert not set(shown) & {"\x1b", "\x07", "\u202e", "\r"}
    assert "[red]x[/red]" in shown


def test_a_notebook_gets_escaped_html() -> None:
    shown = made_up("<script>", '"&')._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;</span>" in shown
    assert "&quot;&amp;</span>" in shown
    titles = re.findall(r'title="([^"]*)"', shown)
    assert (
        html.unescape(titles[0])
        == "3, by target: proposed; '<b>&' of draft fell (target: divergence 0.5 > 0.25)"
    )
    assert re.sub(r"<[^>]*>", "", shown).count("draft: 1 of 2 tokens") == 1


def test_json_and_pickles(tiny: Pyramid) -> None:
    result = tiny.generate(PROMPT, method="psd", qualifier_threshold=math.inf, max_new_tokens=9, trace=True)
    assert result.trace is not None
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))["trace"]
    assert content["tiers"] == ["draft", "qualifier", "target"]
    assert [one["token"] for one in content["tokens"]] == result.tokens
    assert len(content["rounds"]) == len(result.trace.rounds)
    assert {one["threshold"] for record in content["rounds"] for one in record["proposed"]} == {"inf", None}
    again = pickle.loads(pickle.dumps(result.trace))
    assert (again, again.rounds, again.tiers) == (result.trace, result.trace.rounds, result.trace.tiers)


def test_the_option_is_a_flag(tiny: Pyramid) -> None:
    with pytest.raises(InputError, match="trace must be"):
        tiny.generate(PROMPT, trace="yes")  # type: ignore[arg-type]
    assert "trace" not in tiny.generate(PROMPT, max_new_tokens=1).to_dict()


def test_the_command_line(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "generate",
        "--weights",
        str(tiny_dir),
        "--device=cpu",
        "--max-new-tokens=6",
        "--seed=1",
        "--trace",
    ]
    assert main([*argv, PROMPT]) == 0
    out, err = capsys.readouterr()
    assert "what the rules said" in err
    assert "what the rules said" not in out
    assert main([*argv, "--json", PROMPT]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [one["token"] for one in content["trace"]["tokens"]] == content["tokens"]


def test_under_device_control_nothing_is_read_before_the_round_is_over(tiny_dir: Path) -> None:
    from helpers.host_reads import no_host_reads

    with pyramid_rt.load(tiny_dir, device="cpu", control="device") as rt:
        params = SamplingParams(trace=True, method="psd", temperature=0.5)
        _, _, tiers, rules = rt._chosen(params.options())
        engine = rt._engine(tiers, rt.make_plan(params, rules))
        engine.state.limit.fill_(40)
        engine.state.end.fill_(2)
        for cached in engine.state.cached:
            cached.fill_(1)
        with torch.inference_mode(), no_host_reads():
            engine.run(2)
        assert [record.tier for record in engine.observed()].count("target") == 1


@pytest.mark.parametrize(
    ("divergence", "threshold", "words"),
    [(0.10004, 0.1, "0.10004 > 0.1"), (0.25, 0.1, "0.25 > 0.1"), (0.1 + 1e-12, 0.1, "0.100000000001 > 0.1")],
)
def test_numbers_that_decide_are_told_apart(divergence: float, threshold: float, words: str) -> None:
    judged = JudgedToken(3, 8, "draft", "target", "fuzzy", False, "far", 7, divergence, threshold)
    assert judged.said == f"target: divergence {words}"
