"""Prompts of every kind as token ids, and what is said of everything that is none."""

from __future__ import annotations

import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.vocabularies import byte_level, with_bos, write_tokenizer

import pyramid_rt
from pyramid_rt import InputError, Options, Pyramid
from pyramid_rt.text.encoding import encode_prompt, split_stops, token_ids
from pyramid_rt.text.tokenizer import Tokenizer

SETTINGS = {
    "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
}
USER = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "the"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    settings = {**SETTINGS, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    directory = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_dir(write_tokenizer(directory, with_bos(byte_level()), tokenizer_config=settings))


IDS = [5, 0, 7]


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        array.array("q", IDS),
        np.array(IDS),
        np.array(IDS, np.uint8),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        [np.int64(5), np.uint8(0), torch.tensor(7)],
        list(torch.tensor(IDS)),
    ],
    ids=repr,
)
def test_ids_of_every_kind(prompt: Any) -> None:
    found = encode_prompt(prompt, None, 300)
    assert found.ids == [int(value) for value in prompt]
    assert {type(index) for index in found.ids} == {int}
    assert found.open_end


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "found None"),
        (5, "found 5"),
        (b"def f", "found b'def f'"),
        (bytearray(b"a"), "found bytearray"),
        (memoryview(b"ab"), "found <memory"),
        ({5, 6}, "found {5, 6}"),
        (USER, r"of one: \[message\]"),
        ({"input_ids": [1]}, "pass its 'input_ids'"),
        (iter([1]), "found <list_iterator"),
        (object(), "found <object"),
        (torch.tensor([[5, 6]]), r"found Tensor of shape \(1, 2\); of a batch of one, pass prompt\[0\]"),
        (np.array([[5, 6]]), r"found ndarray of shape \(1, 2\); of a batch"),
        (torch.tensor(5), r"Tensor of shape \(\)"),
        (torch.tensor([1.0]), r"integers\); prompt\[0\] is 1.0"),
        (np.array([1, 2.5]), r"prompt\[0\] is 1.0"),
        ([1, 2.0], r"prompt\[1\] is 2.0"),
        ([[1, 2]], r"prompt\[0\] is \[1, 2\]"),
        ([np.array([1, 2])], r"prompt\[0\] is"),
        ([torch.tensor([1, 2])], r"prompt\[0\] is tensor"),
        (["a"], r"prompt\[0\] is 'a'"),
        ([True], r"prompt\[0\] is True"),
        ([torch.tensor(True)], r"prompt\[0\] is"),
        ([1, 300], r"token id 300 is out of range 0..299, at \[1\]"),
        ([-1], "token id -1 is out of range"),
        ([2**70], "out of range"),
        ([b"a"], r"prompt\[0\] is b'a'"),
    ],
)
def test_everything_else_is_refused_by_name(prompt: Any, words: str) -> None:
    with pytest.raises(InputError, match=f"prompt.*{words}"):
        encode_prompt(prompt, None, 300)


def test_texts_and_chats_need_a_tokenizer() -> None:
    for prompt in ("a", [USER]):
        with pytest.raises(InputError, match="needs a tokenizer, and this pyramid has none"):
            encode_prompt(prompt, None, 300)
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        split_stops(["a"], None)


def test_options_say_where_a_prompt_begins_and_ends(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    bos = tokenizer.special_id("<s>")
    rendered = tokenizer.render_chat([USER])
    chat = encode_prompt([USER], tokenizer, size)
    assert encode_prompt(rendered, tokenizer, size).ids == chat.ids
    assert encode_prompt(rendered, tokenizer, size, add_special_tokens=True).ids == [bos, *chat.ids]
    assert encode_prompt([USER], tokenizer, size, add_special_tokens=True).ids == [bos, *chat.ids]
    assert encode_prompt("the", tokenizer, size, add_special_tokens=False).ids == tokenizer.encode(
        "the", False
    )
    # Where the template wrote the end there is nothing to heal.
    assert not chat.open_end
    assert encode_prompt([USER, ANSWER], tokenizer, size).open_end
    assert not encode_prompt([USER, ANSWER], tokenizer, size, continue_final_message=False).open_end
    assert encode_prompt([USER], tokenizer, size, continue_final_message=True).open_end


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([1, 2], {"add_special_tokens": True}, "token ids are taken as they are"),
        ([1, 2], {"continue_final_message": True}, "needs chat messages, found token ids"),
        ("a", {"continue_final_message": True}, "needs chat messages, found a text"),
    ],
)
def test_options_that_do_not_go_with_a_prompt(
    tokenizer: Tokenizer, prompt: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        encode_prompt(prompt, tokenizer, 300, **options)


def test_ids_that_the_tokenizer_makes_are_checked(tokenizer: Tokenizer) -> None:
    index = tokenizer.special_id("<pad>")
    assert index == tokenizer.vocab_size - 1
    with pytest.raises(
        InputError, match=rf"makes token id {index} \('<pad>'\) of it, .* range 0..{index - 1}"
    ):
        encode_prompt("a<pad>", tokenizer, index)
    with pytest.raises(InputError, match=f"makes token id {index}"):
        encode_prompt([{"role": "user", "content": "<pad>"}], tokenizer, index)
    assert index in encode_prompt("a<pad>", tokenizer, index + 1).ids


def test_names_of_ids_are_those_of_the_option() -> None:
    with pytest.raises(InputError, match=r"stop_token_ids: token id 9 is out of range 0..8, at \[1\]"):
        token_ids("stop_token_ids", [1, 9], 9)


# Stop strings.


def test_stop_strings_that_are_special_tokens_are_ids(tokenizer: Tokenizer) -> None:
    eos = tokenizer.special_id("</s>")
    assert split_stops(["a", "</s>", "< /s>"], tokenizer) == (["a", "< /s>"], [eos])
    with pytest.raises(InputError, match=r"stop\[1\] '</s>\\n' holds the special token '</s>', .* alone"):
        split_stops(["a", "</s>\n"], tokenizer)


def test_a_special_token_ends_the_text(tiny: Pyramid, tmp_path: Path) -> None:
    """A stop string that no text shows, since its token is special: the third token of a text, made so."""
    assert tiny.tokenizer is not None
    options = Options(max_new_tokens=8, ignore_eos=True)
    first = tiny.generate([5, 6, 7], **options)
    stop = first.tokens[2]
    at = first.tokens.index(stop)
    spelling = tiny.tokenizer.token(stop)
    assert spelling is not None
    files = {"added_tokens_decoder": {str(stop): {"content": spelling, "special": True, "normalized": False}}}
    write_tokenizer(tmp_path, tiny.tokenizer._core, tokenizer_config=files)
    marked = Pyramid(tiny.tiers, tokenizer=Tokenizer.from_dir(tmp_path))
    out = marked.generate([5, 6, 7], **options | Options(stop=spelling))
    assert (out.tokens, out.finish_reason) == (first.tokens[: at + 1], "stop")
    assert marked.generate([5, 6, 7], **options | Options(stop=["never there"])).tokens == first.tokens


def test_logprobs_carry_texts(tiny: Pyramid) -> None:
    assert tiny.tokenizer is not None
    out = tiny.generate("def f", max_new_tokens=6, logprobs=3)
    assert out.logprobs is not None
    for entry in out.logprobs:
        assert entry.text == tiny.tokenizer.token_text(entry.token)
        assert entry.top_texts == tuple(tiny.tokenizer.token_text(index) for index, _ in entry.top)
    bare = Pyramid(tiny.tiers).generate([1, 2], max_new_tokens=1, logprobs=1)
    assert bare.logprobs is not None
    assert (bare.logprobs[0].text, bare.logprobs[0].top_texts) == ("", ())


def test_texts_of_single_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert tokenizer.token_text(ids[0]) == "<s>"
    joined = b"".join(map(tokenizer.piece_bytes, ids)).decode()
    assert joined == "é"
    parts = [tokenizer.token_text(index) for index in ids[1:]]
    assert parts in (["é"], ["�", "�"])


def test_a_whole_call_goes_by_the_options() -> None:
    with pyramid_rt.load(pyramid_rt.demo_weights(), device="cpu") as rt:
        with pytest.raises(InputError, match="prompt must be a string"):
            rt.generate(None)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="add_special_tokens must be True or False"):
            rt.generate("a", add_special_tokens="no")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="heal must be True or False"):
            rt.generate("a", heal=1)  # type: ignore[arg-type]
        ids = torch.tensor([5, 6, 7])
        assert rt.generate(ids, max_new_tokens=3).tokens == rt.generate([5, 6, 7], max_new_tokens=3).tokens  # type: ignore[arg-type]
