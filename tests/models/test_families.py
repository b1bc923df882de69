"""Families: another one can be put in, with its own names of tensors, fused matrices and biases."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import LAYERS
from safetensors.torch import load_file, save_file

import pyramid_rt
from pyramid_rt import UnsupportedModelError, WeightsError
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models import families
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.entries import Entries
from pyramid_rt.models.families import LLAMA_ENTRIES, Biases, Family, TensorNames, read_plain
from pyramid_rt.models.llama import layer_shapes

PROMPT = [5, 6, 7]


def read_other(family: Family, entries: Entries, generation: Entries) -> LlamaConfig:
    """A family that spells one entry its own way, and has no switch for biases."""
    values = {**entries.values, "hidden_size": entries.positive("width")}
    return read_plain(family, Entries(values, entries.source), generation)


OTHER = Family(
    architecture="OtherForCausalLM",
    model_type="other",
    names=TensorNames(
        embedding="transformer.table",
        norm="transformer.last_norm",
        head="readout",
        layer="transformer.blocks.{}.",
        parts={
            "attn_norm": ("norm_1",),
            "qkv": ("attention.qkv",),  # one matrix in the file
            "qkv_bias": ("attention.q_bias", "attention.k_bias", "attention.v_bias"),
            "out": ("attention.out",),
            "mlp_norm": ("norm_2",),
            "gate_up": ("mlp.gate", "mlp.up"),
            "down": ("mlp.down",),
        },
        body=("transformer.", "readout"),
    ),
    biases=lambda entries: Biases(qkv=True),
    window=lambda entries: None,
    supported=LLAMA_ENTRIES,
    read=read_other,
)

RENAMED = {
    "model.embed_tokens.weight": "transformer.table",
    "model.norm.weight": "transformer.last_norm",
    "lm_head.weight": "readout",
    "input_layernorm.weight": "norm_1",
    "post_attention_layernorm.weight": "norm_2",
    "self_attn.o_proj.weight": "attention.out",
    "mlp.gate_proj.weight": "mlp.gate",
    "mlp.up_proj.weight": "mlp.up",
    "mlp.down_proj.weight": "mlp.down",
}


def model_tiers(rt: pyramid_rt.Pyramid) -> list[ModelTier]:
    return [tier for tier in rt.tiers if isinstance(tier, ModelTier)]


def renamed(source: Path, out: Path) -> Path:
    """A Llama as a model of the other family: its biases of Q, K and V are zero, so it computes the same."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    made = {}
    for name, tensor in tensors.items():
        prefix, rest = ("", name) if ".layers." not in name else name.split(".", 3)[2:]
        prefix = f"transformer.blocks.{prefix}." if prefix else ""
        if rest in RENAMED:
            made[prefix + RENAMED[rest]] = tensor
    for index in range(config["num_hidden_layers"]):
        parts = [tensors[f"model.layers.{index}.self_attn.{part}_proj.weight"] for part in "qkv"]
        made[f"transformer.blocks.{index}.attention.qkv"] = torch.cat(parts)
        for part, weight in zip("qkv", parts, strict=True):
            made[f"transformer.blocks.{index}.attention.{part}_bias"] = torch.zeros(len(weight))
    save_file(made, out / "model.safetensors")
    config["width"] = config.pop("hidden_size")
    (out / "config.json").write_text(
        json.dumps({**config, "architectures": ["OtherForCausalLM"], "model_type": "other"})
    )
    return out


def test_another_family_decodes_as_what_it_was_made_from(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "OtherForCausalLM", OTHER)
    for name in LAYERS:
        renamed(tiny_dir / name, tmp_path / "other" / name)
    with pyramid_rt.load(tiny_dir, device="cpu") as rt:
        expected = rt.generate(PROMPT, max_new_tokens=40, ignore_eos=True, temperature=0.7, seed=3)
    with pyramid_rt.load(tmp_path / "other", device="cpu") as rt:
        config = model_tiers(rt)[-1].config
        assert (config.architecture, config.qkv_bias, config.out_bias) == ("OtherForCausalLM", True, False)
        for method in ("ar", "psd"):
            out = rt.generate(
                PROMPT, max_new_tokens=40, ignore_eos=True, temperature=0.7, seed=3, method=method
            )
            assert out.tokens == expected.tokens


def test_families_may_meet_in_one_pyramid(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "OtherForCausalLM", OTHER)
    renamed(tiny_dir / "draft", tmp_path / "draft")
    (tmp_path / "target").symlink_to(tiny_dir / "target")
    with pyramid_rt.load(tmp_path, device="cpu") as rt:
        kinds = [tier.config.architecture for tier in model_tiers(rt)]
        assert kinds == ["OtherForCausalLM", "LlamaForCausalLM"]
        sd, ar = (rt.generate(PROMPT, max_new_tokens=20, method=method) for method in ("sd", "ar"))
        assert sd.tokens == ar.tokens


def test_errors_speak_in_the_familys_names(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "OtherForCausalLM", OTHER)
    model = renamed(tiny_dir / "draft", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    del tensors["transformer.blocks.0.attention.qkv"]
    tensors["transformer.blocks.0.mlp.up"] = torch.zeros(3, 64)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        pyramid_rt.load(model, device="cpu")
    assert "missing: transformer.blocks.0.attention.qkv [128, 64]" in str(caught.value)
    assert "wrong shape: transformer.blocks.0.mlp.up is [3, 64], expected [96, 64]" in str(caught.value)


def test_an_unknown_architecture_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "OtherForCausalLM", OTHER)
    for named in (
        ["MambaForCausalLM"],
        "LlamaForCausalLM",
        [],
        ["LlamaForCausalLM", "OtherForCausalLM"],
        None,
    ):
        with pytest.raises(UnsupportedModelError, match="one of LlamaForCausalLM, OtherForCausalLM"):
            families.read_config({"architectures": named}, source="m/config.json")


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=lambda family: family.architecture)
def test_every_part_that_a_layer_may_have_is_named(family: Family, tiny_dir: Path) -> None:
    config = json.loads((tiny_dir / "draft" / "config.json").read_text())
    plain = families.read_config(config, source="config")
    full = replace(plain, qkv_bias=True, out_bias=True, mlp_bias=True)
    assert set(family.names.parts) == set(layer_shapes(full))
