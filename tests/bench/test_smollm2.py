"""Real weights that nobody here made, where `make demo-real` has fetched them: tokens of transformers' generate.

A few prompts, cut short; `python -m bench.smollm2 check` does all 20 with 200 tokens each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyramid_rt
from pyramid_rt import Pyramid

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "weights" / "smollm2"
FIXTURE = json.loads((ROOT / "bench" / "results" / "smollm2_greedy.json").read_text(encoding="utf-8"))
PROMPTS = FIXTURE["prompts"][::7]
NEW_TOKENS = 40

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (WEIGHTS / "pyramid.json").exists(), reason="run `make demo-real` first"),
]


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Pyramid]:
    with pyramid_rt.load(WEIGHTS, device="cpu", dtype="float32", max_seq=1024) as pyramid:
        yield pyramid


def decode(pyramid: Pyramid, prompt: dict[str, Any], method: str) -> list[int]:
    options: Any = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0.0}
    return pyramid.generate(prompt["prompt_ids"], method=method, **options).tokens


@pytest.mark.parametrize("method", ["ar", "psd"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt["name"])
def test_greedy_tokens_are_those_of_transformers(
    smollm2: Pyramid, prompt: dict[str, Any], method: str
) -> None:
    # A first difference at a near tie of the two best scores would be rounding; these prompts have none.
    assert prompt["smallest_gap"] > 1e-4
    assert decode(smollm2, prompt, method) == prompt["new_ids"][:NEW_TOKENS]
