"""`profile --counted`: the request that goes to the machine, and what it does not take."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pyramid_rt
from pyramid_rt.cli import main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests, each answered by status 3."""
    found: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> Any:
        assert command[-4:] == ["-P", "-m", "ptx.counted", "--request"]
        first, second = options["env"]["PYTHONPATH"].split(":")[:2]
        assert (Path(first) / "ptx" / "counted.py").is_file()
        assert (Path(second) / "pyramid_rt" / "__init__.py").is_file()
        found.append(json.loads(options["input"]))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_the_request_is_that_of_the_call(asked: list[dict[str, Any]]) -> None:
    flags = ("--method", "sd", "--temperature", "0.7", "--dtype", "float16", "--stop", "x")
    assert main(["profile", "--counted", *flags, "def f("]) == 3
    assert asked == [
        {
            "weights": str(pyramid_rt.demo_weights()),
            "prompt": "def f(",
            "loading": {"dtype": "float16"},
            "options": {
                "max_new_tokens": 8,
                "method": "sd",
                "temperature": 0.7,
                "stop": ["x"],
                "ignore_eos": False,
            },
        }
    ]
    assert main(["profile", "--counted", "--max-new-tokens", "3", "--weights", "w", "a"]) == 3
    assert (asked[-1]["options"]["max_new_tokens"], asked[-1]["weights"]) == (3, "w")


@pytest.mark.parametrize(
    "flags", [("--device", "cpu"), ("--out", "x"), ("--json",), ("--nvtx",), ("--threads", "2")]
)
def test_flags_of_times_and_devices_are_refused(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], tmp_path: Path
) -> None:
    assert main(["profile", "--counted", *flags, "a"]) == 2
    assert f"--counted takes no {flags[0]}: " in capsys.readouterr().err
    assert asked == []


def test_an_installed_package_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(pyramid_rt, "__file__", str(tmp_path / "pyramid_rt" / "__init__.py"))
    assert main(["profile", "--counted", "a"]) == 2
    assert "it needs a copy of the repository" in capsys.readouterr().err
