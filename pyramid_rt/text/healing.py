"""Token healing: what a text must begin with once the prompt's last token was taken back.

A prompt that ends within a word, in a blank or after a newline has been cut into tokens where no text of the model's
training was: `import jso` ends in the tokens ` j` and `so`, and the model never saw `n` follow those. So the last
token is taken back, and the new text must begin with its characters, in whatever tokens the model likes best: here
`son`. What is allowed next depends on the bytes that are still to come:

- a token that begins with all of them covers them, and everything after it is free;
- a token that is a part of them from their start leaves the rest to come, if there are tokens to cover that.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from pyramid_rt.errors import InputError
from pyramid_rt.text.tokenizer import Tokenizer


class Pieces:
    """The bytes that every token of a vocabulary stands for, in order, for the search by their beginnings."""

    def __init__(self, tokens: Iterable[tuple[bytes, int]]) -> None:
        """`tokens`: bytes and id of each; those without bytes do not count."""
        ordered = sorted(token for token in tokens if token[0])
        self._bytes = [spelt for spelt, _ in ordered]
        self._ids = [index for _, index in ordered]
        self._longest = max(map(len, self._bytes), default=0)

    def beginning_with(self, start: bytes) -> list[int]:
        """Ids of the tokens that begin with `start`, itself included."""
        first = bisect_left(self._bytes, start)
        last = bisect_left(self._bytes, start + b"\xff" * (self._longest + 1), first)
        return self._ids[first:last]

    def equal_to(self, spelt: bytes) -> list[int]:
        """Ids of the tokens that are just these bytes."""
        first = bisect_left(self._bytes, spelt)
        return self._ids[first : bisect_right(self._bytes, spelt, first)]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Bytes that the new text must begin with.

    Attributes:
        pieces: of the vocabulary that is decoded over, without special and end-of-sequence tokens.
        rest: the bytes, at least one.
        spelt: bytes by id.
    """

    pieces: Pieces
    rest: bytes
    tokenizer: Tokenizer

    def allowed(self) -> list[int]:
        """Ids that may come next; never none, since the token that was taken back is one."""
        found = self.pieces.beginning_with(self.rest)
        coverable = self._coverable()
        for size in range(1, len(self.rest)):
            if coverable[size]:
                found = found + self.pieces.equal_to(self.rest[:size])
        return found

    def after(self, token_id: int) -> Prefix | None:
        """The bytes still to come after an allowed token; None once all are covered."""
        size = len(self.tokenizer.piece_bytes(token_id))
        return Prefix(self.pieces, self.rest[size:], self.tokenizer) if size < len(self.rest) else None

    def _coverable(self) -> list[bool]:
        """For each size: whether there are tokens for the rest from there on."""
        end = len(self.rest)
        found = [False] * end + [True]
        for first in reversed(range(end)):
            found[first] = bool(self.pieces.beginning_with(self.rest[first:])) or any(
                found[last] and self.pieces.equal_to(self.rest[first:last]) for last in range(first + 1, end)
            )
        return found


def take_back(ids: list[int], tokenizer: Tokenizer | None, pieces: Pieces) -> tuple[list[int], Prefix | None]:
    """A prompt without its last token, and what must come in its place.

    Nothing is taken back where that token has no text (it is a special one, as at the end of a chat's template), or
    where nothing would be left.
    """
    assert tokenizer is not None
    spelt = tokenizer.piece_bytes(ids[-1])
    if len(ids) < 2 or not spelt or ids[-1] not in pieces.equal_to(spelt):
        return ids, None
    return ids[:-1], Prefix(pieces, spelt, tokenizer)


def pieces_of(tokenizer: Tokenizer | None, vocab_size: int, barred: Iterable[int]) -> Pieces:
    """The pieces of a vocabulary below `vocab_size`, without the ids in `barred`.

    Raises:
        InputError: there is no tokenizer, or one of a kind whose tokens do not stand for bytes of their own.
    """
    if tokenizer is None:
        raise InputError("heal=True needs a tokenizer, and this pyramid has none")
    if not tokenizer.spells_pieces:
        raise InputError(
            f"heal=True needs a tokenizer whose tokens are bytes or pieces of text; that of {tokenizer.directory} "
            "joins words by a rule of its own"
        )
    left_out = set(barred)
    known = range(min(vocab_size, tokenizer.vocab_size))
    return Pieces((tokenizer.piece_bytes(index), index) for index in known if index not in left_out)
