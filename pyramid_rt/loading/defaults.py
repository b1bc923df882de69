"""Writing the defaults of a weights directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyramid_rt.errors import InputError
from pyramid_rt.json_files import kind_of, read_object, resolved, write_object
from pyramid_rt.loading.directory import PYRAMID_FILE, PyramidDirectory, path_from, typed_defaults
from pyramid_rt.params import BY_METHOD, Defaults

NOTHING_TO_TUNE = "there is nothing to tune: the pyramid has one tier, and only ar can run"


def check_tunable(directory: str | Path, *, writing: bool) -> None:
    """Check before any work that a directory has tiers to choose from and, where asked, can be written to.

    Raises:
        InputError: it has one tier, or it cannot be written to.
        WeightsError: it is no weights directory.
    """
    opened = PyramidDirectory.open(directory)
    if len(opened.tiers) < 2:
        raise InputError(f"{directory}: {NOTHING_TO_TUNE}")
    # The file is replaced, so what counts is the directory that it really is in.
    folder = resolved(opened.path / PYRAMID_FILE).parent
    if writing and not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to; --dry-run only prints")


def write_defaults(directory: str | Path, defaults: Mapping[str, Any]) -> Path:
    """Put defaults into a directory's ``pyramid.json`` and keep whatever else it says; made where there is none.

    One default goes: `inner_rounds`, where `qualifier_length` is given, which it would override.

    Args:
        directory: a weights directory.
        defaults: those to set; under "methods" those of single methods, each as a whole.

    Returns: the path of the file.

    Raises:
        WeightsError: it is no weights directory, its file is wrong, a default is of another type, or the file cannot
            be written.
        InputError: a default is outside its range. Nothing is written that `load` would refuse.
    """
    opened = PyramidDirectory.open(directory)
    file = resolved(opened.path / PYRAMID_FILE)
    if kind_of(file) is not None:
        content = read_object(file, constants=False)
    else:
        content = {name: path_from(opened.path, path) for name, path in opened.tiers.items()}
    before, given = content.get("defaults", {}), typed_defaults(file, dict(defaults))
    merged = {**before, **given}
    if BY_METHOD in given:
        merged[BY_METHOD] = {**before.get(BY_METHOD, {}), **given[BY_METHOD]}
    if "qualifier_length" in defaults:
        merged.pop("inner_rounds", None)
    checked_defaults(file, merged)
    write_object(file, {**content, "defaults": merged})
    return file


def checked_defaults(file: Path, defaults: Mapping[str, Any]) -> Defaults:
    """A file's defaults, checked. Raises InputError, the file in its message."""
    try:
        return Defaults.of(defaults)
    except InputError as error:
        raise InputError(f"{file}, 'defaults': {error}") from error
