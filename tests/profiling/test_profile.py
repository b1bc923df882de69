"""Profiles of whole calls: the tokens are those of `generate`, the trace file is whole, the table counts right."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import pyramid_rt
from pyramid_rt import InputError, NonFiniteLogitsError, Pyramid
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.shapes import Shape
from pyramid_rt.models.traffic import step_traffic
from pyramid_rt.profiling import picture
from pyramid_rt.profiling.backend import RecordingBackend
from pyramid_rt.profiling.profile import Profile
from pyramid_rt.profiling.spans import Span
from pyramid_rt.trace import JudgedToken

PROMPT = "def is_empty(self):\n    return"
PSD: dict[str, Any] = {"method": "psd", "qualifier_threshold": 0.1, "draft_length": 3, "qualifier_length": 5}


@pytest.fixture(scope="module")
def demo() -> Iterator[Pyramid]:
    with pyramid_rt.load(pyramid_rt.demo_weights(), device="cpu") as pyramid:
        yield pyramid


@pytest.fixture(scope="module")
def profile(demo: Pyramid) -> Profile:
    return demo.profile(PROMPT, max_new_tokens=40, temperature=0.8, seed=5, **PSD)


def backends(pyramid: Pyramid) -> list[type]:
    return [type(tier.model.backend) for tier in pyramid.tiers if isinstance(tier, ModelTier)]


# Tokens.


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["ar", "sd", "psd"])
@pytest.mark.parametrize("control", ["host", "device"])
def test_a_profile_changes_no_token(tiny_dir: Path, method: str, temperature: float, control: str) -> None:
    options: dict[str, Any] = {"method": method, "temperature": temperature, "seed": 3, "max_new_tokens": 24}
    with pyramid_rt.load(tiny_dir, device="cpu", control=control) as pyramid:
        before = backends(pyramid)
        expected = pyramid.generate("abcabcab", **options)
        profile = pyramid.profile("abcabcab", **options)
        assert profile.result.tokens == expected.tokens
        assert profile.result.text == expected.text
        assert profile.result.trace is not None
        assert [token.token for token in profile.result.trace] == expected.tokens
        assert backends(pyramid) == before
        assert not {RecordingBackend} & set(before)
        assert pyramid.generate("abcabcab", **options).tokens == expected.tokens


def test_backends_are_put_back_after_a_failure(demo: Pyramid, monkeypatch: pytest.MonkeyPatch) -> None:
    target = demo.tiers[-1]
    assert isinstance(target, ModelTier)
    before = target.model.norm.clone()
    target.model.norm.fill_(float("nan"))
    try:
        with pytest.raises(NonFiniteLogitsError):
            demo.profile(PROMPT, max_new_tokens=8, **PSD)
    finally:
        target.model.norm.copy_(before)
    # The first call fails above; here the second one does, with the recording backends in place.
    calls = []

    def fail_in_the_second(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        raise RuntimeError("head")

    demo.generate(PROMPT, max_new_tokens=4, **PSD)
    original, kinds = pyramid_rt.profiling.session.Session.over, backends(demo)

    def over(self: Any, engine: Any, work: Any) -> Any:
        monkeypatch.setattr(kinds[-1], "head", fail_in_the_second)
        return original(self, engine, work)

    monkeypatch.setattr("pyramid_rt.profiling.session.Session.over", over)
    with pytest.raises(RuntimeError, match="head"):
        demo.profile(PROMPT, max_new_tokens=8, **PSD)
    assert calls
    assert backends(demo) == kinds


def test_healing_is_profiled_too(demo: Pyramid) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "heal": True, "seed": 1}
    profile = demo.profile("import jso", **options)
    assert profile.result.tokens == demo.generate("import jso", **options).tokens
    assert [span.kind for span in profile.spans.children].count("round") >= 1
    for span in profile.spans.walk():
        if span.kind == "forward":
            assert {child.kind for child in span.children} <= {"op", "layer"}


def test_wrong_options_are_refused_before_any_work(demo: Pyramid) -> None:
    with pytest.raises(InputError, match="temperature"):
        demo.profile(PROMPT, temperature=-1)
    with pytest.raises(InputError, match="nvtx=True needs a CUDA device"):
        demo.profile(PROMPT, nvtx=True)
    with pytest.raises(InputError, match="nvtx"):
        demo.profile(PROMPT, nvtx=1)  # type: ignore[arg-type]


def test_copies_are_timed_when_the_call_is_over(demo: Pyramid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it they would be part of its max_time, and a short one would be over before anything ran."""
    done = []
    kind = backends(demo)[-1]
    head = kind.head  # type: ignore[attr-defined]

    def counted(self: Any, *arguments: Any) -> Any:
        done.append("pass")
        return head(self, *arguments)

    def copies(device: torch.device) -> float:
        done.append("copies")
        return 1e10

    monkeypatch.setattr(kind, "head", counted)
    monkeypatch.setattr("pyramid_rt.profiling.session.copy_bandwidth", copies)
    assert demo.profile(PROMPT, max_new_tokens=4, **PSD).bandwidth == 1e10
    assert done.count("copies") == 1
    assert done.count("pass") > 4
    assert done[-1] == "copies"


def test_a_call_without_rounds_ends_with_its_table(demo: Pyramid) -> None:
    found = demo.profile(PROMPT, max_new_tokens=1)
    assert found.tier_lines == []
    assert "read" in str(found).splitlines()[-1]


def test_a_picture_has_so_many_rounds_at_most(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rounds is 65, and a picture has 64 at most"):
        profile.save(tmp_path / "rounds.svg", rounds=65)
    assert not list(tmp_path.iterdir())


# Cost.


def calls_of(pyramid: Pyramid) -> Counter[str]:
    """Python calls of one call, and those into C from this package's code, by file and name."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and "pyramid_rt" in file:
            counted[f"{file}:{frame.f_code.co_qualname}"] += 1
        elif event == "c_call" and "pyramid_rt" in file:
            counted[f"{file}:{frame.f_code.co_qualname}:{argument.__qualname__}"] += 1

    sys.setprofile(count)
    try:
        pyramid.generate(PROMPT, max_new_tokens=12, temperature=0.8, seed=5, **PSD)
    finally:
        sys.setprofile(None)
    return counted


def test_profiling_off_costs_no_call() -> None:
    """Calls of a generation, counted before anything was profiled and after it, are the same, one by one."""
    with pyramid_rt.load(pyramid_rt.demo_weights(), device="cpu", threads=1) as pyramid:
        calls_of(pyramid)  # buffers are taken, modules imported
        before = calls_of(pyramid)
        assert before.total() > 1000
        pyramid.profile(PROMPT, max_new_tokens=12, temperature=0.8, seed=5, **PSD)
        calls_of(pyramid)
        assert calls_of(pyramid) == before
    assert not [name for name in before if "pyramid_rt/profiling/" in name]


# The trace file.


def nested(events: list[dict[str, Any]], track: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each event of a track with its children, as a viewer nests them: by time alone."""
    order = sorted(
        (e for e in events if e["ph"] == "X" and e["tid"] == track), key=lambda e: (e["ts"], -e["dur"])
    )
    stack: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    found = []
    for event in order:
        while stack and event["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"] - 1e-6:
            stack.pop()
        if stack:
            parent = stack[-1][0]
            assert event["ts"] + event["dur"] <= parent["ts"] + parent["dur"] + 1e-6, (parent, event)
            stack[-1][1].append(event)
        pair: tuple[dict[str, Any], list[dict[str, Any]]] = (event, [])
        stack.append(pair)
        found.append(pair)
    return found


@pytest.fixture(scope="module")
def events(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = profile.save(tmp_path_factory.mktemp("trace") / "trace.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["otherData"]["machine"] == profile.machine
    listed: list[dict[str, Any]] = content["traceEvents"]
    return listed


def test_the_trace_is_well_formed(events: list[dict[str, Any]]) -> None:
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(named.values()) == ["everything", "target", "qualifier", "draft"]
    assert [event["name"] for event in events if event["ph"] == "M"].count("process_name") == 1
    for event in events:
        assert event["ph"] in ("M", "X")
        assert event["pid"] == 1
        assert event["tid"] in {*named, 0}
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert event["name"]
            assert event["cat"]


def test_ranges_nest_from_round_to_op(events: list[dict[str, Any]]) -> None:
    allowed = {
        "call": {"prefill", "round", "rest"},
        "prefill": {"forward", "rest"},
        "round": {"burst", "verify", "rest"},
        "burst": {"forward", "rest"},
        "verify": {"forward", "rest"},
        "forward": {"op", "layer"},
        "layer": {"op"},
        "op": set(),
        "rest": set(),
    }
    pairs = nested(events, 1)
    for parent, children in pairs:
        assert {child["cat"] for child in children} <= allowed[parent["cat"]], parent
    kinds = {parent["cat"] for parent, _ in pairs}
    assert kinds == allowed.keys()
    for _, children in nested(events, 2):
        assert not children


def test_a_rounds_children_add_up_to_it(events: list[dict[str, Any]]) -> None:
    rounds = [pair for pair in nested(events, 1) if pair[0]["cat"] == "round"]
    assert len(rounds) >= 3
    for number, (parent, children) in enumerate(rounds, start=1):
        assert parent["name"] == f"round {number}"
        assert sum(child["dur"] for child in children) == pytest.approx(parent["dur"], rel=0.05)
        assert {child["name"] for child in children if child["cat"] == "rest"} <= {"bookkeeping"}
        assert [child["name"] for child in children if child["cat"] == "verify"][-1] == "verify of 'target'"


def test_passes_carry_their_sizes(events: list[dict[str, Any]]) -> None:
    passes = [event for event in events if event.get("cat") == "forward"]
    assert passes
    for event in passes:
        assert event["args"]["tokens"] >= 1
        assert event["args"]["context"] >= 0
        assert event["args"]["bytes"] > 0
    ops = [event for event in events if event.get("cat") == "op" and event["name"] != "window"]
    for event in ops:
        args = event["args"]
        assert args["weights"] + args["cache"] + args["activations"] == args["bytes"], event


# The table.


def test_bytes_are_those_of_the_formulas(demo: Pyramid, profile: Profile) -> None:
    """A pass with logits of all rows is a step; its matrices are as large as those that were loaded."""
    configs = {tier.name: tier.config for tier in demo.tiers if isinstance(tier, ModelTier)}
    full = 0
    for span in profile.spans.walk():
        if span.kind != "forward":
            continue
        ops = [op for op in span.walk() if op.kind == "op"]
        heads = [op for op in ops if op.name == "head"]
        if heads and heads[0].args["rows"] == span.args["tokens"]:
            full += 1
            shape = Shape.of("tier", configs[span.tier or ""])
            assert span.args["bytes"] == step_traffic(
                shape, length=span.args["tokens"], context=span.args["context"], itemsize=4
            )
    assert full > 10
    target = demo.tiers[-1]
    assert isinstance(target, ModelTier)
    step = next(span for span in profile.spans.walk() if span.kind == "forward" and span.tier == "target")
    first = {op.name: op.args["weights"] for op in step.walk() if op.kind == "op" and "weights" in op.args}
    layer = target.model.layers[0]
    for name in ("qkv", "out", "gate_up", "down"):
        assert first[name] == getattr(layer, name).nbytes
    assert first["head"] == target.model.head.nbytes


def test_the_table_counts_what_ran(demo: Pyramid, profile: Profile) -> None:
    rows = profile.rows
    by_name = {(row.kind, row.name): row for row in rows if row.depth == 2}
    stats = {tier.name: tier for tier in profile.result.stats.tiers}
    rounds = next(row for row in rows if row.kind == "round")
    assert rounds.calls == stats["target"].forwards
    assert by_name["verify", "verify of 'qualifier'"].calls == stats["qualifier"].forwards
    lines = {line.tier: line for line in profile.tier_lines}
    assert {name: line.passes for name, line in lines.items()} == {
        name: tier.forwards for name, tier in stats.items()
    }
    layers = {tier.name: tier.config.num_layers for tier in demo.tiers if isinstance(tier, ModelTier)}
    for name, line in lines.items():
        assert line.launches == 3 + 5 * layers[name]  # window, embedding, head
        assert 0 <= line.gaps < 1
        assert line.floor is not None
        assert line.floor > 0
    for row in rows:
        assert row.p10 <= row.median <= row.p90
        assert row.total >= row.median
        assert row.share <= 1.0 + 1e-9


def test_the_table_fits_a_terminal_and_names_every_level(profile: Profile) -> None:
    text = str(profile)
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in (
        "round",
        "burst of 'draft'",
        "verify of 'qualifier'",
        "forward",
        "layer",
        "gate_up",
        "decide",
    ):
        assert word in text
    assert "GB/s" in text
    assert text.count("a pass takes") == 3


def test_everything_as_json(profile: Profile) -> None:
    content = json.loads(json.dumps(profile.to_dict()))
    assert content["rows"][0]["name"] == "call"
    assert content["spans"]["kind"] == "call"
    assert content["result"]["tokens"] == profile.result.tokens
    assert [line["tier"] for line in content["tiers"]] == ["draft", "qualifier", "target"]


# The picture's data.


def test_the_picture_tells_what_became_of_each_token(profile: Profile) -> None:
    trace = profile.result.trace
    assert trace is not None
    rounds = profile.rounds(100)
    assert [each.number for each in rounds] == list(range(1, len(rounds) + 1))
    assert (
        sum(each.committed for each in rounds) == len(profile.result.tokens) - 1
    )  # the first is the prompt's
    stood = Counter(cell.fate for each in rounds for row in each.rows for cell in row.cells)
    records = trace.rounds
    assert stood["stood"] == sum(record.accepted for record in records)
    assert stood["fell"] == sum(bool(record.fell) for record in records)
    assert stood["fell"] > 0
    assert stood["correction"] == sum(
        record.replaces and record.replacement is not None for record in records
    )
    assert stood["bonus"] > 0
    reasons = {
        cell.reason for each in rounds for row in each.rows for cell in row.cells if cell.fate == "fell"
    }
    assert all(reason == "mismatch" or reason.endswith("> 0.1") for reason in reasons), reasons
    for each in rounds:
        assert each.rows[-1].label == "qualifier → target"
        assert [tier for tier, _ in each.lanes] == ["draft", "qualifier", "target"]
        kept = [cell for cell in each.rows[-1].cells if cell.fate in ("stood", "correction", "bonus")]
        assert len(kept) >= each.committed
        busy = sum(bar.end - bar.begin for _, bars in each.lanes for bar in bars)
        assert busy + each.other == pytest.approx(each.milliseconds, rel=0.05)


def judged(**beside: Any) -> JudgedToken:
    return JudgedToken(9, 7, "draft", "target", "rule", stood=False, own=8, **beside)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (judged(reason="far", divergence=0.31, threshold=0.1), "divergence 0.31 > 0.1"),
        (judged(reason="far", divergence=0.1004, threshold=0.1), "divergence 0.1004 > 0.1"),
        (judged(reason="rejected", p=0.3, q=0.4, uniform=0.9), "p/q 0.75 <= u 0.9"),
        (judged(reason="rejected", p=0.3, q=0.4, uniform=0.7501), "p/q 0.75 <= u 0.7501"),
        (judged(reason="rejected", p=0.3, q=0.0, uniform=0.5), "q is 0"),
    ],
)
def test_numbers_that_decide_are_told_apart_in_the_picture(token: JudgedToken, reason: str) -> None:
    assert picture._reason(token) == reason


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("so ", "so␣"),
        (" so", "␣so"),
        ("a b", "a b"),
        (" ", "␣"),
        ("){\n", "){⏎"),
        ("\x1b[", "·["),
        ("", "[7]"),
    ],
)
def test_blanks_at_the_ends_of_a_token_show(text: str, shown: str) -> None:
    # "so" and "so " are two tokens: without a sign, one would seem to be put in the place of itself.
    assert picture._shown(text, 7) == shown


def test_probabilities_are_the_reason_of_a_rejection(demo: Pyramid) -> None:
    found = demo.profile(
        PROMPT, method="sd", lossless_rule="rejection", temperature=1.0, seed=2, max_new_tokens=40
    )
    cells = [cell for each in found.rounds(100) for row in each.rows for cell in row.cells]
    fell = [cell for cell in cells if cell.fate == "fell"]
    assert fell
    assert all(cell.reason.startswith("p/q ") for cell in fell)


def test_plain_decoding_has_a_picture_too(demo: Pyramid) -> None:
    found = demo.profile(PROMPT, method="ar", max_new_tokens=6, ignore_eos=True)
    rounds = found.rounds(2, first=1)
    assert [each.number for each in rounds] == [2, 3]
    assert [[cell.fate for row in each.rows for cell in row.cells] for each in rounds] == [["plain"]] * 2


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_pictures_are_files_of_their_kind(profile: Profile, kind: str, tmp_path: Path) -> None:
    content = profile.save(tmp_path / f"rounds.{kind}", rounds=2).read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert len(content) > 10_000


def test_files_of_other_kinds_are_refused(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match=r"path is 'a\.pdf', expected a name that ends in \.json, \.svg, \.png"
    ):
        profile.save(tmp_path / "a.pdf")
    with pytest.raises(InputError, match="cannot write it"):
        profile.save(tmp_path / "none" / "a.json")
    had = len(profile.rounds(10_000))
    with pytest.raises(InputError, match=f"first=10000 is beyond the call's last round: it had {had},"):
        profile.save(tmp_path / "a.svg", first=10_000)
    for name in ("a.svg", "a.json"):
        with pytest.raises(InputError, match="rounds must be an integer >= 1, found 0"):
            profile.save(tmp_path / name, rounds=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'pyramid-rt\[profile\]'"):
        profile.save(tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_spans_partition_their_parents(profile: Profile) -> None:
    def check(span: Span) -> None:
        at = span.begin
        for child in span.children:
            assert at <= child.begin <= child.end <= span.end
            at = child.end
            check(child)

    check(profile.spans)
