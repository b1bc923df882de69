"""The tensors of a model's files, known from their headers alone, held against those that its config wants."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pyramid_rt.errors import WeightsError
from pyramid_rt.json_files import kind_of, read_object
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.families import FAMILIES, TensorNames
from pyramid_rt.models.llama import layer_shapes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Types a checkpoint may store its floating-point weights in; each tensor is converted as it is read.
_STORED_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})
# A buffer that old exporters saved, and that follows from the config.
_DERIVED = "rotary_emb.inv_freq"
# Scales of calibrated activations and caches; those of weights are called otherwise.
_CALIBRATION = re.compile(r".*[._](?:[qkv]|kv|prob|prob_output|output)_(?:scale|zero_point)")
_MOST_LISTED = 40


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk: where it is and how."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor's place: rows first .. first + rows of a field of `LayerWeights`, or of a vector."""

    field: str
    name: str
    first: int
    rows: int


def list_tensors(directory: Path) -> dict[str, Stored]:
    """All tensors of a model's files by name, from their headers.

    An index says which files there are; where a tensor is, the files themselves say.

    Raises:
        WeightsError: a file is missing or no safetensors file, or the index is wrong.
    """
    stored: dict[str, Stored] = {}
    for file in _files(directory):
        for name, tensor in _read_header(file).items():
            if name in stored:
                raise WeightsError(f"{file}: {name} is also in {stored[name].file.name}")
            stored[name] = tensor
    return stored


def check_tensors(directory: Path, config: LlamaConfig, stored: Mapping[str, Stored]) -> list[str]:
    """Hold a model's tensors against its config; returns the names of those that play no part in it.

    They are heads of other tasks and scales of calibrated activations. Buffers that follow from the config are not
    even named.

    Raises:
        WeightsError: one error that lists everything wrong with names, shapes and types.
    """
    names = FAMILIES[config.architecture].names
    wanted, absent = _wanted(config, names, stored)
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in stored]
    problems += absent
    if config.tie_word_embeddings and names.head in stored:
        wanted[names.head] = wanted[names.embedding]
    extra = [name for name in stored if name not in wanted and not name.endswith(_DERIVED)]
    ignored = [name for name in extra if _plays_no_part(name, names)]
    problems += [
        f"unexpected: {name} {list(stored[name].shape)}" for name in extra if name not in set(ignored)
    ]
    for name, shape in wanted.items():
        tensor = stored.get(name)
        if tensor is not None and tensor.shape != shape:
            problems.append(f"wrong shape: {name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor is not None and tensor.dtype not in _STORED_DTYPES:
            problems.append(f"wrong type: {name} is {tensor.dtype}, expected one of {sorted(_STORED_DTYPES)}")
    if len(problems) > _MOST_LISTED:
        problems[_MOST_LISTED:] = [f"and {len(problems) - _MOST_LISTED} more"]
    if problems:
        raise WeightsError(
            f"{directory}: the tensors are not those of its config:\n  " + "\n  ".join(problems)
        )
    return ignored


def layer_pieces(config: LlamaConfig, names: TensorNames) -> Iterator[Piece]:
    """Places of the tensors in a layer, by their names without the layer's own beginning."""
    keys, inner = config.num_kv_heads * config.head_dim, config.intermediate_size
    joint, halves = (config.num_heads * config.head_dim, keys, keys), (inner, inner)
    cuts = {"qkv": joint, "qkv_bias": joint, "gate_up": halves, "gate_up_bias": halves}
    for field, shape in layer_shapes(config).items():
        parts = names.parts[field]
        first = 0
        for name, rows in zip(parts, cuts[field] if len(parts) > 1 else shape[:1], strict=True):
            yield Piece(field, name, first, rows)
            first += rows


def _wanted(
    config: LlamaConfig, names: TensorNames, stored: Mapping[str, Stored]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Name and shape of every tensor; and of layers that are not there at all, one line for all of them."""
    table, hidden = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    wanted: dict[str, tuple[int, ...]] = {names.embedding: table, names.norm: hidden}
    if not config.tie_word_embeddings:
        wanted[names.head] = table
    shapes = layer_shapes(replace(config, num_layers=1))
    pieces = {piece.name: (piece.rows, *shapes[piece.field][1:]) for piece in layer_pieces(config, names)}
    # A config may claim 10^9 layers: only those of which something is there are gone through.
    pattern = re.compile(re.escape(names.layer).replace(r"\{\}", r"(\d{1,9})") + ".")
    there = {int(match[1]) for name in stored if (match := pattern.match(name))}
    layers = min(config.num_layers, max(there, default=-1) + 2)
    for index in range(layers):
        prefix = names.layer.format(index)
        wanted |= {prefix + name: shape for name, shape in pieces.items()}
    absent = config.num_layers - layers
    return wanted, [f"missing: all tensors of {absent} more layers"] if absent else []


def _plays_no_part(name: str, names: TensorNames) -> bool:
    return not name.startswith(names.body) or _CALIBRATION.fullmatch(name) is not None


def _files(directory: Path) -> list[Path]:
    """The safetensors files of a model."""
    if kind_of(directory / SINGLE_FILE) is not None:
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    if kind_of(index) is None:
        raise WeightsError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(
            f"{index}: weight_map is {str(weight_map)[:80]!r}, expected an object that maps names to files"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightsError(
                f"{index}: {name} is in {str(file)[:80]!r}, expected the name of a file beside the index"
            )
    files = [directory / file for file in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if kind_of(file) is None]
    if missing:
        raise WeightsError(f"{index}: names files that are not there: {', '.join(missing)}")
    return files


def _read_header(file: Path) -> dict[str, Stored]:
    kind = kind_of(file)
    if kind != "file":
        raise WeightsError(f"{file}: is a {kind}, expected a safetensors file")
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: Stored(file, tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: truncated or no safetensors file: {error}") from error
