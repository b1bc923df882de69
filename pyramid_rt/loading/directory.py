"""A weights directory: which tiers it holds, where they are, and which defaults it sets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyramid_rt.errors import WeightsError
from pyramid_rt.loading.weights import CONFIG_FILE, read_config
from pyramid_rt.text.tokenizer import Tokenizer

PYRAMID_FILE = "pyramid.json"
TIERS = ("draft", "qualifier", "target")

DEFAULT_TYPES: dict[str, type] = {
    "method": str,
    "draft_length": int,
    "qualifier_length": int,
    "inner_rounds": int,
    "qualifier_threshold": float,
    "target_threshold": float,
    "divergence": str,
    "divergence_on": str,
    "lossless_rule": str,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "max_new_tokens": int,
}


@dataclass(frozen=True, slots=True)
class PyramidDirectory:
    """What a weights directory names, before any weight is read.

    Attributes:
        path: the directory itself.
        tiers: name and model directory of each tier there is, small to large; the last is the target.
        defaults: options of `generate` that ``pyramid.json`` sets, of the right type; ranges are not checked.
    """

    path: Path
    tiers: dict[str, Path]
    defaults: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> PyramidDirectory:
        """Find the tiers of a directory.

        It holds a ``pyramid.json``, or subdirectories of the tiers' names, or is itself one model as Hugging
        Face saves it (then that is the target, and the only tier).

        Raises:
            WeightsError: it is no directory, a tier is missing, or ``pyramid.json`` is wrong.
        """
        path = Path(path)
        if not path.is_dir():
            found = "is a file" if path.exists() else "does not exist"
            raise WeightsError(f"{path} {found}; expected a weights directory")
        if (path / PYRAMID_FILE).exists():
            tiers, defaults = _read_pyramid_file(path / PYRAMID_FILE)
        else:
            tiers, defaults = {name: path / name for name in TIERS if (path / name).is_dir()}, {}
        if "target" not in tiers:
            tiers = _single_model(path, list(tiers))
        for name, directory in tiers.items():
            _check_model_dir(name, directory)
        return cls(path, tiers, defaults)


class HasVocabSize(Protocol):
    """What `check_family` needs of a model's config."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        ...


def check_family(tokenizers: Mapping[str, Tokenizer], configs: Mapping[str, HasVocabSize]) -> int:
    """Check that tiers can read each other's tokens; returns the size of the vocabulary they share.

    Models may be padded beyond the tokenizer's vocabulary, each by its own number of rows: the shared part
    is the smallest of them, and must hold every id that the tokenizer knows.

    Args:
        tokenizers: by name of tier, small to large.
        configs: the same names.

    Raises:
        WeightsError: two tiers have different tokenizers, or a model has fewer rows than the tokenizer ids.
    """
    *_, target = tokenizers
    for name, tokenizer in tokenizers.items():
        difference = tokenizer.difference(tokenizers[target])
        if difference is not None:
            raise WeightsError(
                f"tiers {name!r} ({tokenizer.directory}) and {target!r} ({tokenizers[target].directory}) "
                f"have different tokenizers: {difference}"
            )
        if tokenizer.vocab_size > configs[name].vocab_size:
            raise WeightsError(
                f"tier {name!r} ({tokenizer.directory}) has {configs[name].vocab_size} rows, "
                f"but its tokenizer has ids up to {tokenizer.vocab_size - 1}"
            )
    return min(config.vocab_size for config in configs.values())


def init(
    directory: str | Path,
    target: str | Path,
    qualifier: str | Path | None = None,
    draft: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a ``pyramid.json`` that names the given model directories, after checking that they fit.

    Args:
        directory: where to write it; made when missing.
        target, qualifier, draft: model directories, relative to the current one.
        force: replace a ``pyramid.json`` that is there already.

    Returns:
        The path of the file.

    Raises:
        WeightsError: a directory holds no model, the tiers do not fit, or the file is there already.
    """
    directory = Path(directory)
    given = {"draft": draft, "qualifier": qualifier, "target": target}
    tiers = {name: Path(path) for name, path in given.items() if path is not None}
    for name, path in tiers.items():
        _check_model_dir(name, path)
    check_family(
        {name: Tokenizer.from_dir(path) for name, path in tiers.items()},
        {name: read_config(path) for name, path in tiers.items()},
    )
    file = directory / PYRAMID_FILE
    if file.exists() and not force:
        raise WeightsError(f"{file} exists already; force replaces it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(file, {name: path_from(directory, path) for name, path in tiers.items()})
    except OSError as error:
        raise WeightsError(f"{file}: cannot write it: {error.strerror}") from error
    return file


def _single_model(path: Path, others: list[str]) -> dict[str, Path]:
    """Take a directory without a target tier for a model itself, where nothing speaks against it."""
    if others:
        raise WeightsError(f"{path / 'target'}: the target tier is missing; found only {', '.join(others)}")
    if not (path / CONFIG_FILE).exists():
        raise WeightsError(
            f"{path} holds no model: expected {PYRAMID_FILE}, or a directory 'target' "
            f"(with 'qualifier' and 'draft' beside it), or a {CONFIG_FILE}"
        )
    return {"target": path}


def _check_model_dir(name: str, directory: Path) -> None:
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise WeightsError(f"tier {name!r}: {directory} {found}; expected a model directory")
    if not (directory / CONFIG_FILE).exists():
        raise WeightsError(f"tier {name!r}: {directory} holds no {CONFIG_FILE}")


def _read_pyramid_file(path: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise WeightsError(f"{path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON: {error}") from error
    known = (*TIERS, "defaults")
    _check_keys(path, content, known, "the file")
    if "target" not in content:
        raise WeightsError(
            f"{path}: the target tier is missing; found only {', '.join(content) or 'nothing'}"
        )
    tiers = {}
    for name in TIERS:
        if name in content:
            if not isinstance(content[name], str) or not content[name]:
                raise WeightsError(
                    f"{path}: {name!r} must be the path of a directory, found {content[name]!r}"
                )
            tiers[name] = path.parent / content[name]
    defaults = content.get("defaults", {})
    _check_keys(path, defaults, tuple(DEFAULT_TYPES), "'defaults'")
    return tiers, {key: _typed_default(path, key, value) for key, value in defaults.items()}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check_keys(path: Path, content: Any, known: tuple[str, ...], what: str) -> None:
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: {what} must be a JSON object, found {type(content).__name__}")
    unknown = [key for key in content if key not in known]
    if unknown:
        raise WeightsError(
            f"{path}: {what} has unknown keys {', '.join(map(repr, unknown))}; known are {', '.join(known)}"
        )


def _typed_default(path: Path, key: str, value: Any) -> Any:
    expected = DEFAULT_TYPES[key]
    accepted = (int, float) if expected is float else (expected,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise WeightsError(f"{path}: default {key!r} must be of type {expected.__name__}, found {value!r}")
    return expected(value)


def path_from(directory: Path, path: Path) -> str:
    """A path inside the directory is written relative to it, so that both can move together."""
    path, directory = path.resolve(), directory.resolve()
    return str(path.relative_to(directory) if path.is_relative_to(directory) else path)


def write_atomically(file: Path, content: Mapping[str, Any]) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
