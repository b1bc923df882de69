"""Python among the demo's completions, the ends of prefixes, and the measure of agreement."""

from __future__ import annotations

import codeop
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.demo_training import evaluation as demo_eval
from bench.demo_training.card import PAIRS, TIERS, add_completions, model_card, write_card
from bench.demo_training.evaluation import (
    ALLOW_INCOMPLETE_INPUT,
    Verdict,
    count_statements,
    first_lines,
    is_open,
    judge,
    judge_to_end,
    measure_held_out,
    parse,
    prefix_of,
    prefixes,
    true_continuations,
)

TEN = "".join(f"x{i} = {i}\n" for i in range(10))


NINE = "".join(f"x{i} = {i}\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "parses", "valid"),
    [
        (TEN, True, True),
        (TEN + "and whatever ( follows", True, True),  # the eleventh line is not judged
        ("\n\n" + TEN.replace("\n", "\n\n"), True, True),  # blank lines are not counted
        # What the tenth line leaves open may be finished by the thirtieth, not later, and not with an error.
        (NINE + "def f(\n    a):\n    pass\n", False, True),
        (NINE + "try:\n    x = 1\nfinally:\n    y = 2\n", False, True),
        (NINE + "f(\n" + "    1,\n" * 19 + ")\n", False, True),
        (NINE + "f(\n" + "    1,\n" * 20 + ")\n", False, False),
        (NINE + "def f(\n    a:\n    pass\n", False, False),
        (NINE + "def f(\n    a, b", False, False),  # never finished
        # Errors at the first and at the tenth line.
        ("x = = 1\n" + TEN, False, False),
        (NINE + "x = )\n" + TEN, False, False),
        (NINE + "    x = 1\n" + TEN, False, False),
        # Nothing that is easy to write without being Python passes.
        ("", False, False),
        ("\n" * 50, False, False),
        (NINE, False, False),
        ("# a comment\n" * 40, False, False),
        ('"""A docstring.\n' + "Some words.\n" * 8 + '"""\n', False, False),
        ('def f():\n    """A docstring.\n' + "    Some words.\n" * 8 + '    """\n', False, False),
        ('"""A docstring.\n' + "Some words.\n" * 40, False, False),
        ("'a'\n" * 40, False, False),
        ("some words\n" * 40, False, False),
        (" x = 1\n" * 40, False, False),
    ],
)
def test_the_verdict(text: str, parses: bool, valid: bool) -> None:
    verdict = judge_to_end(text)
    assert (verdict.parses, verdict.valid) == (parses, valid)


def test_a_verdict_waits_for_the_lines_that_decide() -> None:
    assert judge(NINE) is None
    assert judge(NINE + "f(\n") is None
    assert judge(NINE + "f(\n)\n") == Verdict(False, True, 1.0)
    assert judge(NINE + "f)\n") == Verdict(False, False, 1.0)


def test_repetition_shows() -> None:
    assert judge(TEN) == Verdict(True, True, 1.0)
    assert judge("x = 1\n" * 10) == Verdict(True, True, 0.1)
    assert judge_to_end("").distinct == 0.0
    assert judge_to_end("x\nx\n").distinct == 0.5


def test_ten_lines_are_cut_at_the_tenth_that_is_not_blank() -> None:
    assert first_lines("a\n\nb\n  \nc\nd\n", 3) == ["a", "", "b", "  ", "c"]
    assert first_lines("a\nb", 3) is None


def test_open_means_only_too_short() -> None:
    assert codeop.PyCF_ALLOW_INCOMPLETE_INPUT == ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]
    for text in ("def f():\n", "x = (1,\n", '"""abc\n', "@cache\n", "try:\n    x = 1\n"):
        assert is_open(text), text
    for text in ("x = 1\n", "def f(:\n", "x = )\n", "for i in x\n    y\n", "x = 'abc\n"):
        assert not is_open(text), text


def test_bare_strings_are_no_statements() -> None:
    assert count_statements(parse('"""doc"""\ndef f():\n    """doc"""\n    return 1\n')) == 2
    assert count_statements(parse("x = (")) == 0


SOURCE = "import os\n\n\n@decorated\ndef f():\n    return os\n\n\n" + TEN + "\n\ndef g():\n    pass\n"


def words(text: str) -> list[str]:
    return text.split()


def test_a_prefix_ends_where_a_statement_begins() -> None:
    seen = set()
    for choice in np.linspace(0, 0.999, 40):
        prefix = prefix_of(SOURCE, words, float(choice))
        assert prefix is not None
        assert SOURCE.startswith(prefix)  # all of it fits
        assert parse(prefix) is not None
        rest = SOURCE[len(prefix) :]
        assert first_lines(rest) is not None
        assert not rest[0].isspace()
        seen.add(rest.split("\n", 1)[0])
    assert "@decorated" in seen  # not between a decorator and its function
    assert "def f():" not in seen
    assert "x0 = 0" in seen
    assert "x4 = 4" not in seen  # nine lines or fewer behind it


def test_a_prefix_has_as_many_statements_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_eval, "PREFIX_TOKENS", 6)
    source = "".join(f"y{i} = {i}\n" for i in range(30))
    prefix = prefix_of(source, words, 0.5)
    assert prefix is not None
    assert len(prefix.splitlines()) == 2  # three words each
    assert prefix in source
    long = "z = [" + " 1, " * 20 + "]\n"
    assert prefix_of(long + TEN, words, 0.0) is None or long not in str(prefix_of(long + TEN, words, 0.0))


def test_prefixes_differ_and_come_with_what_follows_them() -> None:
    documents = [SOURCE, SOURCE.replace("x", "longer"), "def broken(:\n"]
    starts = prefixes(documents, words, 4, 1)
    assert len(set(starts)) == 4
    assert starts == prefixes(documents, words, 4, 1)
    for prefix, rest in zip(starts, true_continuations(documents, starts), strict=True):
        assert prefix + rest in documents
        assert judge_to_end(rest).valid


class Table:
    """A model whose logits follow from the last token alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits_of = logits

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.logits_of[input_ids]})


def test_agreement_overlap_and_loss_on_a_stream() -> None:
    generator = torch.Generator().manual_seed(1)
    tables = {tier: torch.randn(8, 8, generator=generator) for tier in TIERS}
    tables["qualifier"] = tables["target"].clone()
    tables["draft"] = tables["target"] + tables["draft"]
    stream = np.random.default_rng(2).integers(0, 8, 101).astype(np.uint16)
    found = measure_held_out({t: Table(x) for t, x in tables.items()}, stream, 250, 32)
    rows = {tier: torch.log_softmax(table, -1).double() for tier, table in tables.items()}
    here, after = stream[:-1].astype(int), stream[1:].astype(int)
    nats = -float(rows["draft"][here, after].mean())
    assert found["nats_per_token"]["draft"] == pytest.approx(nats, abs=1e-4)
    assert found["bits_per_byte"]["draft"] == pytest.approx(nats * 100 / np.log(2) / 250, abs=1e-4)
    same = float((rows["draft"].argmax(-1) == rows["target"].argmax(-1))[here].float().mean())
    assert found["agreement"]["draft/target"] == pytest.approx(same, abs=1e-4)
    assert 0 < same < 1
    assert found["agreement"]["qualifier/target"] == found["overlap"]["qualifier/target"] == 1.0
    kept = float(torch.minimum(rows["draft"].exp(), rows["target"].exp()).sum(-1)[here].mean())
    assert found["overlap"]["draft/target"] == pytest.approx(kept, abs=1e-4)


def report() -> dict[str, Any]:
    pairs = {"/".join(pair): 0.5 for pair in PAIRS}
    held = {
        "nats_per_token": dict.fromkeys(TIERS, 3.25),
        "bits_per_byte": dict.fromkeys(TIERS, 1.5),
        "agreement": pairs,
        "overlap": pairs,
    }
    size = {"hidden": 1, "layers": 2, "heads": 3, "kv_heads": 1, "parameters": 10**6, "file_bytes": 2 * 10**6}
    corpus: dict[str, Any] = {
        f"{part}_{what}": 7
        for part in ("train", "held_out", "held_out_package")
        for what in ("files", "bytes", "tokens")
    }
    package = {"name": "somepackage", "version": "1.2", "licence": "MIT", "files": 3, "bytes": 9, "tokens": 4}
    shares = {"parses": 0.25, "valid": 0.375, "distinct": 0.875}
    return {
        "python": "3.11",
        "hardware": "a machine",
        "command": "python -m bench.demo_training",
        "remarks": ["A remark."],
        "stages": {"target": {"steps": 10, "tokens": 123_000_000, "minutes": 4.0}},
        "corpus": {**corpus, "packages": [package]},
        "tiers": dict.fromkeys(TIERS, size),
        "held_out": held,
        "held_out_packages": held,
        "own_greedy": pairs,
        "own_sampled": pairs,
        "completions": {
            "prefixes": 96,
            "held_out_text_itself": shares,
            "methods": {"ar": shares, "sd": shares},
        },
    }


def test_the_card_says_what_was_measured() -> None:
    card = model_card(report())
    assert "| somepackage | 1.2 | MIT | 3 |" in card
    assert "| `sd` | lossless | 0.25 | 0.38 | 0.88 |" in card
    assert "123.0 M tokens" in card
    assert "A remark." in card
    assert "    python -m bench.demo_training\n" in card
    without = {key: value for key, value in report().items() if key != "completions"}
    assert "## Completions" not in model_card(without)


def test_completions_come_into_a_card_once(tmp_path: Path) -> None:
    whole = report()
    write_card({key: value for key, value in whole.items() if key != "completions"}, tmp_path)
    for _ in range(2):
        add_completions(whole, tmp_path)
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card(whole)
    (tmp_path / "README.md").write_text("# Another card\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Data and training"):
        add_completions(whole, tmp_path)
