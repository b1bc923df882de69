"""The command line: what it prints, how it fails, and the comparison behind `demo`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pyramid_rt
from pyramid_rt.cli import command as cli
from pyramid_rt.cli import report
from pyramid_rt.tuning.compare import compare

PROMPT = "def read(path):\n    with open("
STATS = {"text", "tokens", "finish_reason", "stats", "seed"}
TIER_STATS = {"name", "forwards", "proposed", "accepted", "acceptance_rate", "mean_accepted", "seconds"}


def run(*argv: str) -> int:
    return cli.main(list(argv))


def generate(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    status = run("generate", "--max-new-tokens", "12", "--json", *argv)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    return result


# generate.


def test_json_holds_what_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    result = generate(
        capsys, "--method", "psd", "--temperature", "0.8", "--top-p", "0.9", "--seed", "7", PROMPT
    )
    assert result.keys() == STATS
    assert (len(result["tokens"]), result["seed"]) == (12, 7)
    assert {"tokens_per_target_forward", "time_to_first_token", "tokens_per_second"} <= result["stats"].keys()
    tiers = result["stats"]["tiers"]
    assert [tier["name"] for tier in tiers] == ["draft", "qualifier", "target"]
    assert all(tier.keys() >= TIER_STATS for tier in tiers)


def test_lossless_methods_agree_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    sampled = ("--temperature", "0.9", "--seed", "3")
    tokens = [generate(capsys, "--method", m, *sampled, PROMPT)["tokens"] for m in ("ar", "sd", "psd")]
    assert tokens[0] == tokens[1] == tokens[2]


def test_text_streams_and_a_summary_follows(capsys: pytest.CaptureFixture[str]) -> None:
    expected = generate(capsys, PROMPT)["text"]
    assert run("generate", "--max-new-tokens", "12", PROMPT) == 0
    out, err = capsys.readouterr()
    assert out == expected + ("" if expected.endswith("\n") else "\n")
    assert err.count("\n") == 1
    assert "12 tokens" in err


def test_prompt_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(capsys, PROMPT)["tokens"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert generate(capsys, "-")["tokens"] == expected


def test_stop_may_be_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(capsys, "--ignore-eos", PROMPT)["text"]
    stop = text[3:5]
    result = generate(capsys, "--ignore-eos", "--stop", "never there", "--stop", stop, PROMPT)
    assert (result["finish_reason"], result["text"]) == ("stop", text[: text.index(stop)])


def test_logprobs_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(generate(capsys, "--logprobs", "2", PROMPT)["logprobs"]) == 12


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "COMMAND"),
        (("nonsense",), "nonsense"),
        (("generate",), "PROMPT"),
        (("generate", "--top-k", "many", "a"), "--top-k: invalid int value: 'many'"),
        (("generate", "--no-such-flag", "a"), "--no-such-flag"),
        (("generate", "--method", "nope", "a"), "nope"),
        (("generate", "--method", "nope\nnope", "a"), "nope"),
        (("generate", "--divergence", "nope", "a"), "nope"),
        (("generate", "--temperature", "-1", "a"), "temperature"),
        (("generate", "--top-p", "0", "a"), "top_p"),
        (("generate", "--min-p", "nan", "a"), "min_p"),
        (("generate", "--qualifier-threshold", "nan", "a"), "qualifier_threshold"),
        (("generate", "--target-threshold", "-0.1", "a"), "target_threshold"),
        (("generate", "--draft-length", "0", "a"), "draft_length"),
        (("generate", "--draft-length", "99", "a"), "64"),
        (("generate", "--max-new-tokens", "-1", "a"), "max_new_tokens"),
        (("generate", "--stop", "", "a"), "stop"),
        (("generate", "--weights", "/no/such/place", "a"), "/no/such/place"),
        (("generate", "--device", "abacus", "a"), "abacus"),
        (("generate", "--dtype", "int3", "a"), "int3"),
        (("generate", "--backend", "nope", "a"), "nope"),
        (("generate", "--max-seq", "0", "a"), "max_seq"),
        (("generate", "--system", "s", "a"), "--system needs --chat"),
        (("generate", "--chat", "a"), "chat template"),
        (("generate", ""), "prompt"),
        (("generate", "--max-seq", "8", "a b c " * 30), "prompt"),
        (("generate", "\udcff"), "surrogate"),
        (("info", "--weights", "/no/such/place"), "/no/such/place"),
        (("init", "/no/such/place"), "--target"),
        (("init", "/no/such/place", "--target", "/nor/there"), "/nor/there"),
        (("demo", "--repeats", "0"), "--repeats"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyramid-rt: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_standard_input_that_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert run("generate", "-") == 2
    assert "not UTF-8 (byte 2)" in capsys.readouterr().err


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("generate", "--help")
    assert caught.value.code == 0
    assert "--qualifier-threshold" in capsys.readouterr().out


# init and info.


def test_init_then_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = pyramid_rt.demo_weights()
    tiers = ("--target", str(demo / "target"), "--draft", str(demo / "draft"))
    assert run("init", str(tmp_path), *tiers) == 0
    assert run("init", str(tmp_path), *tiers) == 2
    assert run("init", str(tmp_path), *tiers, "--force") == 0
    capsys.readouterr()
    assert run("info", "--weights", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["draft", "target"]
    assert next(line for line in lines if line.startswith("methods")).split(maxsplit=1)[1] == (
        "ar (lossless), sd (lossless), fsd"
    )
    assert next(line for line in lines if line.startswith("default ")).split()[1] == "sd"
    assert err == ""


# demo.


@dataclass
class FakeStats:
    method: str

    def to_dict(self) -> dict[str, Any]:
        drafts = {"ar": [], "sd": ["draft"], "fsd": ["draft"]}[self.method]
        tiers = [{"name": name, "proposed": 8, "accepted": 6, "forwards": 8} for name in drafts]
        target = {"name": "target", "proposed": 0, "accepted": 0, "forwards": 4}
        return {
            "tiers": [*tiers, target],
            "tokens_per_target_forward": 2.5,
            "differs": 0.25 if self.method == "fsd" else None,
        }


@dataclass
class FakeResult:
    tokens: list[int]
    stats: FakeStats


@dataclass
class FakePyramid:
    wrong: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    prefix_reuse: bool = True

    def generate(self, prompt: str, *, method: str, max_new_tokens: int, **options: Any) -> FakeResult:
        assert options == {"temperature": 0.0, "ignore_eos": True}
        assert not self.prefix_reuse  # or the first method would pay for the prompt alone
        self.calls.append((prompt, method))
        time.sleep(0.001)
        first = 9 if method == self.wrong and prompt == "b" else 1
        return FakeResult([first] * max_new_tokens, FakeStats(method))


def test_compare_takes_turns_and_sums_up() -> None:
    fake: Any = FakePyramid()
    rows = compare(fake, ["a", "b"], ["ar", "sd", "fsd"], max_new_tokens=5, repeats=2)
    turn = [("a", "ar"), ("a", "sd"), ("a", "fsd"), ("b", "ar"), ("b", "sd"), ("b", "fsd")]
    assert fake.calls[3:] == turn * 2
    assert [(row.method, row.lossless, row.unequal) for row in rows] == [
        ("ar", True, 0),
        ("sd", True, 0),
        ("fsd", False, 0),
    ]
    assert (rows[0].ratio, rows[0].acceptance, rows[0].differs) == (1.0, {}, None)
    assert (rows[1].acceptance, rows[1].differs) == ({"draft": 0.75}, None)
    assert (rows[2].tokens_per_target_forward, rows[2].differs) == (2.5, 0.25)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("", "on all 2 prompts: sd is equal"), ("sd", "sd is NOT equal to ar: 1 of 2 outputs")],
)
def test_the_verdict_says_so_when_lossless_is_not(wrong: str, words: str) -> None:
    fake: Any = FakePyramid(wrong)
    rows = compare(fake, ["a", "b"], ["ar", "sd", "fsd"], max_new_tokens=5, repeats=1)
    out = io.StringIO()
    report.print_comparison(Console(file=out, width=100), rows, 2, 5)
    assert words in out.getvalue()
    assert "25.0 %" in out.getvalue()


def test_demo_shows_text_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--max-new-tokens", "8", "--repeats", "1") == 0
    out = capsys.readouterr().out
    assert out.startswith(("cpu", "x86", "a", "N")) or "threads" in out.splitlines()[0]
    assert "class Stack" in out
    for method in ("ar", "sd", "fsd", "psd", "psd_a", "psd_f"):
        assert any(line.split()[:1] == [method] for line in out.splitlines()), method
    assert "token by token" in out


# As a process.


# A test run in the background of a shell ignores SIGINT, and so would its children.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pyramid_rt.cli import main
sys.exit(main())
"""


def start(*argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_closed_pipe_is_silent() -> None:
    process = start("generate", "--ignore-eos", "--max-new-tokens", "900", PROMPT)
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_ctrl_c_ends_with_130() -> None:
    process = start("generate", "--ignore-eos", "--max-new-tokens", "900", PROMPT)
    assert process.stdout
    process.stdout.read(1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "\n")
