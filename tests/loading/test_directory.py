"""Weights directories: where the tiers are, whether they fit together, and what `init` writes."""

from __future__ import annotations

import json
import logging
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

import pyramid_rt
from pyramid_rt.errors import WeightsError
from pyramid_rt.loading.directory import PyramidDirectory, check_family, init
from pyramid_rt.text.tokenizer import Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Config:
    vocab_size: int


def model_dir(path: Path, words: str = "a b c d e", **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    core = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words.split())}, "a"))
    (path / "tokenizer.json").write_text(core.to_str())
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


def pyramid_file(path: Path, content: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "pyramid.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_subdirectories_small_to_large(tmp_path: Path) -> None:
    for name in ("target", "draft", "qualifier"):
        model_dir(tmp_path / name)
    (tmp_path / "README.md").touch()
    found = PyramidDirectory.open(str(tmp_path))
    assert list(found.tiers.items()) == [(n, tmp_path / n) for n in ("draft", "qualifier", "target")]
    assert found.defaults == {}


def test_fewer_tiers_are_fine(tmp_path: Path) -> None:
    model_dir(tmp_path / "target")
    model_dir(tmp_path / "draft")
    assert list(PyramidDirectory.open(tmp_path).tiers) == ["draft", "target"]


def test_a_plain_model_is_the_target(tmp_path: Path) -> None:
    assert PyramidDirectory.open(model_dir(tmp_path)).tiers == {"target": tmp_path}


def test_pyramid_file_with_relative_and_absolute_paths(tmp_path: Path) -> None:
    model_dir(tmp_path / "small")
    large = model_dir(tmp_path / "elsewhere" / "large")
    defaults = {"method": "sd", "draft_length": 3, "target_threshold": 1, "qualifier_threshold": 0.25}
    file = {"target": str(large), "draft": "../small", "defaults": defaults}
    found = PyramidDirectory.open(pyramid_file(tmp_path / "p", file))
    assert list(found.tiers) == ["draft", "target"]
    assert found.tiers["draft"].resolve() == tmp_path / "small"
    assert found.tiers["target"] == large
    assert found.defaults == defaults
    assert isinstance(found.defaults["target_threshold"], float)


def test_pyramid_file_wins_over_subdirectories(tmp_path: Path) -> None:
    for name in ("draft", "target", "other"):
        model_dir(tmp_path / name)
    assert PyramidDirectory.open(pyramid_file(tmp_path, {"target": "other"})).tiers == {
        "target": tmp_path / "other"
    }


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere does not exist"):
        PyramidDirectory.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"file is a file; expected a weights directory"):
        PyramidDirectory.open(tmp_path / "file")
    with pytest.raises(WeightsError, match=r"holds no model"):
        PyramidDirectory.open(tmp_path)


@pytest.mark.parametrize("plain", [False, True])
def test_missing_target(tmp_path: Path, plain: bool) -> None:
    model_dir(tmp_path / "draft")
    if plain:  # a model beside tiers: what is meant is not for us to guess
        model_dir(tmp_path)
    with pytest.raises(WeightsError, match=r"target: the target tier is missing; found only draft"):
        PyramidDirectory.open(tmp_path)


def test_a_tier_without_a_model(tmp_path: Path) -> None:
    model_dir(tmp_path / "target")
    (tmp_path / "draft").mkdir()
    with pytest.raises(WeightsError, match=r"tier 'draft': .*draft holds no config\.json"):
        PyramidDirectory.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ({"draft": "."}, "target tier is missing; found only draft"),
        ({"target": 3}, "'target' must be the path"),
        ({"target": ""}, "'target' must be the path"),
        ({"target": "gone"}, "tier 'target': .*gone does not exist"),
        ({"target": "pyramid.json"}, "tier 'target': .*is a file"),
        ({"target": ".", "tagret": "."}, "unknown keys 'tagret'"),
        ({"target": ".", "defaults": []}, "'defaults' must be a JSON object"),
        ({"target": ".", "defaults": {"draft_lenght": 3}}, "unknown keys 'draft_lenght'"),
        ({"target": ".", "defaults": {"draft_length": 3.5}}, "'draft_length' must be of type int, found 3.5"),
        ({"target": ".", "defaults": {"draft_length": True}}, "must be of type int, found True"),
        ({"target": ".", "defaults": {"target_threshold": "0.4"}}, "must be of type float, found '0.4'"),
        ({"target": ".", "defaults": {"target_threshold": None}}, "must be of type float"),
        ('{"target": ".", "defaults": {"target_threshold": NaN}}', "NaN is no JSON number"),
    ],
)
def test_bad_pyramid_file_is_named(tmp_path: Path, content: Any, words: str) -> None:
    model_dir(tmp_path)
    with pytest.raises(WeightsError, match=words) as caught:
        PyramidDirectory.open(pyramid_file(tmp_path, content))
    assert str(tmp_path) in str(caught.value)


# Families.


def test_padding_rows_may_differ(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir(tmp_path))
    names = ("draft", "qualifier", "target")
    configs = dict(zip(names, (Config(8), Config(5), Config(128)), strict=True))
    assert check_family(dict.fromkeys(names, tokenizer), configs) == 5


def test_too_few_rows_for_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir(tmp_path))
    with pytest.raises(WeightsError, match=r"tier 'draft' .* has 4 rows, but its tokenizer has ids up to 4"):
        check_family({"draft": tokenizer, "target": tokenizer}, {"draft": Config(4), "target": Config(8)})


def added(path: Path, *tokens: str) -> Tokenizer:
    """The tokenizer of a model directory, with added tokens."""
    core = tokenizers.Tokenizer.from_file(str(model_dir(path) / "tokenizer.json"))
    core.add_tokens(list(tokens))
    (path / "tokenizer.json").write_text(core.to_str())
    return Tokenizer.from_dir(path)


def test_added_tokens_without_a_row_in_the_target_are_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = added(tmp_path, "[PAD]", "[MASK]")
    tiers = {"draft": tokenizer, "target": tokenizer}
    for rows, shared in (((5, 5), 5), ((9, 6), 6), ((6, 5), 5)):
        configs = {name: Config(count) for name, count in zip(tiers, rows, strict=True)}
        with caplog.at_level(logging.WARNING, logger="pyramid_rt.loading"):
            assert check_family(tiers, configs) == shared
    assert "rows, its tokenizer ids up to 6: those beyond are added tokens" in caplog.text
    # A token that the target can produce needs a row in the draft; an ordinary one is what text becomes.
    for rows in ((5, 7), (4, 4)):
        configs = {name: Config(count) for name, count in zip(tiers, rows, strict=True)}
        with pytest.raises(WeightsError, match=rf"tier 'draft' .* has {rows[0]} rows"):
            check_family(tiers, configs)


def test_tiers_that_differ_are_named(tmp_path: Path) -> None:
    target = Tokenizer.from_dir(model_dir(tmp_path / "t"))
    draft = Tokenizer.from_dir(model_dir(tmp_path / "d", "a b X d e"))
    with pytest.raises(WeightsError, match=r"tiers 'draft' .*d\) and 'target' .*id.* 2: 'X' against 'c'"):
        check_family({"draft": draft, "target": target}, {"draft": Config(8), "target": Config(8)})


# init.


def test_init_writes_what_open_reads(tmp_path: Path) -> None:
    target = model_dir(tmp_path / "far" / "target", vocab_size=64)
    draft = model_dir(tmp_path / "p" / "small")
    file = init(tmp_path / "p", target, draft=draft)
    assert json.loads(file.read_text()) == {"draft": "small", "target": str(target)}
    found = PyramidDirectory.open(tmp_path / "p")
    assert {name: path.resolve() for name, path in found.tiers.items()} == {"draft": draft, "target": target}
    assert sorted(entry.name for entry in (tmp_path / "p").iterdir()) == ["pyramid.json", "small"]
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((draft / "config.json").stat().st_mode)


def test_init_with_paths_relative_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    init("p", "m")
    assert PyramidDirectory.open("p").tiers["target"].samefile(tmp_path / "m")


def test_init_replaces_only_by_force(tmp_path: Path) -> None:
    first, second = model_dir(tmp_path / "a"), model_dir(tmp_path / "b")
    file = init(tmp_path, first)
    with pytest.raises(WeightsError, match=r"pyramid\.json exists already"):
        init(tmp_path, second)
    assert json.loads(file.read_text()) == {"target": "a"}
    init(tmp_path, second, force=True)
    assert json.loads(file.read_text()) == {"target": "b"}


def test_init_writes_nothing_when_tiers_do_not_fit(tmp_path: Path) -> None:
    target, draft = model_dir(tmp_path / "t"), model_dir(tmp_path / "d", "a b c d f")
    with pytest.raises(WeightsError, match="different tokenizers"):
        init(tmp_path / "p", target, draft=draft)
    with pytest.raises(WeightsError, match=r"tier 'qualifier': .*q does not exist"):
        init(tmp_path / "p", target, qualifier=tmp_path / "q")
    assert not (tmp_path / "p").exists()


def test_init_says_when_a_tier_is_no_smaller_than_the_one_above(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    demo = pyramid_rt.demo_weights()
    init(tmp_path / "right", target=demo / "target", draft=demo / "draft")
    assert not caplog.records
    init(tmp_path / "wrong", target=demo / "draft", draft=demo / "target")
    assert [record.getMessage() for record in caplog.records] == [
        "the draft has 11,015,040 parameters, the target 2,410,368: a tier no smaller than the one above it brings "
        "no speed"
    ]
