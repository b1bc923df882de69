"""The command line: what it prints, how it fails, and the comparison behind `demo`."""

from __future__ import annotations

import io
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pyramid_rt
from pyramid_rt import cli
from pyramid_rt.cli import report
from pyramid_rt.tuning.compare import compare

PROMPT = "def read(path):\n    with open("
RESULT = {"text", "tokens", "finish_reason", "stats", "seed", "usage"}
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
    assert result.keys() == RESULT
    assert (len(result["tokens"]), result["seed"]) == (12, 7)
    assert {"tokens_per_target_forward", "time_to_first_token", "tokens_per_second"} <= result["stats"].keys()
    tiers = result["stats"]["tiers"]
    assert [tier["name"] for tier in tiers] == ["draft", "qualifier", "target"]
    assert [tier for tier in tiers if not (tier.keys() >= TIER_STATS)] == []


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


def test_a_prompt_is_healed(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, "--heal", "import jso")["text"].startswith("n")


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
        (("info", "/no/such/place"), "/no/such/place"),
        (("info", "a", "--weights", "b"), "give one of them"),
        (("generate", "--max-time", "-1", "a"), "max_time"),
        (
            ("generate", "--temprature", "0.5", "a"),
            "unrecognized arguments: --temprature a; did you mean --temperature?",
        ),
        (("generate", "--sed=3", "a"), "did you mean --seed?"),
        (("generate", "--qqq", "a"), "unrecognized arguments: --qqq (see"),
        (("info", "--metod", "ar"), "unrecognized arguments: --metod"),
        (("init", "/no/such/place"), "--target"),
        (("init", "/no/such/place", "--target", "/nor/there"), "/nor/there"),
        (("demo", "--repeats", "0"), "--repeats"),
        (("generate", "--logprobs", "2", "a"), "--logprobs needs --json"),
        (("generate", "--dtype=--", "a"), "dtype must be one of float32, bfloat16, float16, found '--'"),
        (("generate", "--top-k=--", "a"), "--top-k: invalid int value: '--'"),
        (("generate", "--top-k", "9" * 30, "a"), "top_k"),
        (("generate", "--top-k", "9" * 5000, "a"), "--top-k"),
        (("generate", "--temperature", "1e39", "a"), "temperature"),
        (("generate", "--json=yes", "a"), "--json"),
        (("generate", "--weights", "", "a"), "--weights"),
        (("generate", "--weights", "a\0b", "a"), "--weights"),
        (("init", "d", "--target=--"), "--"),
        (("tune", "d", "--json=--"), "d does not exist"),
        (("tune", "d", "--json", "/no/such/place/x"), "--json: /no/such/place is no directory"),
        (("tune", "d", "--json", "/tmp"), "--json: /tmp is a directory"),
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


def test_a_stop_string_may_look_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(capsys, "--ignore-eos", PROMPT)["text"]
    for stop in ("--", "-x", "--json"):
        assert generate(capsys, "--ignore-eos", f"--stop={stop}", PROMPT)["text"] == text


def test_a_prompt_may_look_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, "--", "--json")["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("command", ["generate", "init", "demo", "info", "tune"])
def test_every_flag_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    for block in capsys.readouterr().out.split("\n  -")[1:]:
        flag, *words = block.split()
        assert len(words) > 3, flag


def test_the_version_and_the_exit_statuses_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--version")
    assert capsys.readouterr().out == f"pyramid-rt {pyramid_rt.__version__}\n"
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    assert [status for status in ("0  ", "2  ", "130", "141") if f"\n  {status}  " not in out] == []


def test_a_pyramid_that_was_never_tuned_is_said_once(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    plain = ("generate", "--weights", str(tiny_dir), "--device", "cpu", "--max-new-tokens", "2")
    assert run(*plain, "--json", "The") == 0
    err = capsys.readouterr().err
    assert err.startswith("pyramid-rt: this pyramid was never tuned: psd ")
    assert err.count("\n") == 1
    assert run(*plain, "--json", "--method", "sd", "The") == 0
    assert capsys.readouterr().err == ""
    tuned = Path(shutil.copytree(tiny_dir, tmp_path / "tuned"))
    names = {name: name for name in ("draft", "qualifier", "target")}
    (tuned / "pyramid.json").write_text(json.dumps(names | {"defaults": {"method": "ar"}}))
    assert run("generate", "--weights", str(tuned), "--max-new-tokens", "2", "--json", "The") == 0
    assert capsys.readouterr().err == ""


def test_what_tune_found_is_saved_though_its_report_cannot_be(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    directory, prompts = Path(shutil.copytree(tiny_dir, tmp_path / "pyramid")), tmp_path / "prompts.txt"
    prompts.write_text("The quick")
    short = ("--budget", "1", "--repeats", "1", "--max-new-tokens", "6", "--device", "cpu")
    assert run("tune", str(directory), "--prompts", str(prompts), *short, "--json", "/dev/full") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "/dev/full: cannot write it: No space left on device" in err
    assert json.loads((directory / "pyramid.json").read_text())["defaults"]["method"] in ("ar", "sd", "psd")


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
    marked = [line.split()[0] for line in out.splitlines() if " * " in line]
    assert len(marked) == 1
    assert marked[0] in ("ar", "sd", "psd")
    assert "\x1b" not in out


def test_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo = Path(shutil.copytree(pyramid_rt.demo_weights(), tmp_path / "demo"))
    assert run("info") == 0
    assert run("demo", "--max-new-tokens", "2", "--repeats", "1") == 0
    short = ("--dry-run", "--lossy", "--budget", "2", "--repeats", "1", "--max-new-tokens", "6")
    (tmp_path / "prompts.txt").write_text("def f(")
    assert run("tune", str(demo), "--prompts", str(tmp_path / "prompts.txt"), *short) == 0
    lines = capsys.readouterr().out.splitlines()
    # Rows have columns, which sentences that begin with a method's name have not.
    rows = ("draft ", "target ", "ar ", "psd_a ", "method ")
    tables = [line for line in lines if line.startswith(rows) and "  " in line]
    assert len(tables) >= 10
    assert max(map(len, tables)) <= 80
    assert "…" not in "".join(tables)


def test_the_end_of_the_context_is_told_from_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("generate", "--ignore-eos", "--method", "ar", "--max-seq", "40")
    assert run(*common, "--max-new-tokens", "500", "x = ") == 0
    assert "ended by length (the context of 40 is full)" in capsys.readouterr().err
    assert run(*common, "--max-new-tokens", "5", "x = ") == 0
    assert "ended by length ·" in capsys.readouterr().err
