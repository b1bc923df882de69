"""Reading configs: both spellings, end-of-sequence ids, and refusal by name."""

from __future__ import annotations

from typing import Any

import pytest

from pyramid_rt.errors import UnsupportedModelError, WeightsError
from pyramid_rt.models.config import LlamaConfig, RopeConfig
from pyramid_rt.models.families import read_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    """The base config with changes; None removes an entry."""
    merged = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    return read_config(merged, source="m/config.json", generation_config=generation)


def test_every_field() -> None:
    assert read(head_dim=32, tie_word_embeddings=True, attention_bias=True, mlp_bias=True) == LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        max_position_embeddings=512,
        rope=RopeConfig("default", 5000.0, 1.0, 1.0, 1.0, 512),
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_defaults_of_absent_entries() -> None:
    config = read(num_key_value_heads=None, rope_theta=None, bos_token_id=None, eos_token_id=None)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    assert not any((config.tie_word_embeddings, config.qkv_bias, config.out_bias, config.mlp_bias))


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("default", {}),
        ("linear", {"factor": 2.0}),
        ("dynamic", {"factor": 4.0}),
        ("llama3", LLAMA3),
    ],
)
def test_old_and_new_rope_spelling_agree(kind: str, entries: dict[str, Any]) -> None:
    oldest = read(rope_scaling={"type": kind, **entries})
    old = read(rope_scaling={"rope_type": kind, **entries})
    new = read(rope_theta=None, rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **entries})
    both = read(rope_scaling={"rope_type": kind, **entries}, rope_parameters={"rope_type": kind, **entries})
    assert oldest == old == new == both
    expected_original = entries.get("original_max_position_embeddings", 512)
    assert old.rope == RopeConfig(
        kind=kind,  # type: ignore[arg-type]
        theta=5000.0,
        factor=entries.get("factor", 1.0),
        low_freq_factor=1.0,
        high_freq_factor=entries.get("high_freq_factor", 1.0),
        original_max_position_embeddings=expected_original,
    )


def test_new_theta_wins_over_old() -> None:
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 7.5}).rope.theta == 7.5


def test_eos_ids_of_both_files_together_without_doubles() -> None:
    assert read({"eos_token_id": [9, 2, 7]}, eos_token_id=[2, 3]).eos_token_ids == (2, 3, 9, 7)
    assert read({"eos_token_id": 5}).eos_token_ids == (2, 5)
    assert read({}, eos_token_id=-1).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "chunked_attention"], "sliding_window": 64}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 0.5}}, "attention_factor"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
            "original_max_position_embeddings",
        ),
    ],
)
def test_unsupported_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        read(**changes)
    assert "m/config.json" in str(caught.value)


def test_all_unsupported_entries_are_named_at_once() -> None:
    with pytest.raises(UnsupportedModelError, match=r"hidden_act.*num_experts"):
        read(hidden_act="relu", num_experts=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining_tp": 1},
        {"pretraining_tp": 2},
        {"layer_types": ["full_attention"] * 3},
        {"sliding_window": 64, "use_sliding_window": False},
        {"sliding_window": 64, "layer_types": ["full_attention"] * 3},
        {"rope_scaling": {"type": "default", "factor": 1.0, "low_freq_factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "original_max_position_embeddings": 64, "factor": 8.0}},
        {"partial_rotary_factor": 1.0},
        {"sliding_window": False},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"use_cache": True, "initializer_range": 0.02, "torch_dtype": "bfloat16"},
    ],
)
def test_harmless_entries_pass(changes: dict[str, Any]) -> None:
    assert read(**changes) == read()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "1000"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"hidden_size": 10**400}, "hidden_size is an integer of 1329 bits, expected at most 2147483647"),
        ({"rope_theta": 10**400}, "rope_theta is an integer of 1329 bits, expected a positive number"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 1e300}},
            r"factor is 1e\+300, expected .* up to 3\.4e\+38",
        ),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3", "high_freq_factor": 1.0}}, "high_freq_factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "llama3"}},
            "rope",
        ),
    ],
)
def test_contradictions_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=named) as caught:
        read(**changes)
    assert not isinstance(caught.value, UnsupportedModelError)


def test_explicit_head_dim_need_not_divide_the_hidden_size() -> None:
    assert read(hidden_size=66, head_dim=24).head_dim == 24


def test_ids_outside_the_vocabulary_are_left_out_with_a_note() -> None:
    config = read({"eos_token_id": [2, 99999]}, eos_token_id=[1000, 3], bos_token_id=5000)
    assert (config.eos_token_ids, config.bos_token_id) == ((3, 2), None)
    (note,) = config.notes
    assert "m/config.json: end-of-sequence ids [1000, 99999] are never produced" in note
    assert read().notes == ()


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 512),
        # The usual spelling: positions before scaling.
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 1280),
        # With the original positions named, the others are those after scaling.
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 512),
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 4096}, 512),
        ({"sliding_window": 64, "use_sliding_window": False}, 512),
    ],
)
def test_longest_context(changes: dict[str, Any], longest: int) -> None:
    assert read(**changes).longest_context == longest
