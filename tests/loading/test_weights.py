"""Loading: one file or shards, all types, and an error that lists everything wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import triton
from helpers.equality import assert_equal_tensors, assert_everywhere
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyramid_rt.errors import InputError, UnsupportedModelError, WeightsError
from pyramid_rt.loading.weights import load_llama, read_config
from pyramid_rt.models import llama
from pyramid_rt.models.backends.choice import workspace_bytes
from pyramid_rt.models.llama import KVCache, Llama, forward, weight_bytes
from pyramid_rt.models.matrix import Dense, Packed, can_pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama of two layers with all biases, as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=64,
        eos_token_id=[3, 4],
    )
    model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = [4, 5]
    directory = tmp_path_factory.mktemp("source")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def load(directory: Path, **changes: Any) -> Llama:
    options: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "max_seq": 32, "backend": "torch"}
    return load_llama(directory, **{**options, **changes})


def logits(model: Llama, dtype: torch.dtype = torch.float32) -> Tensor:
    cache = KVCache.allocate(model.config, 32, dtype, CPU)
    tokens = torch.arange(7)
    out = forward(model, cache, tokens, torch.tensor(0), rows=tokens, kv_bound=7)
    assert out is not None
    return out


def edit_tensors(directory: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors; __ in a name stands for a dot."""
    tensors = load_file(directory / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices as they were read, not in oneDNN's order."""
    monkeypatch.setattr(llama, "can_pack", lambda device, dtype: False)


@pytest.mark.usefixtures("unpacked")
def test_joint_matrices_hold_the_stored_tensors(source: Path) -> None:
    model, stored = load(source), load_file(source / "model.safetensors")
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        parts = [stored[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
        assert_equal_tensors(layer.qkv.operand, torch.cat(parts))
        assert layer.gate_up_bias is not None
        biases = [stored[f"{prefix}mlp.{name}_proj.bias"] for name in ("gate", "up")]
        assert_equal_tensors(layer.gate_up_bias, torch.cat(biases))
    assert_equal_tensors(model.head.operand, stored["lm_head.weight"])
    held = [m for layer in model.layers for m in (layer.out, layer.down, layer.gate_up)]
    assert not any(part.operand.isnan().any() for part in held)


def test_eos_ids_of_config_and_generation_config(source: Path) -> None:
    assert read_config(source).eos_token_ids == (3, 4, 5)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_are_converted(source: Path, copy: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    tensors = {name: value.to(stored) for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    model = load(copy, dtype=dtype)
    assert model.embedding.dtype == model.layers[0].qkv.operand.dtype == model.rotary.dtype == dtype
    assert_equal_tensors(
        model.layers[1].down.operand, tensors["model.layers.1.mlp.down_proj.weight"].to(dtype)
    )
    assert_everywhere(logits(model, dtype).isfinite())


def test_shards_load_to_the_same_model(source: Path, tmp_path: Path) -> None:
    hf = transformers.LlamaForCausalLM.from_pretrained(source)
    hf.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal_tensors(logits(load(tmp_path)), logits(load(source)))


def test_all_problems_are_listed_at_once(copy: Path) -> None:
    edit_tensors(
        copy,
        model__norm__weight=None,
        model__layers__1__self_attn__k_proj__weight=None,
        model__layers__0__mlp__up_proj__weight=torch.zeros(40, 23),
        model__layers__2__input_layernorm__weight=torch.zeros(24),
        model__layers__0__mlp__down_proj__bias=torch.zeros(24, dtype=torch.int8),
    )
    with pytest.raises(WeightsError) as caught:
        load(copy)
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    assert lines == {
        "missing: model.norm.weight [24]",
        "missing: model.layers.1.self_attn.k_proj.weight [16, 24]",
        "unexpected: model.layers.2.input_layernorm.weight [24]",
        "wrong shape: model.layers.0.mlp.up_proj.weight is [40, 23], expected [40, 24]",
        "wrong type: model.layers.0.mlp.down_proj.bias is I8, expected one of ['BF16', 'F16', 'F32', 'F64']",
    }


def test_problems_are_found_before_anything_is_read(copy: Path) -> None:
    edit_tensors(copy, model__extra=torch.zeros(2))
    seen: list[tuple[int, int]] = []
    with pytest.raises(WeightsError, match="extra"):
        load(copy, progress=lambda done, total: seen.append((done, total)))
    assert seen == []


def test_harmless_buffers_are_ignored(copy: Path, source: Path) -> None:
    edit_tensors(copy, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    assert_equal_tensors(logits(load(copy)), logits(load(source)))


@pytest.mark.usefixtures("unpacked")
def test_tied_head_may_be_stored_but_must_be_the_embedding(copy: Path) -> None:
    edit_config(copy, tie_word_embeddings=True)
    with pytest.raises(WeightsError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        load(copy)
    embedding = load_file(copy / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(copy, lm_head__weight=embedding.clone())
    stored = load(copy)
    assert stored.head.operand is stored.embedding
    edit_tensors(copy, lm_head__weight=None)
    assert_equal_tensors(logits(load(copy)), logits(stored))


def test_untied_head_must_be_there(copy: Path) -> None:
    edit_tensors(copy, lm_head__weight=None)
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight \[61, 24\]"):
        load(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_named(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors: truncated or no safetensors file"):
        load(copy)


def test_garbage_is_named(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(WeightsError, match=r"model\.safetensors: truncated"):
        load(copy)


def test_missing_files_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json: cannot read it"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_broken_json_is_named(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(WeightsError, match=name):
        read_config(copy)


def test_generation_config_is_optional(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    assert read_config(copy).eos_token_ids == (3, 4)


def sharded(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_stale_index_is_no_error_as_long_as_the_tensors_are_there(copy: Path, source: Path) -> None:
    names = list(load_file(copy / "model.safetensors"))
    stale = {**dict.fromkeys(names[1:], "part.safetensors"), "model.ghost": "part.safetensors"}
    sharded(copy, stale)
    assert_equal_tensors(logits(load(copy)), logits(load(source)))
    tensors = load_file(copy / "part.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "part.safetensors")
    with pytest.raises(WeightsError, match=r"missing: model\.norm\.weight \[24\]"):
        load(copy)


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "part.safetensors", "b": "gone-1.safetensors", "c": "gone-2.safetensors"}, "gone-1.*gone-2"),
        ({"a": "../secret.safetensors"}, "secret"),
        ({"a": 3}, "3"),
        ({}, "weight_map"),
        (None, "weight_map"),
    ],
)
def test_wrong_index_is_named(copy: Path, weight_map: object, named: str) -> None:
    sharded(copy, weight_map)
    with pytest.raises(WeightsError, match=rf"index\.json: .*{named}"):
        load(copy)


def test_unsupported_model_is_refused_before_its_files_are_opened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    edit_config(copy, architectures=["MixtralForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM"):
        load(copy)


def test_progress_counts_every_byte_once(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load(source, dtype=torch.bfloat16, progress=lambda done, total: seen.append((done, total)))
    total = weight_bytes(model.config, torch.bfloat16)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(seen) == 1 + len(load_file(source / "model.safetensors"))


def test_context_beyond_the_checkpoints_is_allowed(source: Path) -> None:
    model = load(source, max_seq=4 * 64)
    assert model.rotary.shape[0] > model.config.max_position_embeddings
    assert_everywhere(model.rotary.isfinite(), model.rotary)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": torch.int8}, "dtype"),
        ({"dtype": torch.float64}, "dtype"),
        ({"max_seq": 0}, "max_seq"),
        ({"backend": "jax"}, "jax"),
    ],
)
def test_wrong_options(source: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        load(source, **changes)


def test_triton_on_a_cpu_without_the_interpreter_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match="backend 'triton' runs on CUDA devices, found 'cpu'"):
        load(source, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_on_a_cpu_are_packed_and_not_held_twice(
    source: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = can_pack(CPU, dtype)
    taken: list[Tensor] = []
    real = Packed.of

    def pack(weight: Tensor) -> Packed:
        taken.append(weight)
        return real(weight)

    monkeypatch.setattr(Packed, "of", pack)
    model = load(source, dtype=dtype)
    kinds = {
        type(getattr(layer, name)) for layer in model.layers for name in ("qkv", "out", "gate_up", "down")
    }
    assert kinds | {type(model.head)} == {Packed if able else Dense}
    assert len(taken) == (4 * len(model.layers) + 1 if able else 0)
    assert [weight for weight in taken if weight.untyped_storage().nbytes() != 0] == []


def test_a_packed_copy_of_a_tied_embedding_is_planned(copy: Path) -> None:
    untied = read_config(copy)
    edit_config(copy, tie_word_embeddings=True)
    edit_tensors(copy, **{"lm_head.weight": None})
    tied, model = read_config(copy), load(copy)
    copied = isinstance(model.head, Packed)
    assert copied == torch.backends.mkldnn.is_available()
    assert model.embedding.untyped_storage().nbytes() == model.embedding.nbytes
    size = workspace_bytes("torch", tied, 8, torch.float32, CPU)
    assert size == (model.embedding.nbytes if copied else 0)
    assert workspace_bytes("torch", untied, 8, torch.float32, CPU) == 0
    assert workspace_bytes("torch", tied, 8, torch.float16, CPU) == 0
