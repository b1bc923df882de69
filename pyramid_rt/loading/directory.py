"""A weights directory: which tiers it holds, where they are, and which defaults it sets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from pyramid_rt import checks
from pyramid_rt.decoding.methods import METHODS
from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.json_files import check_directory, kind_of, read_object, resolved, write_object
from pyramid_rt.loading.weights import CONFIG_FILE, read_config
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import parameter_count
from pyramid_rt.params import BY_METHOD
from pyramid_rt.text.tokenizer import Tokenizer

_log = logging.getLogger("pyramid_rt.loading")

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
    """Contents of a weights directory, before any weight is read.

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
            InputError: `path` is no path.
        """
        path = checks.path("weights_dir", path)
        check_directory(path, "a weights directory")
        if kind_of(path / PYRAMID_FILE) is not None:
            tiers, defaults = _read_pyramid_file(path / PYRAMID_FILE)
        else:
            tiers, defaults = {name: path / name for name in TIERS if kind_of(path / name) == "directory"}, {}
        if "target" not in tiers:
            tiers = _single_model(path, list(tiers))
        for name, directory in tiers.items():
            _check_model_dir(name, directory)
        return cls(path, tiers, defaults)


class HasVocabSize(Protocol):
    """The part of a model's config that `check_family` needs."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        ...


def check_family(tokenizers: Mapping[str, Tokenizer], configs: Mapping[str, HasVocabSize]) -> int:
    """Check that tiers can read each other's tokens; returns the size of the vocabulary they share.

    Models may be padded beyond the tokenizer's vocabulary, each by its own number of rows: the shared part is the
    smallest of them, and must hold every id that the target can produce or text can become. Tokens that were added
    to a tokenizer and have no row in the target do neither, unless a text spells one out: then the prompt is
    refused.

    Args:
        tokenizers: by name of tier, small to large.
        configs: the same names.

    Raises:
        WeightsError: two tiers have different tokenizers, or a model has too few rows for its tokenizer's ids.
    """
    *_, target = tokenizers
    for name, tokenizer in tokenizers.items():
        difference = tokenizer.difference(tokenizers[target])
        if difference is not None:
            raise WeightsError(
                f"tiers {name!r} ({tokenizer.directory}) and {target!r} ({tokenizers[target].directory}) "
                f"have different tokenizers: {difference}"
            )
        rows = configs[name].vocab_size
        # Ids from here on are produced by no tier and, as they were added, by no ordinary text.
        unused = max(configs[target].vocab_size, tokenizer.plain_size)
        if min(tokenizer.vocab_size, unused) > rows:
            raise WeightsError(
                f"tier {name!r} ({tokenizer.directory}) has {rows} rows, "
                f"but its tokenizer has ids up to {tokenizer.vocab_size - 1}"
            )
        if tokenizer.vocab_size > rows:
            _log.warning(
                "tier %r (%s) has %d rows, its tokenizer ids up to %d: those beyond are added tokens that no tier "
                "produces, and a prompt that holds one is refused",
                name,
                tokenizer.directory,
                rows,
                tokenizer.vocab_size - 1,
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
        WeightsError: a directory holds no model, the tiers do not fit, the file is there already or cannot be
            written.
        InputError: an argument is no path or no flag.
    """
    directory, force = checks.path("directory", directory), checks.flag("force", force)
    given = {"draft": draft, "qualifier": qualifier, "target": target}
    tiers = {
        name: checks.path(name, path) for name, path in given.items() if name == "target" or path is not None
    }
    for name, path in tiers.items():
        _check_model_dir(name, path)
    configs = {name: read_config(path) for name, path in tiers.items()}
    check_family({name: Tokenizer.from_dir(path) for name, path in tiers.items()}, configs)
    _warn_of_slow_tiers(configs)
    file = directory / PYRAMID_FILE
    if kind_of(file) is not None and not force:
        raise WeightsError(f"{file} exists already; force=True (--force) replaces it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{file}: cannot write it: {error.strerror}") from error
    write_object(file, {name: path_from(directory, path) for name, path in tiers.items()})
    return file


def _warn_of_slow_tiers(configs: dict[str, LlamaConfig]) -> None:
    """A word about a tier that is no smaller than the one that judges it, which can bring no speed."""
    order = [name for name in ("draft", "qualifier", "target") if name in configs]
    for below, above in pairwise(order):
        smaller, larger = (parameter_count(configs[name]) for name in (below, above))
        if smaller >= larger:
            _log.warning(
                "the %s has %s parameters, the %s %s: a tier no smaller than the one above it brings no speed",
                *(below, f"{smaller:,}", above, f"{larger:,}"),
            )


def _single_model(path: Path, others: list[str]) -> dict[str, Path]:
    """Take a directory without a target tier for a model itself, where nothing speaks against it."""
    if others:
        raise WeightsError(f"{path / 'target'}: the target tier is missing; found only {', '.join(others)}")
    if kind_of(path / CONFIG_FILE) is None:
        raise WeightsError(
            f"{path} holds no model: expected {PYRAMID_FILE}, or a directory 'target' "
            f"(with 'qualifier' and 'draft' beside it), or a {CONFIG_FILE}"
        )
    return {"target": path}


def _check_model_dir(name: str, directory: Path) -> None:
    try:
        check_directory(directory, "a model directory")
    except WeightsError as error:
        raise WeightsError(f"tier {name!r}: {error}") from None
    if kind_of(directory / CONFIG_FILE) is None:
        raise WeightsError(f"tier {name!r}: {directory} holds no {CONFIG_FILE}")


def _read_pyramid_file(path: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    content = read_object(path, constants=False)
    _check_keys(path, content, (*TIERS, "defaults"), "the file")
    if "target" not in content:
        raise WeightsError(
            f"{path}: the target tier is missing; found only {', '.join(content) or 'nothing'}"
        )
    tiers = {}
    for name in TIERS:
        if name in content:
            if not isinstance(content[name], str) or not content[name]:
                found = checks.shown(content[name])
                raise WeightsError(f"{path}: {name!r} must be the path of a directory, found {found}")
            tiers[name] = path.parent / content[name]
    defaults = content.get("defaults", {})
    return tiers, typed_defaults(path, defaults)


def _check_keys(path: Path, content: Any, known: tuple[str, ...], what: str) -> None:
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: {what} must be a JSON object, found {type(content).__name__}")
    unknown = ", ".join([checks.shown(key) for key in content if key not in known][:10])
    if unknown:
        raise WeightsError(f"{path}: {what} has unknown keys {unknown}; known are {', '.join(known)}")


def typed_defaults(path: Path, defaults: Any) -> dict[str, Any]:
    """Defaults as `path` holds them or will, each of its type and such that the device can hold it.

    Raises:
        WeightsError: one is unknown or of another type; names the file.
    """
    _check_keys(path, defaults, (*DEFAULT_TYPES, BY_METHOD), "'defaults'")
    typed = {key: _typed_default(path, key, value) for key, value in defaults.items() if key != BY_METHOD}
    if BY_METHOD in defaults:
        _check_keys(path, defaults[BY_METHOD], tuple(METHODS), f"{BY_METHOD!r}")
        own = tuple(key for key in DEFAULT_TYPES if key != "method")
        typed[BY_METHOD] = {}
        for method, options in defaults[BY_METHOD].items():
            _check_keys(path, options, own, f"{BY_METHOD!r}, {method!r}")
            typed[BY_METHOD][method] = {
                key: _typed_default(path, key, value) for key, value in options.items()
            }
    return typed


def _typed_default(path: Path, key: str, value: Any) -> Any:
    expected = DEFAULT_TYPES[key]
    try:
        if expected is int:
            return checks.whole(key, value, -checks.INT64_MAX, checks.INT64_MAX)
        if expected is float:
            return checks.number(key, value, -checks.FLOAT32_MAX, checks.FLOAT32_MAX)
        return checks.text(key, value)
    except InputError:
        raise WeightsError(
            f"{path}: default {key!r} must be of type {expected.__name__}, found {checks.shown(value)}"
        ) from None


def path_from(directory: Path, path: Path) -> str:
    """A path inside the directory is written relative to it, so that both can move together."""
    path, directory = resolved(path), resolved(directory)
    return str(path.relative_to(directory) if path.is_relative_to(directory) else path)
