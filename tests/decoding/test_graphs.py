"""Captured rounds: the same tokens as eager ones, captured once per shape, without a trace in the state.

There is no GPU here, so the recorder keeps Python calls instead of launches; what is captured, when, and around
which state is the code that a GPU runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.host_reads import no_host_reads

import pyramid_rt
from pyramid_rt import GraphCaptureError, InputError, Pyramid

TEXT = "for name in names:\n"
SPEC: dict[str, Any] = {"draft_length": 2, "qualifier_length": 3, "max_new_tokens": 24, "ignore_eos": True}


class CallRecorder:
    """Warms up as CUDA's recorder does, then keeps the call."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with no_host_reads():
            work()
            work()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


def with_recorder(directory: Path, kind: Any = None) -> tuple[Pyramid, CallRecorder]:
    base = pyramid_rt.load(directory, device="cpu", control="device")
    recorder = CallRecorder()
    captured = Pyramid(
        base.tiers,
        tokenizer=base.tokenizer,
        eos_token_ids=base.eos_token_ids,
        vocab_size=base.vocab_size,
        control="device",
        graphs=kind,
        recorder=recorder,
    )
    return captured, recorder


@pytest.fixture(scope="module")
def eager(tiny_dir: Path) -> Pyramid:
    return pyramid_rt.load(tiny_dir, device="cpu", control="device")


@pytest.fixture
def captured(tiny_dir: Path) -> tuple[Pyramid, CallRecorder]:
    return with_recorder(tiny_dir)


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["ar", "sd", "fsd", "psd_a", "psd_f", "psd"])
def test_tokens_are_those_of_eager_rounds(
    eager: Pyramid, tiny_dir: Path, method: str, temperature: float, kind: str
) -> None:
    rt, recorder = with_recorder(tiny_dir, kind)
    assert rt.graphs
    options = {**SPEC, "method": method, "temperature": temperature, "seed": 3}
    text: str = TEXT
    for _ in range(2):
        ours, theirs = rt.generate(text, **options), eager.generate(text, **options)
        assert ours.tokens == theirs.tokens
        assert [t.accepted for t in ours.stats.tiers] == [t.accepted for t in theirs.stats.tiers]
        timed = [t.seconds is not None and t.seconds > 0 for t in ours.stats.tiers]
        assert timed == [kind == "step"] * len(ours.stats.tiers)
        text += ours.text
    # The steps: start, burst, report; with two tiers a verify, with three another and the start of inner rounds.
    assert recorder.captures == (1 if kind == "round" else {1: 3, 2: 4, 3: 6}[len(timed)])
    assert recorder.replays >= ours.stats.tiers[-1].forwards


def test_a_combination_is_captured_once(captured: tuple[Pyramid, CallRecorder]) -> None:
    rt, recorder = captured
    hot = {**SPEC, "method": "psd", "temperature": 0.5}
    assert rt.prepare(**hot) == recorder.captures > 0
    assert rt.prepare(**hot) == 0
    made = recorder.captures
    for changed in (
        {"temperature": 0.9},
        {"seed": 8},
        {"qualifier_threshold": 0.01},
        {"target_threshold": 0.01},
        {"max_new_tokens": 5},
        {"stop": ["q"]},
    ):
        rt.generate(TEXT, **{**hot, **changed})
    assert recorder.captures == made
    for new in ({"draft_length": 3}, {"divergence": "tv"}, {"top_k": 5}, {"lossless_rule": "rejection"}):
        rt.generate(TEXT, **{**hot, **new})
    assert recorder.captures == made + 4


@pytest.mark.parametrize("kind", ["round", "step"])
def test_prepare_captures_every_length_of_text(tiny_dir: Path, kind: str) -> None:
    rt, recorder = with_recorder(tiny_dir, kind)
    told: list[tuple[int, int]] = []
    assert (
        rt.prepare(**SPEC, method="sd", progress=lambda *amounts: told.append(amounts)) == recorder.captures
    )
    made = recorder.captures
    works = made // (1 if kind == "round" else 4)
    assert told == [(done, works) for done in range(works + 1)]
    rt.generate(list(range(200)), **{**SPEC, "method": "sd", "max_new_tokens": 80})
    rt.generate([1], **{**SPEC, "method": "sd"})
    assert recorder.captures == made


def test_capture_leaves_caches_and_state_alone(captured: tuple[Pyramid, CallRecorder]) -> None:
    rt, recorder = captured
    options = {**SPEC, "method": "psd"}
    first = rt.generate(TEXT, **options)
    caches: list[torch.Tensor] = [tier.cache.buffer for tier in rt.tiers]  # type: ignore[attr-defined]
    context = rt.max_seq - 1  # a draft never sees the last position, and a parked one writes it
    before = [cache[:, :, :, :context].clone() for cache in caches]
    held = [list(tier.held) for tier in rt.tiers]
    rt.prepare(**{**options, "draft_length": 4})
    rt.prepare(**{**options, "method": "ar"})
    assert recorder.captures > 1
    for cache, old in zip(caches, before, strict=True):
        assert_equal_tensors(cache[:, :, :, :context], old)
    assert [list(tier.held) for tier in rt.tiers] == held
    again = rt.generate(TEXT, **options)
    assert again.stats.reused_tokens == len(TEXT) - 1
    assert again.tokens == first.tokens
    # A capture in the middle of a generation, when a text outgrows the first graph, is as quiet.
    kept = next(iter(rt._kept.values()))
    assert kept._graphs is not None
    kept._graphs._captured.clear()
    assert rt.generate(TEXT, **options).tokens == first.tokens


def test_a_failed_capture_says_where_and_loses_nothing(
    captured: tuple[Pyramid, CallRecorder], eager: Pyramid, monkeypatch: pytest.MonkeyPatch
) -> None:
    rt, _ = captured
    options = {**SPEC, "method": "psd"}
    with monkeypatch.context() as patch:
        tier = rt.tiers[1]
        original = tier.forward

        def reading(tokens: Any, start: Any, rows: Any, bound: int) -> Any:
            if rows is not None:
                start.item()
            return original(tokens, start, rows, bound)

        patch.setattr(tier, "forward", reading)
        with pytest.raises(
            GraphCaptureError, match=r"in the verify of 'qualifier': .*reads a device value.*graphs=False"
        ):
            rt.generate(TEXT, **options)
        with pytest.raises(GraphCaptureError, match=r"draft/qualifier/target for \d+ cache rows"):
            rt.prepare(**options)
    assert rt.generate(TEXT, **options).tokens == eager.generate(TEXT, **options).tokens


def test_non_finite_logits_are_named_from_a_graph(captured: tuple[Pyramid, CallRecorder]) -> None:
    rt, _ = captured
    options = {**SPEC, "method": "sd"}
    expected = rt.generate(TEXT, **options).tokens
    norm: torch.Tensor = rt.tiers[0].model.norm  # type: ignore[attr-defined]
    kept = norm.clone()
    norm.fill_(math.nan)
    with pytest.raises(pyramid_rt.NonFiniteLogitsError, match="'draft'"):
        rt.generate(TEXT, **options)
    norm.copy_(kept)
    assert rt.generate(TEXT, **options).tokens == expected


def test_graphs_that_cannot_be_are_refused(tiny_dir: Path) -> None:
    with pytest.raises(InputError, match="graphs=True needs a CUDA device, found 'cpu'"):
        pyramid_rt.load(tiny_dir, device="cpu", control="device", graphs=True)
    with pytest.raises(InputError, match="graphs='step' needs control='device'"):
        pyramid_rt.load(tiny_dir, device="cpu", graphs="step")
    with pytest.raises(InputError, match="graphs must be True, False, 'round' or 'step', found 'steps'"):
        pyramid_rt.load(tiny_dir, device="cpu", control="device", graphs="steps")  # type: ignore[arg-type]
    assert not pyramid_rt.load(tiny_dir, device="cpu").graphs
    assert pyramid_rt.load(tiny_dir, device="cpu").prepare(method="sd") == 0
