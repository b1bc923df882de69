"""The whole runtime on compiled kernels: the demo pyramid decodes as it does with the torch backend.

Needs PYRAMID_PTX=sm_80 (or sm_90), as `make test-compiled` sets it; PYRAMID_PTX_TOKENS says how many tokens.
Races are looked for by the kernels' own tests; here the values count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyramid_rt
from ptx import device, machine
from ptx.machine import Schedule
from pyramid_rt import Pyramid
from pyramid_rt.result import GenerationResult, GenerationTrace
from pyramid_rt.trace import JudgedToken

pytestmark = [
    pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING),
    pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80"),
    pytest.mark.timeout(1800),
]

TOKENS = int(os.environ.get("PYRAMID_PTX_TOKENS") or 32)
# Fewer: without matrix instructions a float32 product takes the machine eight times the instructions.
TOKENS_FLOAT32 = max(4, TOKENS // 4)
PROMPT = "def fib(n):\n"
DEMO = Path(pyramid_rt.__file__).parent / "demo"
# Of a divergence or probability that bfloat16 tiers of six and fewer layers gave: four of its roundings.
TIE = 2.0**-6
Both = dict[str, GenerationResult]


class Pair:
    """The demo pyramid on both backends, control on the device: with `triton`, kernels decide too."""

    def __init__(self, dtype: str) -> None:
        options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "control": "device", "max_seq": 512}
        self.pyramids: dict[str, Pyramid] = {
            backend: pyramid_rt.load(DEMO, backend=backend, **options) for backend in ("torch", "triton")
        }

    def generate(self, prompt: str, **options: Any) -> Both:
        with device.scheduled(Schedule(seed=1, detect=False)):
            return {
                name: pyramid.generate(prompt, seed=3, **options) for name, pyramid in self.pyramids.items()
            }

    def close(self) -> None:
        for pyramid in self.pyramids.values():
            pyramid.close()


@pytest.fixture(scope="module")
def bfloat16() -> Iterator[Pair]:
    pair = Pair("bfloat16")
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def float32() -> Iterator[Pair]:
    pair = Pair("float32")
    yield pair
    pair.close()


def assert_same(found: Both) -> None:
    """Text, tokens and what the tiers did."""
    ours, theirs = found["triton"], found["torch"]
    assert ours.tokens == theirs.tokens
    assert ours.text == theirs.text
    assert ours.finish_reason == theirs.finish_reason
    assert ours.stats.reused_tokens == theirs.stats.reused_tokens
    for mine, other in zip(ours.stats.tiers, theirs.stats.tiers, strict=True):
        assert (mine.forwards, mine.proposed, mine.accepted, mine.survived) == (
            other.forwards,
            other.proposed,
            other.accepted,
            other.survived,
        )


def margin(judged: JudgedToken) -> float:
    """Distance of a judgement from the other one, relative to the number that decided; infinite without one."""
    if judged.divergence is not None and judged.threshold is not None:
        return abs(judged.divergence - judged.threshold) / judged.threshold
    if judged.p is not None and judged.q is not None and judged.uniform is not None:
        return abs(judged.uniform * judged.q - judged.p) / max(judged.p, judged.q)
    return float("inf")


def first_difference(ours: GenerationTrace, theirs: GenerationTrace) -> tuple[JudgedToken, JudgedToken]:
    """The first token that one let through and the other did not."""
    for mine, other in zip(ours.rounds, theirs.rounds, strict=False):
        for one, two in zip(mine.proposed, other.proposed, strict=False):
            assert one.token == two.token, f"proposed {one} and {two}"
            if one.stood != two.stood:
                return one, two
        assert mine.replacement == other.replacement, f"after {mine.accepted} tokens of {mine} and {other}"
    raise AssertionError("texts differ, but no judgement does")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["ar", "sd", "psd", "psd_f"])
def test_bfloat16_decodes_as_torch_does(bfloat16: Pair, method: str, temperature: float) -> None:
    """Up to a near tie: both round, in orders of their own, so a number next to its threshold may fall either way."""
    options: dict[str, Any] = {"method": method, "max_new_tokens": TOKENS, "temperature": temperature}
    found = bfloat16.generate(PROMPT, **options)
    if found["triton"].tokens == found["torch"].tokens:
        assert_same(found)
        return
    watched = bfloat16.generate(PROMPT, trace=True, **options)
    traces = {name: result.trace for name, result in watched.items()}
    assert all(watched[name].tokens == found[name].tokens for name in found), "a trace changed the text"
    assert traces["triton"] is not None
    assert traces["torch"] is not None
    pair = first_difference(traces["triton"], traces["torch"])
    assert max(map(margin, pair)) <= TIE, f"no near tie: {pair[0].said} and {pair[1].said}"


@pytest.mark.parametrize(("method", "temperature"), [("ar", 0.0), ("psd", 0.8), ("psd_f", 0.8)])
def test_float32_decodes_as_torch_does(float32: Pair, method: str, temperature: float) -> None:
    assert_same(
        float32.generate(PROMPT, method=method, max_new_tokens=TOKENS_FLOAT32, temperature=temperature)
    )


def test_a_long_prompt_its_continuation_and_a_stop_inside_a_round(bfloat16: Pair) -> None:
    """Windows of 64 fill the caches, the second call goes on from them, the third ends before its round does."""
    prompt = "def add(first, second):\n    return first + second\n\n\n" * 18
    first = bfloat16.generate(prompt, method="psd", max_new_tokens=8)
    assert_same(first)
    assert first["torch"].stats.prompt_tokens >= 200
    longer = bfloat16.generate(prompt + first["torch"].text, method="psd", max_new_tokens=8)
    assert_same(longer)
    assert longer["triton"].stats.reused_tokens >= 200
    text = first["torch"].text
    stopped = bfloat16.generate(prompt, method="psd", max_new_tokens=8, stop=(text[len(text) // 2],))
    assert_same(stopped)
    assert stopped["triton"].finish_reason == "stop"
