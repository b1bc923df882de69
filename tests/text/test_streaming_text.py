"""Streamed text against a full decode, at every cut between prompt and new text, in ten scripts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import tokenizers
from helpers.vocabularies import CODE, TEN_SCRIPTS, byte_fallback, byte_level, with_bos, write_tokenizer

from pyramid_rt.text.detokenizer import TextAssembler
from pyramid_rt.text.tokenizer import Tokenizer

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bytes, small": lambda: byte_level(300),
    "bytes": lambda: byte_level(600),
    "fallback": byte_fallback,
    "fallback, metaspace": lambda: byte_fallback(metaspace=True),
    "fallback, no blank in front": lambda: byte_fallback(prepend=False),
}
TEXTS = {
    **TEN_SCRIPTS,
    "code": CODE,
    "blanks": " leading and  double   blanks \n\t x ",
    "mixed": "a世b é😀c  日 ",
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    core = with_bos(KINDS[request.param]())
    core.add_tokens(["<|plain|>"])
    core.add_special_tokens(["<|special|>"])
    return Tokenizer.from_dir(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), core))


def spelt(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The characters that are whole after these tokens.

    Not `decode`: for one character that is not whole, the library's decoder of byte tokens blanks all beside it.
    """
    text = b"".join(map(tokenizer.piece_bytes, ids)).decode("utf-8", "ignore")
    in_front = tokenizer.piece_bytes(tokenizer.encode("x", False)[0]).startswith(b" ")
    return text.removeprefix(" ") if in_front else text


def streamed(tokenizer: Tokenizer, context: list[int], ids: list[int]) -> list[str]:
    """The pieces of `ids`, pushed one by one after `context`."""
    assembler = TextAssembler(tokenizer, (), frozenset(), context)
    return [*(assembler.push([index]) for index in ids), assembler.flush()]


@pytest.mark.parametrize("name", TEXTS)
def test_every_cut_shows_what_a_full_decode_shows(tokenizer: Tokenizer, name: str) -> None:
    text = TEXTS[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    # Nothing is lost but a leading blank, which `Metaspace` takes for the one it would put in front.
    assert whole in (text, text.removeprefix(" "))
    for cut in range(1, len(ids) + 1):
        pieces = streamed(tokenizer, ids[:cut], ids[cut:])
        # A character that the cut goes through is shown whole by the side that ends it.
        shown = spelt(tokenizer, ids[:cut])
        assert whole.startswith(shown)
        assert "".join(pieces) == (whole[len(shown) :] if ids[cut:] else ""), cut
        # No piece ends within a character: all that was shown at any time is a beginning of the text.
        for part in itertools.accumulate(pieces):
            assert whole.startswith(shown + part)


@pytest.mark.parametrize("name", TEXTS)
def test_characters_show_as_soon_as_their_last_token_is_there(tokenizer: Tokenizer, name: str) -> None:
    ids = tokenizer.encode(TEXTS[name])
    assembler = TextAssembler(tokenizer, (), frozenset())
    shown = ""
    for count, index in enumerate(ids, 1):
        shown += assembler.push([index])
        assert shown == spelt(tokenizer, ids[:count])


@pytest.mark.parametrize("name", TEXTS)
def test_added_tokens_between_texts(tokenizer: Tokenizer, name: str) -> None:
    text = TEXTS[name]
    ids = tokenizer.encode(f"{text}<|plain|>{text} <|special|> {text}<|special|>")
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids) + 1, 7):
        shown = spelt(tokenizer, ids[:cut])
        rest = whole[len(shown) :] if ids[cut:] else ""
        assert "".join(streamed(tokenizer, ids[:cut], ids[cut:])) == rest, cut


def test_a_character_that_the_prompt_leaves_open_and_nothing_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x😀", False)
    start = next(at for at in range(len(ids)) if tokenizer.decode(ids[: at + 1]) != "x" and at > 0)
    word = tokenizer.encode("y", False)[-1:]
    broken = ids[: start + 1]
    if tokenizer.decode(broken) == "x😀":
        pytest.skip("one token is the whole character")
    # Its replacement character stands in the prompt's text already.
    assert streamed(tokenizer, broken, word) == ["y", ""]
    assert streamed(tokenizer, broken, []) == [""]
