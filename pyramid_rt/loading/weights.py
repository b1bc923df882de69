"""Reading a Llama as Hugging Face saves it: config.json, and safetensors in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.models.backends.choice import check_backend, make_backend
from pyramid_rt.models.backends.torch import TorchBackend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import LayerWeights, Llama, weight_bytes, with_packed_matrices

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Types a checkpoint may store its floating-point weights in; each tensor is converted as it is read.
_STORED_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})
# Old exporters saved this buffer, which follows from the config.
_HARMLESS_SUFFIX = "rotary_emb.inv_freq"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"

Progress = Callable[[int, int], None]


def read_config(directory: str | Path) -> LlamaConfig:
    """Read `directory`/config.json, and the end-of-sequence ids of generation_config.json where there is one.

    Raises:
        UnsupportedModelError: a model that this runtime does not decode.
        WeightsError: a file is missing, unreadable or contradicts itself.
    """
    directory = Path(directory)
    generation = directory / GENERATION_CONFIG_FILE
    return LlamaConfig.from_hf(
        _read_json(directory / CONFIG_FILE),
        source=str(directory / CONFIG_FILE),
        generation_config=_read_json(generation) if generation.exists() else None,
    )


def load_llama(
    directory: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_seq: int,
    backend: str,
    progress: Progress | None = None,
) -> Llama:
    """Load one tier.

    Files are memory-mapped, and tensors converted and copied one at a time into their place in the packed
    matrices, so that the tier is never held twice.

    Args:
        directory: config.json with model.safetensors, or with shards and their index.
        device: where the weights go.
        dtype: float32, bfloat16 or float16, whatever the files hold.
        max_seq: positions to prepare rotary embeddings for. It may exceed the checkpoint's own limit.
        backend: name for `make_backend`, which also allocates its buffers.
        progress: called with (bytes done, bytes in all), counted in `dtype`.

    Raises:
        InputError: an unknown dtype or backend, or max_seq below 1.
        UnsupportedModelError: a model that this runtime does not decode.
        WeightsError: a file is missing or damaged, or the tensors are not those of the config; all missing,
            unexpected and wrongly shaped tensors are listed, before any is read.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}, expected one of {', '.join(str(d) for d in DTYPES)}")
    if max_seq < 1:
        raise InputError(f"max_seq is {max_seq}, expected at least 1")
    directory = Path(directory)
    config = read_config(directory)
    total = weight_bytes(config, dtype)
    check_backend(backend, device)
    # A model without storage says which tensors there must be, and of which shape.
    meta = Llama.empty(config, TorchBackend(), max_seq=1, dtype=dtype, device=torch.device("meta"))
    stored = _list_tensors(directory)
    _check(directory, config, _destinations(meta), stored)
    chosen = make_backend(backend, config, device, dtype=dtype, max_seq=max_seq)
    model = Llama.empty(config, chosen, max_seq=max_seq, dtype=dtype, device=device)
    _fill(_destinations(model), stored, total, progress)
    if config.tie_word_embeddings and _HEAD in stored:
        _check_tied_head(model.embedding, stored[_HEAD])
    return with_packed_matrices(model) if backend == "torch" else model


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor on disk: where it is and how."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot read it: {error.strerror or error}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a model, and for shards the index's map from tensor to file name."""
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE], None
    index = directory / INDEX_FILE
    if not index.exists():
        raise WeightsError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(
            f"{index}: weight_map is {weight_map!r}, expected an object that maps names to files"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightsError(
                f"{index}: {name} is in {file!r}, expected the name of a file beside the index"
            )
    files = [directory / file for file in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise WeightsError(f"{index}: names files that are not there: {', '.join(missing)}")
    return files, weight_map


def _list_tensors(directory: Path) -> dict[str, _Stored]:
    """All tensors of a model's files, from their headers alone."""
    files, weight_map = _files(directory)
    stored: dict[str, _Stored] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in stored:
                raise WeightsError(f"{file}: {name} is also in {stored[name].file.name}")
            stored[name] = tensor
    if weight_map is not None:
        astray = [
            f"{name} (in {file})"
            for name, file in weight_map.items()
            if name not in stored or stored[name].file.name != file
        ]
        if astray:
            raise WeightsError(
                f"{directory / INDEX_FILE}: names tensors that their files do not hold: {', '.join(astray)}"
            )
    return stored


def _read_header(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: _Stored(file, tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: truncated or no safetensors file: {error}") from error


def _destinations(model: Llama) -> dict[str, Tensor]:
    """Hugging Face's name of each tensor -> the part of the packed weights that it fills."""
    places = {_EMBEDDING: model.embedding, "model.norm.weight": model.norm}
    if not model.config.tie_word_embeddings:
        places[_HEAD] = model.head
    for index, layer in enumerate(model.layers):
        for name, place in _layer_destinations(layer, model.config).items():
            places[f"model.layers.{index}.{name}"] = place
    return places


def _layer_destinations(layer: LayerWeights, config: LlamaConfig) -> dict[str, Tensor]:
    keys = config.num_kv_heads * config.head_dim
    parts = (config.num_heads * config.head_dim, keys, keys)
    places = {"input_layernorm.weight": layer.attn_norm, "post_attention_layernorm.weight": layer.mlp_norm}
    for kind, qkv, out, gate_up, down in (
        ("weight", layer.qkv, layer.out, layer.gate_up, layer.down),
        ("bias", layer.qkv_bias, layer.out_bias, layer.gate_up_bias, layer.down_bias),
    ):
        if qkv is not None and out is not None:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), qkv.split_with_sizes(parts), strict=True):
                places[f"self_attn.{name}.{kind}"] = part
            places[f"self_attn.o_proj.{kind}"] = out
        if gate_up is not None and down is not None:
            for name, part in zip(("gate_proj", "up_proj"), gate_up.chunk(2), strict=True):
                places[f"mlp.{name}.{kind}"] = part
            places[f"mlp.down_proj.{kind}"] = down
    return places


def _check(
    directory: Path, config: LlamaConfig, expected: Mapping[str, Tensor], stored: Mapping[str, _Stored]
) -> None:
    """Raise one error that lists everything wrong with names, shapes and types."""
    wanted = {name: tuple(place.shape) for name, place in expected.items()}
    if config.tie_word_embeddings and _HEAD in stored:
        wanted[_HEAD] = wanted[_EMBEDDING]
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in stored]
    problems += [
        f"unexpected: {name} {list(tensor.shape)}"
        for name, tensor in stored.items()
        if name not in wanted and not name.endswith(_HARMLESS_SUFFIX)
    ]
    for name, shape in wanted.items():
        tensor = stored.get(name)
        if tensor is not None and tensor.shape != shape:
            problems.append(f"wrong shape: {name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor is not None and tensor.dtype not in _STORED_DTYPES:
            problems.append(f"wrong type: {name} is {tensor.dtype}, expected one of {sorted(_STORED_DTYPES)}")
    if problems:
        raise WeightsError(
            f"{directory}: the tensors are not those of its config:\n  " + "\n  ".join(problems)
        )


def _by_file(names: Iterable[str], stored: Mapping[str, _Stored]) -> dict[Path, list[str]]:
    groups: dict[Path, list[str]] = {}
    for name in names:
        groups.setdefault(stored[name].file, []).append(name)
    return groups


def _fill(
    places: Mapping[str, Tensor], stored: Mapping[str, _Stored], total: int, progress: Progress | None
) -> None:
    """Copy every tensor from its file into its place."""
    done = 0
    if progress is not None:
        progress(done, total)
    for file, names in _by_file(places, stored).items():
        try:
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    places[name].copy_(handle.get_tensor(name))
                    done += places[name].nbytes
                    if progress is not None:
                        progress(done, total)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file}: cannot read it: {error}") from error


def _check_tied_head(embedding: Tensor, head: _Stored) -> None:
    """Refuse a checkpoint whose config ties the head to the embedding but which stores another one."""
    rows = 4096  # a piece at a time, so that no second copy of the matrix is made
    with safe_open(head.file, framework="pt") as handle:
        stored = handle.get_slice(_HEAD)
        for first in range(0, len(embedding), rows):
            piece = embedding[first : first + rows]
            if not torch.equal(stored[first : first + rows].to(piece.device, piece.dtype), piece):
                raise WeightsError(
                    f"{head.file}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}"
                )
