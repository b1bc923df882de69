"""Fetching real weights: whatever a write dies of, the file is named and nothing half written stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bench.smollm2_weights import write_json, writing


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error"), Exception("No space left")],
)
def test_a_failed_write_names_the_file(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("kept")

    def write() -> None:
        with writing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(SystemExit, match=r"model\.safetensors: cannot write it: (I/O error|No space left)"):
        write()
    assert (path.read_text(), os.listdir(tmp_path)) == ("kept", ["model.safetensors"])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"gone/config\.json: cannot write it: No such file"):
        write_json(tmp_path / "gone" / "config.json", {})
    write_json(tmp_path / "config.json", {"a": 1})
    assert os.listdir(tmp_path) == ["config.json"]
