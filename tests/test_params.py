"""Options are validated before any work, by name."""

from __future__ import annotations

import dataclasses
import enum
import http
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyramid_rt
from pyramid_rt import InputError, Pyramid, SamplingParams
from pyramid_rt.params import LEAST_TEMPERATURE, Defaults

HUGE = 10**5000  # its digits are more than Python prints


def named(value: object) -> str | None:
    return "huge" if isinstance(value, int) and abs(value) >= HUGE else None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1), ("max_new_tokens", 1.5), ("max_new_tokens", True), ("method", "beam"),
        ("draft_length", 0), ("qualifier_length", 0), ("lengths", [2, 0]), ("lengths", 3), ("inner_rounds", 0),
        ("qualifier_threshold", -0.1), ("qualifier_threshold", math.nan), ("target_threshold", "0.4"),
        ("target_threshold", None), ("divergence", "hellinger"), ("divergence_on", "cooked"),
        ("lossless_rule", "fuzzy"), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("min_p", -0.1),
        ("min_p", 1.1), ("seed", -1), ("seed", 2**64),
        ("stop", ""), ("stop", b"text"), ("stop", {"text"}), ("stop", [""]), ("stop", [3]),
        ("stop_token_ids", 3), ("stop_token_ids", [-1]), ("ignore_eos", 1), ("ignore_eos", "yes"), ("logprobs", -1),
        ("stop_token_ids", http.HTTPStatus.OK), ("stop_token_ids", torch.empty(3, device="meta")),
        # What the device's types cannot hold: float32, int64.
        ("temperature", 1e39), ("temperature", 10**400), ("qualifier_threshold", 1e39), ("top_p", 1e-50),
        ("target_threshold", 10**400), ("top_k", 2**63), ("max_new_tokens", 2**63), ("logprobs", HUGE),
        ("stop_token_ids", [2**63]), ("lengths", [2**64]), ("min_p", 10**400),
        # Other kinds that convert, or compare, to what would be right.
        ("max_new_tokens", b"3"), ("top_k", "3"), ("temperature", True), ("temperature", b"0"), ("method", b"ar"),
        ("method", np.array(["psd", "sd"])), ("divergence", np.array([])), ("seed", 1.0), ("method", ["ar"]),
        ("temperature", torch.tensor(1j)), ("temperature", torch.empty((), device="meta")), ("temperature", [0.5]),
        ("max_new_tokens", -(HUGE)), ("top_k", np.float64(2.0)), ("top_p", np.array([0.5])),
    ],
    ids=named,
)  # fmt: skip
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        SamplingParams.build({name: value})


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(InputError, match="'max_tokens'; did you mean 'max_new_tokens'"):
        SamplingParams.build({"max_tokens": 3})
    with pytest.raises(InputError, match="known are"):
        SamplingParams.build({"zzz": 3})
    with pytest.raises(InputError, match="unknown option 'zzz'"):
        SamplingParams.build({}, {"zzz": 3})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_length", "did you mean 'max_new_tokens'"), ("n_predict", "did you mean 'max_new_tokens'"),
        ("num_predict", "did you mean 'max_new_tokens'"), ("max_completion_tokens", "did you mean 'max_new_tokens'"),
        ("top_tokens", "did you mean 'logprobs'"), ("top_logprobs", "did you mean 'logprobs'"),
        ("stop_sequences", "did you mean 'stop'"), ("eos_token_id", "did you mean 'stop_token_ids'"),
        ("num_speculative_tokens", "did you mean 'draft_length'"), ("temprature", "did you mean 'temperature'"),
        ("do_sample", "temperature=0 is greedy"), ("repetition_penalty", "no penalties"),
        ("num_return_sequences", "one sequence"), ("num_beams", "one sequence"), ("stream", r"stream\(\)"),
        ("typical_p", "top_k, top_p and min_p"), ("threshold", "qualifier_threshold and target_threshold"),
    ],
)  # fmt: skip
def test_names_of_other_libraries_get_the_right_hint(name: str, words: str) -> None:
    with pytest.raises(InputError, match=f"unknown option '{name}'; .*{words}"):
        SamplingParams.build({name: 1})


def test_options_over_defaults() -> None:
    params = SamplingParams.build({"draft_length": 2}, {"draft_length": 7, "top_p": 0.5})
    assert (params.draft_length, params.top_p, params.qualifier_length) == (2, 0.5, 10)


def test_numbers_of_other_libraries_are_numbers() -> None:
    params = SamplingParams.build({"max_new_tokens": np.int32(5), "temperature": np.float32(0.5), "top_p": 1})
    assert (params.max_new_tokens, params.temperature, params.top_p) == (5, 0.5, 1.0)
    assert type(params.max_new_tokens) is int


def test_seeds_are_drawn_when_none_is_given() -> None:
    params = SamplingParams.build({})
    assert params.with_seed() != params.with_seed()
    assert SamplingParams.build({"seed": 9}).with_seed() == 9


class Way(str, enum.Enum):  # noqa: UP042 (StrEnum's str() is the value, and hides the fault)
    FAST = "sd"


def test_values_count_by_what_they_equal() -> None:
    params = SamplingParams.build(
        {
            "method": Way.FAST,
            "temperature": torch.tensor(0.5),
            "ignore_eos": np.bool_(True),
            "stop_token_ids": np.array([3, 4]),
        }
    )
    assert (params.method, params.temperature, params.ignore_eos) == ("sd", 0.5, True)
    assert params.stop_token_ids == (3, 4)
    assert type(params.method) is str


def test_the_largest_values_of_the_device_types_are_accepted() -> None:
    most = float(np.finfo(np.float32).max)
    params = SamplingParams(
        temperature=most, qualifier_threshold=math.inf, target_threshold=most, top_k=2**63 - 1
    )
    assert (params.temperature, params.qualifier_threshold, params.top_k) == (most, math.inf, 2**63 - 1)


@pytest.mark.parametrize("temperature", [0.0, -0.0, 5e-324, 1e-45, 1e-20, LEAST_TEMPERATURE / 2])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float, tiny: Pyramid) -> None:
    assert SamplingParams(temperature=temperature).temperature == 0.0
    prompt = [5, 6, 7]
    short: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    greedy = tiny.generate(prompt, method="ar", **short).tokens
    for method in ("ar", "sd", "psd"):
        assert tiny.generate(prompt, method=method, temperature=temperature, seed=1, **short).tokens == greedy


def test_the_least_temperature_divides_and_decides_as_greedy_does(tiny: Pyramid) -> None:
    params = SamplingParams(temperature=LEAST_TEMPERATURE, seed=1, max_new_tokens=6, ignore_eos=True)
    assert params.temperature == LEAST_TEMPERATURE
    assert tiny.generate([5, 6, 7], params).tokens == tiny.generate([5, 6, 7], params, temperature=0).tokens


def test_the_hottest_sample_is_still_a_sample(tiny: Pyramid) -> None:
    hot: dict[str, Any] = {"temperature": 3e38, "max_new_tokens": 8, "ignore_eos": True}
    drawn = [tiny.generate([5, 6, 7], seed=seed, **hot).tokens for seed in (1, 2)]
    assert drawn[0] != drawn[1]


def test_stop_may_be_one_string() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=()).stop == ()


def test_params_know_what_was_given() -> None:
    params = SamplingParams(draft_length=4, stop="x")
    assert params.options() == {"draft_length": 4, "stop": ("x",)}
    assert params == SamplingParams(stop=["x"])
    assert pickle.loads(pickle.dumps(params)).options() == params.options()
    with pytest.raises(InputError, match="top_p"):
        SamplingParams(top_p=2.0)
    with pytest.raises(InputError, match="did you mean 'max_new_tokens'"):
        SamplingParams(max_tokens=2)  # type: ignore[call-arg]


def test_params_are_options_in_one_object(tiny: Pyramid) -> None:
    params = SamplingParams(max_new_tokens=5, temperature=0.9, seed=3, ignore_eos=True)
    whole = tiny.generate([5, 6, 7], max_new_tokens=5, temperature=0.9, seed=3, ignore_eos=True)
    assert tiny.generate([5, 6, 7], params).tokens == whole.tokens
    assert len(tiny.generate([5, 6, 7], params, max_new_tokens=2).tokens) == 2
    with tiny.stream([5, 6, 7], params) as stream:
        assert "".join(stream) == whole.text
    with pytest.raises(
        InputError, match="params must be SamplingParams, and options are given by name, found 5"
    ):
        tiny.generate([5, 6, 7], 5)  # type: ignore[arg-type]


def test_what_params_leave_open_is_the_pyramids_default(tiny: Pyramid) -> None:
    short = Pyramid(tiny.tiers, vocab_size=tiny.vocab_size, defaults={"max_new_tokens": 3})
    assert len(short.generate([5, 6, 7], SamplingParams(ignore_eos=True)).tokens) == 3
    assert len(short.generate([5, 6, 7], SamplingParams(ignore_eos=True, max_new_tokens=4)).tokens) == 4


@pytest.mark.parametrize("stop", ["\ud800", ["a", "b\udfffc"]])
def test_stop_strings_are_text(stop: Any) -> None:
    with pytest.raises(InputError, match=r"^stop: .* a lone surrogate and no text$"):
        SamplingParams(stop=stop)


def test_options_can_be_replaced() -> None:
    params = dataclasses.replace(SamplingParams(temperature=0.5, stop="x"), seed=1)
    assert (params.temperature, params.stop, params.seed) == (0.5, ("x",), 1)


def test_a_number_that_fails_is_no_number() -> None:
    class Odd:
        def __index__(self) -> int:
            raise ValueError("not today")

    with pytest.raises(InputError, match="max_new_tokens must be an integer"):
        SamplingParams(max_new_tokens=Odd())  # type: ignore[arg-type]


# Defaults of single methods.

BY_METHOD: dict[str, Any] = {
    "draft_length": 3,
    "inner_rounds": 2,
    "methods": {
        "psd_f": {"draft_length": 8, "qualifier_length": 16, "target_threshold": 0.5},
        "fsd": {"draft_length": 5},
    },
}


def test_a_method_has_its_own_defaults_in_place_of_the_common_ones() -> None:
    defaults = Defaults.of(BY_METHOD)
    assert defaults.of_method("sd") == {"draft_length": 3, "inner_rounds": 2}
    assert defaults.of_method("fsd") == {"draft_length": 5, "inner_rounds": 2}
    # A length of its own would be overridden by the common number of rounds.
    assert defaults.of_method("psd_f") == BY_METHOD["methods"]["psd_f"]
    assert Defaults.of(None).of_method("ar") == {}


def test_a_call_comes_before_either(tiny_dir: Path) -> None:
    with pyramid_rt.load(tiny_dir, device="cpu") as base:
        pyramid = Pyramid(
            base.tiers, vocab_size=base.vocab_size, tokenizer=base.tokenizer, defaults=BY_METHOD
        )
        chosen = {
            (method, *given.items()): pyramid._chosen({"method": method, **given})[0]
            for method in ("psd_f", "fsd", "sd")
            for given in ({}, {"draft_length": 2})
        }
        assert [params.draft_length for params in chosen.values()] == [8, 2, 5, 2, 3, 2]
        assert [params.inner_rounds for params in chosen.values()] == [None, None, 2, 2, 2, 2]
        assert chosen[("psd_f",)].target_threshold == 0.5
        assert pyramid.defaults == {"draft_length": 3, "inner_rounds": 2}
        assert pyramid.method_defaults == BY_METHOD["methods"]
        # Of the method that a call without options decodes by, too.
        default = Pyramid(base.tiers, vocab_size=base.vocab_size, defaults={**BY_METHOD, "method": "fsd"})
        assert default._chosen({})[0].draft_length == 5


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "methods must be options by method"),
        ({"psd_g": {}}, "methods names 'psd_g', expected any of ar, sd"),
        ({"sd": 3}, "methods, sd: expected options by name, found 3"),
        ({"sd": {"method": "ar"}}, "methods, sd: it sets a method of its own"),
        ({"sd": {"draft_length": 0}}, "methods, sd: draft_length"),
        ({"sd": {"draft_len": 1}}, "methods, sd: unknown option 'draft_len'"),
    ],
)
def test_wrong_defaults_of_methods_are_refused_by_name(methods: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Defaults.of({"methods": methods})
