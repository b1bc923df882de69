"""Reading a model as Hugging Face saves it: config.json, and safetensors in one file or in shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.json_files import kind_of, read_object
from pyramid_rt.loading.checkpoint import Stored, check_tensors, layer_pieces, list_tensors
from pyramid_rt.models import families
from pyramid_rt.models.backends.choice import check_backend, make_backend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import Llama, weight_bytes, with_packed_matrices
from pyramid_rt.models.matrix import Dense

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Progress = Callable[[int, int], None]

_log = logging.getLogger("pyramid_rt.loading")


def read_config(directory: str | Path) -> LlamaConfig:
    """Read `directory`/config.json, and the end-of-sequence ids of generation_config.json where there is one.

    Raises:
        UnsupportedModelError: a model that this runtime does not decode.
        WeightsError: a file is missing, unreadable or contradicts itself.
    """
    directory = Path(directory)
    generation = directory / GENERATION_CONFIG_FILE
    return families.read_config(
        read_object(directory / CONFIG_FILE),
        source=str(directory / CONFIG_FILE),
        generation_config=read_object(generation) if kind_of(generation) is not None else None,
    )


def check_model(directory: Path, config: LlamaConfig) -> None:
    """Check from the files' headers that the tensors are those of the config, before any memory is planned.

    What the files hold and the model leaves out is logged, as a warning of ``pyramid_rt.loading``.

    Raises:
        WeightsError: as `load_llama`.
    """
    ignored = check_tensors(directory, config, list_tensors(directory))
    for note in config.notes:
        _log.warning("%s", note)
    if ignored:
        _log.warning(
            "%s: tensors that play no part in decoding are left out: %s", directory, _listed(ignored)
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
    check_backend(backend, device)
    stored = list_tensors(directory)
    check_tensors(directory, config, stored)
    # Tensors made in an application's inference mode could not be written to outside it.
    with torch.inference_mode(False):
        chosen = make_backend(backend, config, device, dtype=dtype, max_seq=max_seq)
        model = Llama.empty(config, chosen, max_seq=max_seq, dtype=dtype, device=device)
        _fill(_destinations(model), stored, weight_bytes(config, dtype), progress)
        names = families.FAMILIES[config.architecture].names
        if config.tie_word_embeddings and names.head in stored:
            _check_tied_head(model.embedding, stored[names.head], names)
        return with_packed_matrices(model) if backend == "torch" else model


def _destinations(model: Llama) -> dict[str, Tensor]:
    """The name of each stored tensor -> the part of the model's weights that it fills."""
    names = families.FAMILIES[model.config.architecture].names
    places = {names.embedding: model.embedding, names.norm: model.norm}
    if not model.config.tie_word_embeddings:
        places[names.head] = model.head.operand
    pieces = list(layer_pieces(model.config, names))
    for index, layer in enumerate(model.layers):
        for piece in pieces:
            part = getattr(layer, piece.field)
            whole = part.operand if isinstance(part, Dense) else part
            places[names.layer.format(index) + piece.name] = whole.narrow(0, piece.first, piece.rows)
    return places


def _by_file(names: Iterable[str], stored: Mapping[str, Stored]) -> dict[Path, list[str]]:
    groups: dict[Path, list[str]] = {}
    for name in names:
        groups.setdefault(stored[name].file, []).append(name)
    return groups


def _fill(
    places: Mapping[str, Tensor], stored: Mapping[str, Stored], total: int, progress: Progress | None
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


def _check_tied_head(embedding: Tensor, head: Stored, names: families.TensorNames) -> None:
    """Refuse a checkpoint whose config ties the head to the embedding but which stores another one."""
    rows = 4096  # a piece at a time, so that no second copy of the matrix is made
    with safe_open(head.file, framework="pt") as handle:
        stored = handle.get_slice(names.head)
        for first in range(0, len(embedding), rows):
            piece = embedding[first : first + rows]
            if not torch.equal(stored[first : first + rows].to(piece.device, piece.dtype), piece):
                raise WeightsError(
                    f"{head.file}: tie_word_embeddings is true, but {names.head} differs from {names.embedding}"
                )


def _listed(names: list[str], most: int = 20) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
