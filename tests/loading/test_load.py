"""`load`: kinds of its arguments, what it leaves out with a warning, and tiers that are read when they are needed."""

from __future__ import annotations

import enum
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny import write_byte_tokenizer
from safetensors.torch import load_file, save_file

import pyramid_rt
from pyramid_rt import InputError, WeightsError
from pyramid_rt.loading.directory import init
from pyramid_rt.loading.model_tier import ModelTier

PROMPT = [5, 6, 7, 8]


class Where(enum.StrEnum):
    CPU = "cpu"


def model_tiers(rt: pyramid_rt.Pyramid) -> list[ModelTier]:
    return [tier for tier in rt.tiers if isinstance(tier, ModelTier)]


def edit(path: Path, **changes: Any) -> None:
    """Set (or, with ..., remove) entries of a JSON file."""
    merged = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    """The tiny pyramid, to spoil."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "pyramid"))


def test_arguments_count_by_what_they_equal(tiny_dir: Path) -> None:
    options: dict[str, Any] = {"max_seq": np.int64(64), "prefix_reuse": np.True_, "dtype": np.str_("float32")}
    with pyramid_rt.load(tiny_dir, device=Where.CPU, **options) as rt:
        assert (rt.max_seq, rt.device.type, rt.prefix_reuse) == (64, "cpu", True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": 0}, r"device must be 'cpu' or 'cuda', found 0"),
        ({"device": b"cpu"}, "device must be"),
        ({"device": "cuda:" + "9" * 40}, "device"),
        ({"dtype": torch.float64}, "dtype must be one of float32, bfloat16, float16, found torch.float64"),
        ({"max_seq": 64.0}, r"max_seq must be an integer in 2\.\.256.*found 64\.0"),
        ({"max_seq": True}, "max_seq must be an integer"),
        ({"max_seq": "64"}, "max_seq must be an integer"),
        ({"max_seq": 10**400}, "max_seq must be an integer"),
        ({"backend": b"torch"}, "backend is of type bytes, expected one of torch, triton"),
        ({"backend": ""}, "backend is ''"),
        ({"control": True}, "unknown control True; expected one of host, device"),
        ({"prefix_reuse": "no"}, "prefix_reuse must be True or False, found 'no'"),
        ({"prefix_reuse": 1}, "prefix_reuse must be True or False"),
        ({"graphs": 1}, "graphs must be True, False, 'round' or 'step', found 1"),
        ({"graphs": np.array([1, None])}, "graphs must be True, False, 'round' or 'step', found array"),
        ({"progress": "yes"}, "progress must be something to call, found 'yes'"),
    ],
)
def test_arguments_of_the_wrong_kind(tiny_dir: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pyramid_rt.load(tiny_dir, **{"device": "cpu", **options})


@pytest.mark.parametrize("path", [None, 5, b"weights", "", ["weights"], "a\0b", "\ud800"], ids=ascii)
def test_what_is_no_path_is_refused(path: Any, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^weights_dir must be a path"):
        pyramid_rt.load(path, device="cpu")
    with pytest.raises(InputError, match=r"^directory must be a path"):
        init(path, tiny_dir / "target")
    with pytest.raises(InputError, match=r"^target must be a path"):
        init(tmp_path, path)
    assert not (tmp_path / "pyramid.json").exists()


def test_force_is_a_flag(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="force must be True or False, found 'no'"):
        init(tmp_path, tiny_dir / "target", force="no")  # type: ignore[arg-type]


def test_a_name_too_long_for_the_system_is_named(tiny_dir: Path, copy: Path, tmp_path: Path) -> None:
    name = "a" * 300
    with pytest.raises(WeightsError, match=r"aaa.*too long"):
        pyramid_rt.load(tmp_path / name, device="cpu")
    with pytest.raises(WeightsError, match=r"aaa.*too long"):
        init(tmp_path / name, tiny_dir / "target")
    (copy / "pyramid.json").write_text(json.dumps({"target": name}))
    with pytest.raises(WeightsError, match=r"tier 'target': .*aaa.*too long"):
        pyramid_rt.load(copy, device="cpu")


# What a file says and decoding leaves out.


def test_heads_and_scales_are_left_out_with_a_warning(
    copy: Path, tiny_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = copy / "target" / "model.safetensors"
    extra = {
        "v_head.summary.weight": torch.zeros(1, 64),
        "score.weight": torch.zeros(2, 64),
        "model.layers.0.self_attn.k_scale": torch.ones(()),
        "model.layers.3.self_attn.v_proj.output_scale": torch.ones(()),
    }
    save_file({**load_file(file), **extra}, file)
    with (
        caplog.at_level(logging.WARNING, logger="pyramid_rt.loading"),
        pyramid_rt.load(copy, device="cpu") as rt,
        pyramid_rt.load(tiny_dir, device="cpu") as plain,
    ):
        assert rt.generate(PROMPT).tokens == plain.generate(PROMPT).tokens
    (record,) = caplog.records
    assert [name for name in (*extra, str(copy / "target")) if name not in record.message] == []


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.down_proj.weight_scale", "lm_head.bias"],
)
def test_tensors_that_would_take_part_are_not_left_out(copy: Path, name: str) -> None:
    file = copy / "target" / "model.safetensors"
    save_file({**load_file(file), name: torch.ones(2)}, file)
    with pytest.raises(WeightsError, match=f"unexpected: {name}"):
        pyramid_rt.load(copy, device="cpu")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_size_that_the_tensors_contradict_names_the_model_before_memory_is_planned(
    copy: Path, key: str
) -> None:
    edit(copy / "target" / "config.json", **{key: 2**30, "head_dim": 16})
    with pytest.raises(WeightsError, match=rf"{copy / 'target'}: the tensors are not those of its config"):
        pyramid_rt.load(copy, device="cpu")


def test_an_end_of_sequence_id_in_padding_is_left_out_with_a_warning(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, config = copy / "target" / "model.safetensors", copy / "target" / "config.json"
    tensors, vocab = load_file(file), json.loads(config.read_text())["vocab_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.zeros(8, 64)))
    save_file(tensors, file)
    edit(config, vocab_size=vocab + 8, eos_token_id=[vocab - 1, vocab + 7, 10**6])
    with caplog.at_level(logging.WARNING, logger="pyramid_rt.loading"):
        rt = pyramid_rt.load(copy, device="cpu")
    assert (rt.eos_token_ids, rt.vocab_size) == ((vocab - 1,), vocab)
    text = caplog.text
    assert f"[{vocab + 7}] lie in rows beyond the {vocab}" in text
    assert "[1000000] are never produced" in text
    assert len(rt.generate(PROMPT, max_new_tokens=5).tokens) > 0


def test_a_sliding_window_ends_the_context(copy: Path) -> None:
    for tier in ("draft", "qualifier", "target"):
        edit(copy / tier / "config.json", sliding_window=100 if tier == "draft" else 200)
    with pyramid_rt.load(copy, device="cpu") as rt:
        assert rt.max_seq == 100
    with pytest.raises(
        InputError, match=r"max_seq must be an integer in 2\.\.100, the models' sliding window"
    ):
        pyramid_rt.load(copy, device="cpu", max_seq=101)


def test_defaults_that_cannot_run_are_refused_by_their_file(copy: Path) -> None:
    tiers = {name: name for name in ("draft", "qualifier", "target")}
    wrong: list[dict[str, Any]] = [
        {"draft_length": 100},
        {"inner_rounds": 10**6},
        {"temperature": 1e39},
        {"top_k": 2**64},
        {"methods": []},
        {"methods": {"sdd": {}}},
        {"methods": {"sd": {"draft_length": "4"}}},
        {"methods": {"sd": {"draft_length": 0}}},
        {"methods": {"sd": {"method": "ar"}}},
        {"methods": {"sd": {"methods": {}}}},
    ]
    for defaults in wrong:
        (copy / "pyramid.json").write_text(json.dumps({**tiers, "defaults": defaults}))
        with pytest.raises((InputError, WeightsError), match=r"pyramid\.json"):
            pyramid_rt.load(copy, device="cpu")
    # Lengths count for the method that is the default.
    defaults = {"method": "sd", "draft_length": 40, "qualifier_length": 40}
    (copy / "pyramid.json").write_text(json.dumps({**tiers, "defaults": defaults}))
    with pyramid_rt.load(copy, device="cpu") as rt:
        assert rt.default_method == "sd"


# Tiers that are read when they are needed.


def loaded_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tiers as they are loaded."""
    names: list[str] = []
    real: Callable[..., ModelTier] = vars(ModelTier)["load"].__func__

    def load(cls: type[ModelTier], name: str, *args: Any, **kwargs: Any) -> ModelTier:
        names.append(name)
        return real(cls, name, *args, **kwargs)

    monkeypatch.setattr(ModelTier, "load", classmethod(load))
    return names


def with_default(copy: Path, method: str) -> Path:
    content = {name: name for name in ("draft", "qualifier", "target")}
    (copy / "pyramid.json").write_text(json.dumps({**content, "defaults": {"method": method}}))
    return copy


def test_tiers_of_other_methods_are_loaded_when_a_call_needs_them(
    copy: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = loaded_names(monkeypatch)
    with pyramid_rt.load(tiny_dir, device="cpu") as all_tiers:
        assert names == ["draft", "qualifier", "target"]
        expected = all_tiers.generate(PROMPT, max_new_tokens=30, ignore_eos=True)
    names.clear()
    told: list[str] = []
    with pyramid_rt.load(
        with_default(copy, "ar"), device="cpu", progress=lambda name, *_: told.append(name)
    ) as rt:
        assert names == ["target"]
        assert set(told) == {"target"}
        assert rt.memory_plan is not None
        planned = {name: weights for name, weights, *_ in rt.memory_plan.rows()}
        assert list(planned) == ["draft", "qualifier", "target"]
        assert min(planned.values()) > 0
        assert rt.generate(PROMPT, max_new_tokens=30, ignore_eos=True).tokens == expected.tokens
        assert names == ["target"]
        for method, read in (
            ("sd", ["draft"]),
            ("psd", ["draft", "qualifier"]),
            ("sd", ["draft", "qualifier"]),
        ):
            out = rt.generate(PROMPT, max_new_tokens=30, ignore_eos=True, method=method)
            assert (out.tokens, out.stats.method, names[1:]) == (expected.tokens, method, read)


def test_prepare_loads_what_it_prepares_for(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = loaded_names(monkeypatch)
    with pyramid_rt.load(with_default(copy, "sd"), device="cpu") as rt:
        assert names == ["draft", "target"]
        rt.prepare(method="psd")
        assert names == ["draft", "target", "qualifier"]


def test_a_tier_that_changed_meanwhile_is_named(copy: Path, tiny_dir: Path) -> None:
    with pyramid_rt.load(with_default(copy, "ar"), device="cpu") as rt:
        edit(copy / "draft" / "config.json", rms_norm_eps=0.5)
        with pytest.raises(WeightsError, match=r"draft: its config is no longer the one"):
            rt.generate(PROMPT, method="sd")
        shutil.copy(tiny_dir / "draft" / "config.json", copy / "draft")
        (copy / "qualifier" / "model.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"qualifier: neither model\.safetensors"):
            rt.generate(PROMPT, method="psd")
        assert len(rt.generate(PROMPT, max_new_tokens=3, ignore_eos=True).tokens) == 3


# Process-wide settings of the application.


@pytest.mark.parametrize("inside", ["load", "first call"])
def test_an_applications_inference_mode_does_not_stick(copy: Path, tiny_dir: Path, inside: str) -> None:
    with pyramid_rt.load(tiny_dir, device="cpu") as plain:
        expected = plain.generate(PROMPT, max_new_tokens=20, ignore_eos=True).tokens
    with torch.inference_mode(inside == "load"):
        rt = pyramid_rt.load(with_default(copy, "ar"), device="cpu")
    assert not model_tiers(rt)[-1].cache.buffer.is_inference()
    with torch.inference_mode():
        model_tiers(rt)[0].ready()
        assert not model_tiers(rt)[0].model.embedding.is_inference()
        assert not model_tiers(rt)[0].cache.buffer.is_inference()
    for method in ("ar", "sd", "ar"):
        model_tiers(rt)[0].reset()
        assert rt.generate(PROMPT, max_new_tokens=20, ignore_eos=True, method=method).tokens == expected
    rt.close()


def test_an_applications_default_type_and_device_change_nothing(tiny_dir: Path) -> None:
    with pyramid_rt.load(tiny_dir, device="cpu") as plain:
        expected = [(tier.model.rotary, tier.model.embedding) for tier in model_tiers(plain)]
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                rt = pyramid_rt.load(tiny_dir, device="cpu")
        finally:
            torch.set_default_dtype(torch.float32)
        for tier, tensors in zip(model_tiers(rt), expected, strict=True):
            model = tier.model
            for ours, theirs in zip((model.rotary, model.embedding), tensors, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert rt.generate(PROMPT, max_new_tokens=9).tokens == plain.generate(PROMPT, max_new_tokens=9).tokens
        rt.close()


# Dynamic rope against transformers, whose prompt has one base for all of its positions.


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft and a target of 48 positions before scaling."""
    root = tmp_path_factory.mktemp("dynamic")
    for seed, name in enumerate(("draft", "target")):
        torch.manual_seed(seed)
        (root / name).mkdir()
        config = transformers.LlamaConfig(
            vocab_size=write_byte_tokenizer(root / name),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            initializer_range=0.2,
            eos_token_id=None,
            bos_token_id=None,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("length", [10, 47, 48, 49, 100])
def test_dynamic_rope_decodes_as_transformers(dynamic: Path, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, 256, (length,), generator=generator)
    hf = transformers.LlamaForCausalLM.from_pretrained(dynamic / "target", dtype=torch.float32).eval()
    theirs = hf.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=60,
        do_sample=False,
        pad_token_id=0,
    )
    with pyramid_rt.load(dynamic, device="cpu") as rt:
        assert rt.max_seq == 192
        for method in ("ar", "sd"):
            out = rt.generate(prompt.tolist(), max_new_tokens=60, method=method)
            assert out.tokens == theirs[0, length:].tolist()


def test_dynamic_rope_keeps_no_keys_of_a_prompt_of_another_length(dynamic: Path) -> None:
    text = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(7)).tolist()
    lengths = (20, 100, 90, 90, 40, 100, 47)
    expected, reused = {}, []
    for length in lengths:
        with pyramid_rt.load(dynamic, device="cpu") as fresh:
            expected[length] = fresh.generate(text[:length], max_new_tokens=20).tokens
    with pyramid_rt.load(dynamic, device="cpu") as rt:
        for length in lengths:
            out = rt.generate(text[:length], max_new_tokens=20)
            assert out.tokens == expected[length], length
            reused.append(out.stats.reused_tokens)
    # Within the original context, and for a prompt of the same length, keys are kept.
    assert [count > 0 for count in reused] == [False, False, False, True, False, False, False]


def test_torchs_types_are_types_too(tiny_dir: Path) -> None:
    with pyramid_rt.load(tiny_dir, device="cpu", dtype=torch.bfloat16) as rt:
        assert rt.tiers[-1].cache.buffer.dtype == torch.bfloat16  # type: ignore[attr-defined]
