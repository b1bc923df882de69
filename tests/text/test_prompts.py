"""Files of prompts: what they mean, and how a bad one is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyramid_rt import InputError, Pyramid
from pyramid_rt.text.prompts import FilePrompt, encode, read_prompts


def contents(file: Path, data: bytes) -> list[object]:
    file.write_bytes(data)
    return [prompt.content for prompt in read_prompts(file)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"one prompt", ["one prompt"]),
        (b"one prompt\n", ["one prompt"]),
        (b"def f():\n\n", ["def f():\n"]),
        (b"a\nb\n---\nc\n", ["a\nb", "c"]),
        (b"a\r\nb\r\n---\r\nc", ["a\nb", "c"]),
        (b"a\n---\nb\n---\n", ["a", "b"]),
        (b"a\n---\nb\n---\n\n", ["a", "b"]),
        (b"a\n\n---\n\nb", ["a\n", "\nb"]),
        (b"a\n --- \n----\nb\x0cc\n", ["a\n --- \n----\nb\x0cc"]),
        ("ä\n---\n\u2028x".encode(), ["ä", "\u2028x"]),
    ],
)
def test_plain_text(tmp_path: Path, data: bytes, expected: list[str]) -> None:
    assert contents(tmp_path / "prompts.txt", data) == expected


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    data = b'{"prompt": "a\\n---\\n"}\n\n{"messages": [{"role": "user", "content": "b"}], "id": 3}\n'
    assert contents(tmp_path / name, data) == ["a\n---\n", [{"role": "user", "content": "b"}]]
    assert [prompt.where for prompt in read_prompts(tmp_path / name)] == [
        f"{tmp_path / name}, line 1",
        f"{tmp_path / name}, line 3",
    ]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", b"", "p.txt: expected at least one prompt, found none"),
        ("p.txt", b" \n\n", "p.txt: expected at least one prompt"),
        ("p.txt", b"a\n---\n \n---\nb", "p.txt, line 3: the prompt is empty"),
        ("p.txt", b"---\nb", "p.txt, line 1: the prompt is empty"),
        ("p.txt", b"ab\xff", "not UTF-8 (byte 2)"),
        ("p.jsonl", b"\n", "expected at least one prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b'"a"', 'line 1: expected an object with either "prompt" or "messages", found "a"'),
        ("p.jsonl", b'{"text": "a"}', 'found {"text": "a"}'),
        ("p.jsonl", b'{"prompt": "a", "messages": []}', "either"),
        ("p.jsonl", b'{"prompt": ""}', '"prompt" must be a text, found ""'),
        ("p.jsonl", b'{"prompt": 3}', "found 3"),
        ("p.jsonl", b'{"messages": []}', '"messages" must be a list of objects'),
        ("p.jsonl", b'{"messages": ["a"]}', '"messages" must be a list of objects'),
        ("p.jsonl", b'{"prompt": [' + b"1, " * 99 + b"1]}", "1, 1,..."),
    ],
)
def test_a_bad_file_is_refused_by_name_and_line(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        contents(tmp_path / name, data)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read it"):
        read_prompts(tmp_path / name)


def test_encoding_names_the_place(tiny: Pyramid) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    assert encode(FilePrompt("here", "ab"), tokenizer, 8) == tokenizer.encode("ab")
    chat = [{"role": "user", "content": "a"}]
    assert encode(FilePrompt("here", chat), tokenizer, 99) == tokenizer.encode_chat(chat)
    with pytest.raises(InputError, match="here: the prompt has 7 tokens; expected 1 to 6, as max_seq is 8"):
        encode(FilePrompt("here", "abcdefg"), tokenizer, 8)
    with pytest.raises(InputError, match=r"^here: .*surrogate"):
        encode(FilePrompt("here", "\udcff"), tokenizer, 8)
    with pytest.raises(InputError, match=r"^here: "):
        encode(FilePrompt("here", [{"role": "user"}]), tokenizer, 99)


def test_what_is_no_text_is_refused_at_once(tmp_path: Path) -> None:
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"deep\.jsonl, line 1: nested too deep"):
        read_prompts(deep)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="expected a file"):
        read_prompts(pipe)
    with pytest.raises(InputError, match="expected a file"):
        read_prompts("/dev/zero")
