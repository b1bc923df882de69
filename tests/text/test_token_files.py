"""Tokens that stand in the files beside tokenizer.json: the ids, texts and names of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.vocabularies import byte_fallback, byte_level, with_bos, write_tokenizer

from pyramid_rt.errors import TokenizerError, WeightsError
from pyramid_rt.text.token_files import read_token_files
from pyramid_rt.text.tokenizer import Tokenizer

FLAT = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
NAMES = "|".join(
    f"{{{{ {name}_token }}}}" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image")
)
KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bytes": lambda: with_bos(byte_level()),
    "bytes, no bos": byte_level,
    "fallback": lambda: with_bos(byte_fallback()),
    "fallback, metaspace": lambda: with_bos(byte_fallback(metaspace=True)),
    "fallback, bare": lambda: with_bos(byte_fallback(prepend=False), eos=True),
}


def settings(**more: Any) -> dict[str, Any]:
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return {**base, "chat_template": NAMES, **more}


def declared(n: int, *tokens: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {str(n + i): {"content": content, **FLAT, **flags} for i, (content, flags) in enumerate(tokens)}


def typed(content: str, **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, **FLAT, **flags}


# What a directory holds beside tokenizer.json, given the size of its vocabulary.
LAYOUTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "nothing added": lambda n: {"tokenizer_config": settings()},
    "special": lambda n: {
        "tokenizer_config": settings(added_tokens_decoder=declared(n, ("<|a|>", {}), ("<|b|>", {})))
    },
    "out of order": lambda n: {
        "tokenizer_config": settings(
            added_tokens_decoder=dict(reversed(declared(n, ("<|a|>", {}), ("<|b|>", {})).items()))
        )
    },
    "lstrip, rstrip": lambda n: {
        "tokenizer_config": settings(
            added_tokens_decoder=declared(n, ("<|a|>", {"lstrip": True}), ("<|b|>", {"rstrip": True}))
        )
    },
    "single word": lambda n: {
        "tokenizer_config": settings(
            added_tokens_decoder=declared(n, ("cat", {"single_word": True, "special": False}), ("<|b|>", {}))
        )
    },
    "normalized": lambda n: {
        "tokenizer_config": settings(
            added_tokens_decoder=declared(
                n, ("<|a|>", {"normalized": True, "special": False}), ("two words", {"normalized": True})
            )
        )
    },
    "other flags than tokenizer.json": lambda n: {
        "tokenizer_config": settings(
            added_tokens_decoder={"1": {"content": "</s>", **FLAT, "lstrip": True, "rstrip": True}}
        )
        if n > 350
        else settings(added_tokens_decoder={"2": {"content": "</s>", **FLAT, "lstrip": True}})
    },
    "pad that is nowhere": lambda n: {"tokenizer_config": settings(pad_token="<|a|>")},
    "names as objects": lambda n: {
        "tokenizer_config": settings(bos_token=typed("<s>"), pad_token=typed("<|a|>", rstrip=True))
    },
    "additional": lambda n: {
        "tokenizer_config": settings(additional_special_tokens=["<|a|>", typed("<|b|>", lstrip=True)])
    },
    "extra": lambda n: {"tokenizer_config": settings(extra_special_tokens=["<|a|>", "<s>"])},
    "extra by name": lambda n: {"tokenizer_config": settings(extra_special_tokens={"image_token": "<|a|>"})},
    "a name of its own": lambda n: {"tokenizer_config": settings(image_token="<|b|>")},
    "split": lambda n: {"tokenizer_config": settings(split_special_tokens=True)},
    "the older files": lambda n: {
        "tokenizer_config": settings(),
        "special_tokens_map": {"bos_token": "<s>", "pad_token": {"content": "<|a|>", **FLAT, "lstrip": True}},
        "added_tokens": {"<|a|>": n, "<|b|>": n + 1},
    },
    "the older files, names only": lambda n: {
        "tokenizer_config": settings(),
        "special_tokens_map": {"unk_token": "<|b|>", "additional_special_tokens": ["<|a|>"]},
    },
    "older files that do not count": lambda n: {
        "tokenizer_config": settings(added_tokens_decoder=declared(n, ("<|a|>", {}))),
        "special_tokens_map": {"pad_token": "<|b|>"},
        "added_tokens": {"<|b|>": n + 7},
    },
    "a word that is made special": lambda n: {"tokenizer_config": settings(unk_token="a")},
}
TEXTS = [
    "", "the cat", "<|a|>the cat<|b|>", " <|a|>  the <|b|> cat ", "x<|a|><|b|>\n<s>y</s> z", "<s>the cat",
    "concat cat cats two words", "caté <|a|><|a|> 世界 </s>", "[PAD]a b",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_transformers(tmp_path: Path, kind: str, layout: str) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    core = KINDS[kind]()
    write_tokenizer(tmp_path, core, **LAYOUTS[layout](core.get_vocab_size()))
    theirs, ours = auto.from_pretrained(tmp_path), Tokenizer.from_dir(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        for added in (True, False):
            expected = theirs(text, add_special_tokens=added).input_ids
            assert ours.encode(text, added) == expected, (text, added)
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    special = {index for index, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == special
    chat = [{"role": "user", "content": "the cat"}]
    assert ours.render_chat(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_padding_of_tokenizer_json_names_its_token(tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    core = byte_level()
    core.enable_padding(pad_token="[PAD]", pad_id=3)
    write_tokenizer(tmp_path, core, tokenizer_config=settings())
    theirs, ours = auto.from_pretrained(tmp_path), Tokenizer.from_dir(tmp_path)
    assert ours.encode("a[PAD] b") == theirs("a[PAD] b", padding=False).input_ids


def write(directory: Path, **files: Any) -> Path:
    return write_tokenizer(directory, byte_level(), **files)


N = byte_level().get_vocab_size()
CONTRADICTIONS = [
    (
        {"tokenizer_config": settings(added_tokens_decoder=declared(N + 5, ("<|a|>", {})))},
        ["tokenizer_config.json, 'added_tokens_decoder'", f"'<|a|>' has the id {N + 5} there, but {N} by", "er.json"],
    ),
    (
        {"tokenizer_config": settings(added_tokens_decoder=declared(0, ("<|a|>", {})))},
        ["tokenizer_config.json", "'<|a|>' has the id 0 there", "tokenizer.json", "where 0 is '<s>'"],
    ),
    (
        {"tokenizer_config": settings(added_tokens_decoder=declared(9, ("</s>", {})))},
        ["'</s>' has the id 9 there, but 1 by"],
    ),
    (
        {"tokenizer_config": settings(), "added_tokens": {"<s>": 4}},
        ["added_tokens.json", "'<s>' has the id 4 there, but 0 by", "tokenizer.json"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("files", "words"), CONTRADICTIONS)
def test_files_that_contradict_each_other_are_named(
    tmp_path: Path, files: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(WeightsError) as caught:
        Tokenizer.from_dir(write(tmp_path, **files))
    for part in words:
        assert part in str(caught.value)


def test_a_name_with_two_meanings_is_refused_where_a_template_wants_it(tmp_path: Path) -> None:
    files = {"tokenizer_config": settings(), "special_tokens_map": {"eos_token": "<s>", "pad_token": "</s>"}}
    tokenizer = Tokenizer.from_dir(write(tmp_path, **files))
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(WeightsError) as caught:
        tokenizer.render_chat([{"role": "user", "content": "a"}])
    for part in (
        "uses eos_token",
        "tokenizer_config.json says eos_token is '</s>'",
        "special_tokens_map.json says '<s>'",
    ):
        assert part in str(caught.value)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert Tokenizer.from_dir(tmp_path).render_chat([{"role": "user", "content": "a"}]) == "<s>a"


def deep(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": settings(added_tokens_decoder=[])}, "'added_tokens_decoder' must be an object"),
        ({"tokenizer_config": settings(added_tokens_decoder={"x": {}})}, "expected ids with objects, found 'x'"),
        ({"tokenizer_config": settings(added_tokens_decoder={"9" * 5000: {"content": "a"}})}, "found '999"),
        ({"tokenizer_config": settings(added_tokens_decoder={"9": {}})}, "'9': 'content' must be a string"),
        (
            {"tokenizer_config": settings(added_tokens_decoder={"9": {"content": "a", "lstrip": 1}})},
            "'lstrip' must be true or false",
        ),
        ({"tokenizer_config": settings(pad_token=deep(900))}, "'pad_token' must be a string or an object"),
        ({"tokenizer_config": settings(pad_token=3)}, "'pad_token' must be a string or an object"),
        ({"tokenizer_config": settings(additional_special_tokens="<a>")}, "must be a list, found '<a>'"),
        ({"tokenizer_config": settings(), "added_tokens": {"<a>": "7"}}, "must be an integer >= 0, found '7'"),
        ({"tokenizer_config": settings(), "special_tokens_map": {"pad_token": []}}, "special_tokens_map.json"),
    ],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        Tokenizer.from_dir(write(tmp_path, **files))
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a":' * 100_000, b"\xff"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name}\.json: (not valid JSON|expected a JSON object)"):
        Tokenizer.from_dir(tmp_path)


# The library's own failures.


def broken(tmp_path: Path, **sections: Any) -> Path:
    spec = json.loads(byte_level().to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **sections}))
    return tmp_path


def test_a_panic_at_a_file_is_an_error(tmp_path: Path) -> None:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer: .*broke down"):
        Tokenizer.from_dir(broken(tmp_path, normalizer=normalizer))


def test_a_panic_at_a_text_is_an_error(tmp_path: Path) -> None:
    template = [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": template, "pair": [], "special_tokens": {}}
    tokenizer = Tokenizer.from_dir(broken(tmp_path, post_processor=processor))
    with pytest.raises(TokenizerError, match=r"prompt: the tokenizer .*tokenizer\.json fails at this text"):
        tokenizer.encode("abc")


def test_a_panic_at_ids_is_an_error(tmp_path: Path) -> None:
    decoder = {"type": "Strip", "content": "a", "start": 3, "stop": 3}
    tokenizer = Tokenizer.from_dir(broken(tmp_path, decoder=decoder))
    ids = tokenizer.encode("a")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json fails at ids"):
        tokenizer.decode(ids)


def test_a_missing_unknown_token_is_an_error(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<none>"}
    tokenizer = Tokenizer.from_dir(broken(tmp_path, model=model, added_tokens=[], post_processor=None))
    with pytest.raises(TokenizerError, match="fails at this text"):
        tokenizer.encode("zz")


@pytest.mark.parametrize("index", [2**31, -1, 2**24])
def test_an_id_that_no_tokenizer_has_is_refused_before_the_library_sees_it(
    tmp_path: Path, index: int
) -> None:
    """The library would make a table of that many entries, and abort the process."""
    spec: dict[str, Any] = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
    spec["added_tokens"] = [{"id": index, "content": "<x>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(WeightsError, match=r"tokenizer\.json: token '<x>' has the id"):
        read_token_files(tmp_path)
    spec = {"model": {"type": "BPE", "vocab": {"a": index}, "merges": []}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(WeightsError, match=r"token 'a' has the id"):
        read_token_files(tmp_path)
