"""`bench`: speeds on tiers whose seconds are made up, bytes against the weights, the table and the file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.positions import FakeClock, logits_of, pyramid_of, related
from rich.console import Console

from pyramid_rt import InputError, Pyramid, cli
from pyramid_rt.cli.bench_report import print_speeds, speeds_object
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.tuning.speeds import Case, Spread, default_lengths, measure_speeds, pass_bytes, random_prompt


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Pyramid:
    """A target of one second a pass, however wide, and a draft of 0.01 that is always right."""
    clock = FakeClock()
    for module in ("stats", "running"):
        monkeypatch.setattr(f"pyramid_rt.{module}.time", SimpleNamespace(perf_counter=clock))
    logits = [logits_of(tokens) for tokens in related([1.0], 2)]
    return pyramid_of(logits, [lambda width: 0.01, lambda width: 1.0], clock, defaults={"draft_length": 4})


def test_speeds_that_are_known(known: Pyramid) -> None:
    steps: list[str] = []
    found = measure_speeds(known, ["ar", "sd"], [8, 20], [1 + 4 * 5], repeats=3, on_step=steps.append)
    assert [(one.method, one.case.prompt, one.case.new) for one in found] == [
        ("ar", 8, 21), ("sd", 8, 21), ("ar", 20, 21), ("sd", 20, 21),
    ]  # fmt: skip
    for one in found:
        assert one.first_token.median == pytest.approx(1.0)
        assert one.prefill.median == pytest.approx(one.case.prompt)
        assert one.bandwidth is None
    # Plain: a token a second. Speculative: the draft reads the prompt, then 4 rounds of 5 tokens.
    sd = 20 / (0.01 + 4 * (4 * 0.01 + 1))
    assert [one.decode.median for one in found] == pytest.approx([1.0, sd, 1.0, sd])
    assert [one.ratio.median for one in found if one.ratio] == pytest.approx([1.0, sd, 1.0, sd])
    assert [one.tokens_per_target_forward for one in found] == [1.0, 5.0, 1.0, 5.0]
    # A B, A B: the methods take turns within each pair of lengths.
    run = [step for step in steps if "repeat" in step]
    assert run[:4] == [f"{m}, {p} + 21 tokens, repeat 1" for p in (8, 20) for m in ("ar", "sd")]
    assert len(run) == 12
    assert known.prefix_reuse is True


def test_spread_over_the_repeats() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == Spread(2.5, 1.0, 9.0)


def test_bytes_are_those_of_the_weights_that_a_pass_reads(tiny: Pyramid) -> None:
    for tier in tiny.tiers:
        assert isinstance(tier, ModelTier)
        config = tier.config
        assert not config.tie_word_embeddings
        layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
        expected = 4 * (config.num_layers * layer + 64 + config.vocab_size * 64)  # the embedding is looked up
        assert pass_bytes(tier) == expected
    [one] = measure_speeds(tiny, ["psd"], [10], [12], repeats=1)
    stats = tiny.generate(
        random_prompt(tiny, 10), method="psd", max_new_tokens=12, temperature=0.0, ignore_eos=True
    ).stats
    total = sum(
        tier.forwards * (pass_bytes(model) or 0) for tier, model in zip(stats.tiers, tiny.tiers, strict=True)
    )
    assert one.bandwidth is not None
    assert one.bandwidth.median == pytest.approx(total * one.decode.median / 11)


def test_prompts_are_the_same_each_time_and_ordinary(tiny: Pyramid) -> None:
    first, again = random_prompt(tiny, 300), random_prompt(tiny, 300)
    assert first == again
    assert len(first) == 300
    assert len(set(first)) > 100
    assert not set(first) & set(tiny.eos_token_ids)
    assert tiny.tokenizer is not None
    assert not set(first) & tiny.tokenizer.special_ids
    assert max(first) < tiny.vocab_size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ["sd", "sd"]}, "methods must be names, each once"),
        ({"methods": []}, "methods must be names, each once"),
        ({"methods": ["fast"]}, "unknown method 'fast'"),
        ({"methods": ["psd"]}, "needs 3 tiers"),
        ({"prompt_tokens": [0]}, "prompt_tokens must be"),
        ({"prompt_tokens": []}, "prompt_tokens must be one length or more"),
        ({"new_tokens": [1]}, "new_tokens must be"),
        ({"prompt_tokens": [90], "new_tokens": [7]}, "need 97 positions, and the context has 96"),
        ({"repeats": 0}, "repeats must be"),
    ],
    ids=str,
)
def test_bad_arguments(known: Pyramid, options: dict[str, Any], said: str) -> None:
    wanted: dict[str, Any] = {"methods": ["ar"], "prompt_tokens": [8], "new_tokens": [8], **options}
    with pytest.raises(InputError, match=said):
        measure_speeds(known, **wanted)


def test_default_lengths_fit_the_context() -> None:
    assert default_lengths(4096, None) == ([128, 512], [128])
    assert default_lengths(600, None) == ([128], [128])
    assert default_lengths(600, [88]) == ([128, 512], [88])
    assert default_lengths(40, None) == ([10], [20])


def test_the_table_fits_eighty_columns(known: Pyramid) -> None:
    found = measure_speeds(known, ["ar", "sd"], [8], [21], repeats=2)
    out = io.StringIO()
    print_speeds(Console(file=out, width=80), found, 2)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["8", "21", "ar", "1000.0", "8", "0", "1.0", "0", "1.00", "1.00", "–"]
    assert lines[3].split() == ["sd", "1000.0", "8", "0", "4.8", "0", "4.80", "5.00", "–"]


def test_wide_numbers_fit_too() -> None:
    from pyramid_rt.tuning.speeds import Speed

    def spread(value: float) -> Spread:
        return Spread(value, 0.5 * value, 1.5 * value)

    first, prefill, decode, ratio, read = map(spread, (123.4, 123456, 12345.6, 12.3, 4.1e12))
    one = Speed("psd_f", Case(131072, 8192), first, prefill, decode, ratio, read, 12.3)
    out = io.StringIO()
    print_speeds(Console(file=out, width=80), [one], 3)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    expected = "131072 8192 psd_f 123400.0 123456 50 12345.6 50 12.30 12.30 4100.0"
    assert lines[2].split() == expected.split()


def test_the_command_line_writes_a_file_with_what_it_was_measured_on(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speeds.json"
    argv = ["bench", str(tiny_dir), "--device=cpu", "--prompt-tokens=9,17", "--new-tokens=6", "--repeats=2"]
    assert cli.main([*argv, "--methods=ar,psd_f", "--json", str(file)]) == 0
    assert "prefill" in capsys.readouterr().out
    content = json.loads(file.read_text())
    environment = content["environment"]
    assert environment.keys() >= {"device", "processor", "torch", "threads", "dtype"}
    assert (environment["device"], environment["dtype"]) == ("cpu", "float32")
    assert [(one["method"], one["case"]["prompt"]) for one in content["speeds"]] == [
        ("ar", 9), ("psd_f", 9), ("ar", 17), ("psd_f", 17),
    ]  # fmt: skip
    assert all(one["bandwidth"]["median"] > 0 for one in content["speeds"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt-tokens=1,x"], "expected whole numbers by commas, found '1,x'"),
        (["--methods=ar,fast"], "unknown method 'fast'"),
        (["--json=/no/such/place/x.json"], "--json: /no/such/place is no directory"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(
    tiny_dir: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(tiny_dir), "--device=cpu", *argv]) == 2
    assert said in capsys.readouterr().err


def test_the_object_of_a_pyramid_that_is_no_directory(known: Pyramid) -> None:
    content = speeds_object(known, measure_speeds(known, ["ar"], [4], [4], repeats=1), 1)
    assert content["environment"]["dtype"] is None
    json.dumps(content, allow_nan=False)
