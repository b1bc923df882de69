"""Options are validated before any work, by name."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyramid_rt import InputError, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1), ("max_new_tokens", 1.5), ("max_new_tokens", True), ("method", "beam"),
        ("draft_length", 0), ("qualifier_length", 0), ("lengths", [2, 0]), ("lengths", 3), ("inner_rounds", 0),
        ("qualifier_threshold", -0.1), ("qualifier_threshold", math.nan), ("target_threshold", "0.4"),
        ("target_threshold", None), ("divergence", "hellinger"), ("divergence_on", "cooked"),
        ("lossless_rule", "fuzzy"), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("min_p", -0.1),
        ("min_p", 1.1), ("seed", -1), ("seed", 2**64), ("stop", "text"), ("stop", [""]), ("stop", [3]),
        ("stop_token_ids", 3), ("stop_token_ids", [-1]), ("ignore_eos", 1), ("logprobs", -1),
    ],
)  # fmt: skip
def test_bad_values_are_named(name, value):
    with pytest.raises(InputError, match=name):
        SamplingParams.build({name: value})


def test_unknown_names_get_a_hint():
    with pytest.raises(InputError, match="'max_tokens'; did you mean 'max_new_tokens'"):
        SamplingParams.build({"max_tokens": 3})
    with pytest.raises(InputError, match="known are"):
        SamplingParams.build({"zzz": 3})


def test_options_over_defaults():
    params = SamplingParams.build({"draft_length": 2}, {"draft_length": 7, "top_p": 0.5})
    assert (params.draft_length, params.top_p, params.qualifier_length) == (2, 0.5, 10)


def test_numbers_of_other_libraries_are_numbers():
    params = SamplingParams.build({"max_new_tokens": np.int32(5), "temperature": np.float32(0.5), "top_p": 1})
    assert (params.max_new_tokens, params.temperature, params.top_p) == (5, 0.5, 1.0)
    assert type(params.max_new_tokens) is int


def test_seeds_are_drawn_when_none_is_given():
    params = SamplingParams.build({})
    assert params.with_seed() != params.with_seed()
    assert SamplingParams.build({"seed": 9}).with_seed() == 9
