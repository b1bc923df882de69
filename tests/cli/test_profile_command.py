"""`pyramid-rt profile`: the table on standard output, the files of --out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pyramid_rt import cli


def run(*argv: str) -> int:
    return cli.main(["profile", "--device", "cpu", "--max-new-tokens", "12", *argv])


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str], tiny_dir: Path) -> None:
    assert run("--weights", str(tiny_dir), "--method", "sd", "abcabc") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "burst of 'draft'" in out
    assert "target: a pass takes" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_everything_as_one_object(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    options = ("--logprobs", "2", "--stop", "\n", "--heal", "--out", str(tmp_path))
    assert run("--weights", str(tiny_dir), "--method", "sd", "--json", *options, "abcabc") == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert content["rows"][0]["name"] == "call"
    assert len(content["result"]["logprobs"]) == len(content["result"]["tokens"])
    assert (tmp_path / "trace.json").is_file()


def test_files_of_the_folder(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert run("--weights", str(tiny_dir), "--out", str(folder), "--rounds", "2", "abcabc") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["rounds.png", "rounds.svg", "trace.json"]
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert capsys.readouterr().out.count("wrote ") == 3


def test_a_call_without_rounds_has_no_picture(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    assert run("--weights", str(tiny_dir), "--max-new-tokens", "1", "--out", str(tmp_path), "abcabc") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = ("--weights", str(tiny_dir))
    file = tmp_path / "file"
    file.touch()
    cases = [
        (("--rounds", "0", "a"), "--rounds must be at least 1, found 0"),
        (("--nvtx", "a"), "nvtx=True needs a CUDA device"),
        (("--out", str(file), "a"), f"--out: {file} is no folder and cannot be made"),
        (("--system", "s", "a"), "--system needs --chat"),
        (("--logprobs", "1", "a"), "--logprobs needs --json: the table has no place for them"),
    ]
    for argv, words in cases:
        assert run(*weights, *argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(*weights, "--out", str(tmp_path), "a") == 2
    assert "pip install 'pyramid-rt[profile]'" in capsys.readouterr().err
