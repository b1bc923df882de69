"""The text assembler: whole characters, no stop strings, the same text however tokens arrive."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pyramid_rt.errors import InputError
from pyramid_rt.text.detokenizer import TextAssembler
from pyramid_rt.text.tokenizer import BYTE_OF_CHAR, Tokenizer

TEXTS = [
    "plain ascii",
    "naïve café e\u0301 n\u0303",
    "日本語のテキスト、漢字かな交じり文。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 x 🇩🇪",
    "tail\u0000null \ufffd real replacement \ufffd\ufffd end",
    "नमस्ते \u200d دنيا",
    " leading and  double  blanks \n\t",
]
HIDDEN = frozenset({0})


def wrap(core: tokenizers.Tokenizer, directory: Path) -> Tokenizer:
    (directory / "tokenizer.json").write_text(core.to_str())
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Id 0 is special, ids 1-256 are the bytes, then some pieces that end or begin within a character."""
    char_of = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    tokens = ["<eos>", *(char_of[byte] for byte in range(256))]
    for piece in (b"ab", b" the", "é".encode(), b"x\xf0\x9f", b"\x98\x80y", b"\xe6\x97\xa5\xe6", b"bc"):
        tokens.append("".join(char_of[byte] for byte in piece))
    core = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    return wrap(core, tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In the manner of sentencepiece: a leading blank is dropped, rare characters are spelt in bytes."""
    pieces = ["▁", "▁the", "▁a", "a", "b", "c", "x", "日", "é", "▁▁", "\n", "."]
    tokens = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    core = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<eos>"])
    return wrap(core, tmp_path_factory.mktemp("fallback"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """No decoder at all: the library joins words with blanks."""
    tokens = ["<eos>", "one", "two", "three"]
    core = tokenizers.Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, "one"))
    core.add_special_tokens(["<eos>"])
    return wrap(core, tmp_path_factory.mktemp("words"))


def byte_ids(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def chunks(ids: Sequence[int], rng: random.Random) -> list[list[int]]:
    cut, out = 0, []
    while cut < len(ids):
        size = rng.randint(1, 7)
        out.append(list(ids[cut : cut + size]))
        cut += size
    return out


def assemble(assembler: TextAssembler, parts: Sequence[Sequence[int]]) -> list[str]:
    return [*(assembler.push(part) for part in parts), assembler.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "fallback"])
def test_bytes_give_whole_characters(request: pytest.FixtureRequest, name: str, text: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    rng = random.Random(text)
    for _ in range(20):
        # The context takes the dropped blank of the second kind of tokenizer on itself.
        assembler = TextAssembler(tokenizer, (), HIDDEN, byte_ids("x"))
        pieces = assemble(assembler, chunks(byte_ids(text), rng))
        assert "".join(pieces) == assembler.text == text
        assert assembler.tokens_used == len(byte_ids(text))


def test_any_tokens_equal_the_decode_of_all(byte_level: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(400):
        ids = [rng.randrange(byte_level.vocab_size + 3) for _ in range(rng.randint(0, 40))]
        assembler = TextAssembler(byte_level, (), HIDDEN)
        pieces = assemble(assembler, chunks(ids, rng))
        known = [index for index in ids if index < byte_level.vocab_size]
        assert "".join(pieces) == byte_level.decode(known)


def test_characters_are_shown_as_soon_as_they_are_whole(byte_level: Tokenizer) -> None:
    assembler = TextAssembler(byte_level, (), HIDDEN)
    assert [assembler.push([index]) for index in byte_ids("aé😀")] == ["a", "", "é", "", "", "", "😀"]


def test_fallback_pieces_follow_their_context(fallback: Tokenizer) -> None:
    pieces = [*range(257, fallback.vocab_size), 0]
    rng = random.Random(2)
    for _ in range(400):
        context = [rng.choice(pieces) for _ in range(rng.randint(0, 5))]
        ids = [rng.choice(pieces) for _ in range(rng.randint(0, 30))]
        assembler = TextAssembler(fallback, (), HIDDEN, context)
        pieces_shown = "".join(assemble(assembler, chunks(ids, rng)))
        assert pieces_shown == fallback.decode([*context, *ids])[len(fallback.decode(context)) :]


def test_wrong_bytes_do_not_touch_what_was_shown(fallback: Tokenizer) -> None:
    x = fallback.vocab_size - 6
    parts = [byte_ids("日"), [1 + 0x80], byte_ids("本"), [1 + 0xE6], [x]]
    assert assemble(TextAssembler(fallback, (), HIDDEN), parts) == ["日", "�", "本", "", "�x", ""]


def test_wrong_bytes_wait_for_three_tokens_at_most(byte_level: Tokenizer, fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, fallback):
        assembler = TextAssembler(tokenizer, (), HIDDEN)
        for count in range(1, 50):
            assembler.push([1 + 0xE6])
            assert count - len(assembler.text) <= 3
        assembler.flush()
        assert assembler.text == "�" * 49


def test_words_are_joined_by_their_decoder(words: Tokenizer) -> None:
    assert assemble(TextAssembler(words, (), HIDDEN), [[1], [2, 0], [3]]) == ["one", " two", " three", ""]
    assert assemble(TextAssembler(words, (), HIDDEN, [3]), [[1, 2]]) == [" one two", ""]


def test_hidden_tokens_count_but_do_not_show(byte_level: Tokenizer) -> None:
    assembler = TextAssembler(byte_level, (), frozenset({1 + ord("q")}))
    assert assembler.push([*byte_ids("aq"), 0, *byte_ids("b")]) == "ab"
    assert assembler.tokens_used == 4


def test_unfinished_bytes_end_as_replacement(byte_level: Tokenizer) -> None:
    assembler = TextAssembler(byte_level, (), HIDDEN)
    assert assembler.push([*byte_ids("a"), 1 + 0xF0, 1 + 0x9F]) == "a"
    assert assembler.flush() == "�"
    assert assembler.text == "a�"


# Stop strings.


@pytest.mark.parametrize(
    ("stops", "text", "shown", "used"),
    [
        (["ab", "bc"], "xabc", "x", 3),
        (["bc", "ab"], "xbcab", "x", 3),
        (["abc", "b"], "xabc", "xa", 3),
        (["b", "ab"], "xab", "x", 3),
        (["aab"], "aaab", "a", 4),
        (["abab"], "abaabab", "aba", 7),
        (["\n\n"], "a\nb\n\nc", "a\nb", 5),
        (["ab"], "xa", "xa", 2),
        (["é"], "né", "n", 3),
        (["😀!"], "😀?😀!", "😀?", 10),
        (["a"], "a", "", 1),
    ],
)
def test_stops_across_any_border(
    byte_level: Tokenizer, stops: list[str], text: str, shown: str, used: int
) -> None:
    rng = random.Random(3)
    for _ in range(10):
        assembler = TextAssembler(byte_level, stops, HIDDEN)
        pieces = assemble(assembler, chunks(byte_ids(text), rng))
        assert "".join(pieces) == assembler.text == shown
        assert assembler.tokens_used == used
        assert assembler.stopped == any(stop in text for stop in stops)
        if assembler.stopped:
            assert (assembler.push(byte_ids("more")), assembler.flush(), assembler.text) == ("", "", shown)


def test_first_completed_stop_wins_over_random_texts(byte_level: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(500):
        text = "".join(rng.choice("abc") for _ in range(30))
        stops = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 5))) for _ in range(3)]
        ends = {text.find(stop) + len(stop) for stop in stops if stop in text}
        end = min(ends, default=None)
        longest = max((len(s) for s in stops if end is not None and text[:end].endswith(s)), default=0)
        assembler = TextAssembler(byte_level, stops, HIDDEN)
        shown = ""
        for part in chunks(byte_ids(text), rng):
            shown += assembler.push(part)
        shown += assembler.flush()
        assert shown == (text if end is None else text[: end - longest])
        assert assembler.tokens_used == (len(text) if end is None else end)


def test_stop_inside_one_token(byte_level: Tokenizer) -> None:
    the = byte_level.vocab_size - 6  # " the"
    assert byte_level.decode([the]) == " the"
    assembler = TextAssembler(byte_level, ["th"], HIDDEN)
    assert assembler.push([*byte_ids("in"), the, *byte_ids("re")]) == "in "
    assert (assembler.stopped, assembler.tokens_used) == (True, 3)


def test_text_held_for_a_stop_is_shown_at_the_end(byte_level: Tokenizer) -> None:
    assembler = TextAssembler(byte_level, ["</answer>"], HIDDEN)
    assert assembler.push(byte_ids("yes </ans")) == "yes "
    assert assembler.flush() == "</ans"


@pytest.mark.parametrize(
    ("stops", "words_"), [([""], "stop.0. is empty"), (["a", 3], "stop.1. must be"), ("ab", "list of")]
)
def test_bad_stops(byte_level: Tokenizer, stops: Sequence[str], words_: str) -> None:
    with pytest.raises(InputError, match=words_):
        TextAssembler(byte_level, stops, HIDDEN)


@pytest.mark.parametrize("name", ["byte_level", "fallback", "words"])
def test_cost_does_not_grow_with_the_text(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    assembler = TextAssembler(tokenizer, ["never there"], HIDDEN)
    ids = [tokenizer.vocab_size - 1] * 2000

    def seconds() -> float:
        start = time.perf_counter()
        assembler.push(ids)
        return time.perf_counter() - start

    first = min(seconds() for _ in range(3))
    for _ in range(20):
        seconds()
    assert min(seconds() for _ in range(3)) < 5 * first
