"""Writing the defaults of a weights directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.loading.directory import PYRAMID_FILE, PyramidDirectory, path_from, write_atomically

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
    folder = (opened.path / PYRAMID_FILE).resolve().parent
    if writing and not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to; --dry-run only prints")


def write_defaults(directory: str | Path, defaults: Mapping[str, Any]) -> Path:
    """Put defaults into a directory's ``pyramid.json`` and keep whatever else it says; made where there is none.

    One default goes: `inner_rounds`, where `qualifier_length` is given, which it would override.

    Args:
        directory: a weights directory.
        defaults: those to set.

    Returns: the path of the file.

    Raises:
        WeightsError: it is no weights directory, its file is wrong, or it cannot be written.
    """
    opened = PyramidDirectory.open(directory)
    file = (opened.path / PYRAMID_FILE).resolve()
    try:
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
        else:
            content = {name: path_from(opened.path, path) for name, path in opened.tiers.items()}
        merged = {**content.get("defaults", {}), **defaults}
        if "qualifier_length" in defaults:
            merged.pop("inner_rounds", None)
        write_atomically(file, {**content, "defaults": merged})
    except OSError as error:
        raise WeightsError(f"{file}: cannot write it: {error.strerror}") from error
    return file
