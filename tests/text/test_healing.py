"""Token healing: the tokens that may come after a prompt whose last one was taken back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from helpers.vocabularies import CODE, TEN_SCRIPTS, byte_fallback, byte_level, with_bos, write_tokenizer
from tokenizers import models

from pyramid_rt.errors import InputError
from pyramid_rt.text.detokenizer import TextAssembler
from pyramid_rt.text.healing import Pieces, Prefix, pieces_of, take_back
from pyramid_rt.text.tokenizer import Tokenizer

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {"bytes": byte_level, "fallback": byte_fallback}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_dir(write_tokenizer(tmp_path, with_bos(KINDS[request.param]())))


def every_cover(tokens: dict[int, bytes], rest: bytes) -> set[int]:
    """The first tokens of all ways to cover `rest`, by trying every one."""
    found = set()
    for index, spelt in tokens.items():
        if spelt.startswith(rest) or (
            len(spelt) < len(rest) and rest.startswith(spelt) and every_cover(tokens, rest[len(spelt) :])
        ):
            found.add(index)
    return found


def test_allowed_tokens_are_those_of_every_cover() -> None:
    rng = random.Random(1)
    for _ in range(200):
        spellings = {bytes(rng.choices(b"ab\xff", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 12))}
        tokens = dict(enumerate(sorted(spellings)))
        pieces = Pieces((spelt, index) for index, spelt in tokens.items())
        for rest in {*spellings, bytes(rng.choices(b"ab\xff", k=5))}:
            # A tokenizer is only asked for bytes of a token, which this does not need.
            prefix = Prefix(pieces, rest, None)  # type: ignore[arg-type]
            allowed = prefix.allowed()
            assert len(allowed) == len(set(allowed))
            assert set(allowed) == every_cover(tokens, rest)


def test_a_random_walk_covers_the_prefix_and_no_more(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    pieces = pieces_of(tokenizer, tokenizer.vocab_size, [])
    for text in (*TEN_SCRIPTS.values(), CODE, "the cat ", "x\n", "    "):
        ids, prefix = take_back(tokenizer.encode(text), tokenizer, pieces)
        assert prefix is not None
        wanted, walked = prefix.rest, []
        while prefix is not None:
            walked.append(rng.choice(prefix.allowed()))
            prefix = prefix.after(walked[-1])
        spelt = b"".join(map(tokenizer.piece_bytes, walked))
        assert spelt.startswith(wanted)
        assert len(b"".join(map(tokenizer.piece_bytes, walked[:-1]))) < len(wanted)
        # What shows is what follows the prompt's characters, through whole characters.
        assembler = TextAssembler(tokenizer, (), frozenset(), ids, skip=wanted)
        end = tokenizer.encode("the end.", False)
        shown = assembler.push([*walked, *end]) + assembler.flush()
        whole = tokenizer.decode([*ids, *walked, *end])
        assert whole.startswith(text) == ("�" not in whole[: len(text)])
        assert shown == whole[len(text) :] or "�" in whole


def test_the_text_is_the_same_in_whatever_pieces_it_is_pushed(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for text in (*TEN_SCRIPTS.values(), CODE):
        ids = tokenizer.encode(text)
        for cut in range(2, len(ids), 3):
            back = rng.randint(1, min(3, cut - 1))  # as if healing had chosen these tokens
            skip = b"".join(map(tokenizer.piece_bytes, ids[cut - back : cut]))
            healed = TextAssembler(tokenizer, (), frozenset(), ids[: cut - back], skip=skip)
            plain = TextAssembler(tokenizer, (), frozenset(), ids[:cut])
            assert "".join(map(healed.push, [[i] for i in ids[cut - back :]])) + healed.flush() == (
                "".join(map(plain.push, [[i] for i in ids[cut:]])) + plain.flush()
            )


def test_special_tokens_and_lone_ones_stay(tokenizer: Tokenizer) -> None:
    pieces = pieces_of(tokenizer, tokenizer.vocab_size, [])
    bos = tokenizer.special_id("<s>")
    word = tokenizer.encode("cat", False)
    assert bos is not None
    for ids in ([bos], [*word, bos], word[:1]):
        assert take_back(list(ids), tokenizer, pieces) == (ids, None)
    taken, prefix = take_back([bos, word[0]], tokenizer, pieces)
    assert (taken, prefix is None) == ([bos], False)
    assert prefix is not None
    assert not tokenizer.special_ids & set(prefix.allowed())


def test_barred_and_foreign_ids_are_never_allowed(tokenizer: Tokenizer) -> None:
    last = tokenizer.encode("the cat")[-1]
    spelt = tokenizer.piece_bytes(last)
    every = Prefix(pieces_of(tokenizer, tokenizer.vocab_size, []), spelt[:1], tokenizer).allowed()
    barred = pieces_of(tokenizer, tokenizer.vocab_size, [last])
    assert set(every) - set(Prefix(barred, spelt[:1], tokenizer).allowed()) == {last}
    fewer = pieces_of(tokenizer, max(every), [])
    assert set(Prefix(fewer, spelt[:1], tokenizer).allowed()) == set(every) - {max(every)}


def test_tokenizers_that_cannot_heal_are_refused(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    with pytest.raises(InputError, match="joins words by a rule of its own"):
        pieces_of(Tokenizer.from_dir(write_tokenizer(tmp_path, core)), 2, [])
    with pytest.raises(InputError, match="needs a tokenizer, and this pyramid has none"):
        pieces_of(None, 2, [])
