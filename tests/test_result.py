"""A generation's result as text, in a terminal and as JSON."""

from __future__ import annotations

import json

import pytest

from pyramid_rt import GenerationResult, Pyramid


@pytest.fixture
def result(tiny: Pyramid) -> GenerationResult:
    return tiny.generate([5, 6, 7], max_new_tokens=60, seed=4, temperature=1.0, ignore_eos=True, logprobs=1)


def test_str_is_the_text_and_repr_is_short(result: GenerationResult) -> None:
    assert f"{result}" == str(result) == result.text
    assert len(repr(result)) < 200
    assert repr(result).startswith("GenerationResult(")
    assert "60 tokens, length, seed 4" in repr(result)


def test_to_dict_is_json_with_usage(result: GenerationResult) -> None:
    content = json.loads(json.dumps(result.to_dict()))
    assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 60, "total_tokens": 63}
    assert (content["text"], content["tokens"]) == (result.text, result.tokens)
    assert (content["finish_reason"], content["seed"]) == ("length", 4)
    assert content["stats"]["new_tokens"] == 60
    assert [entry["token"] for entry in content["logprobs"]] == result.tokens


def test_log_probabilities_are_there_only_when_asked_for(tiny: Pyramid) -> None:
    assert "logprobs" not in tiny.generate([5, 6, 7], max_new_tokens=2).to_dict()
