"""From committed tokens to the text that may be shown: whole characters only, and no stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from pyramid_rt.errors import InputError
from pyramid_rt.text.tokenizer import Tokenizer

# How many tokens before a new one its text may depend on; decoders look at the neighbour only.
CONTEXT_TOKENS = 4


class TextAssembler:
    """Turns tokens into text piece by piece; the cost of a push does not grow with the text before it.

    The pieces add up to what the tokenizer makes of the tokens after their context. One exception: a decoder
    with byte tokens blanks a whole run of them for one wrong byte; here the characters already shown stay.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        hidden_ids: frozenset[int],
        context: Sequence[int] = (),
        skip: bytes = b"",
    ) -> None:
        """Start an empty text.

        Args:
            tokenizer: the target's.
            stops: strings that end the text; they are not part of it.
            hidden_ids: ids that give no text (end-of-sequence); special tokens give none in any case.
            context: ids of the prompt. Its end decides whether a first token brings its leading space, and holds
                the first bytes of a character that the text may complete.
            skip: bytes that the tokens to come begin with and that are not part of the text: the end of the prompt,
                where healing took it back.

        Raises:
            InputError: a stop string is empty or no string.
        """
        check_stops(stops)
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._longest = max(map(len, self._stops), default=0)
        self._hidden = hidden_ids | tokenizer.special_ids
        self._detokenizer: _Detokenizer = (
            _Bytes(tokenizer, self._visible(context), skip)
            if tokenizer.byte_level
            else _Window(tokenizer, self._visible(context), skip)
        )
        self._pieces: list[str] = []
        self._held = ""
        self.stopped = False
        self.tokens_used = 0

    def _visible(self, context: Sequence[int]) -> list[int]:
        # A special token would be dropped with the blank that should fall on it; look further back, a little.
        return [i for i in context[-4 * CONTEXT_TOKENS :] if i not in self._hidden]

    @property
    def text(self) -> str:
        """All text that has been shown."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, ids: Sequence[int]) -> str:
        """Take further tokens and return the text that may be shown now.

        Once a stop string is complete, `stopped` is true, `tokens_used` is the number of tokens up to and
        including the one that completed it, and tokens after that are ignored.
        """
        shown = ""
        for token_id in ids:
            if self.stopped:
                break
            self.tokens_used += 1
            if token_id not in self._hidden:
                shown += self._pass_stops(self._detokenizer.feed(token_id))
        return self._show(shown)

    def flush(self) -> str:
        """End the text and return what was held back; bytes without an end become U+FFFD."""
        if self.stopped:
            return ""
        shown = self._pass_stops(self._detokenizer.finish())
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return self._show(shown)

    def _show(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece

    def _pass_stops(self, new: str) -> str:
        """Return what of the held and the new text can no longer become part of a stop string."""
        if not self._stops:
            return new
        text, start = self._held + new, len(self._held)
        for end in range(start + 1, len(text) + 1):
            # Several may end on the same character; the longest, first in order, began first.
            for stop in self._stops:
                if text.endswith(stop, 0, end):
                    self.stopped, self._held = True, ""
                    return text[: end - len(stop)]
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text


def check_stops(stops: Sequence[str]) -> None:
    """Raise InputError unless ``stops`` is a sequence of strings none of which is empty."""
    if isinstance(stops, str):
        raise InputError(f"stop must be a list of strings, found the string {stops!r}")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise InputError(f"stop[{index}] must be a string, found {type(stop).__name__}")
        if not stop:
            raise InputError(f"stop[{index}] is empty; an empty string would stop before any text")


class _Detokenizer(Protocol):
    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _Utf8:
    """Bytes to text as they come, after bytes that were shown elsewhere."""

    def __init__(self, shown: bytes) -> None:
        """`shown`: whatever came before; only a character that it leaves open matters."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(shown)
        # The first bytes of a character; where it does not go on, its U+FFFD stands in the other text.
        self._open = self._decoder.getstate()[0]

    def feed(self, data: bytes) -> str:
        """The characters that these bytes complete."""
        return self._own(self._decoder.decode(data), data)

    def finish(self) -> str:
        """The text that an unfinished character becomes."""
        return self._own(self._decoder.decode(b"", final=True), b"")

    def _own(self, text: str, data: bytes) -> str:
        if not self._open:
            return text
        self._open += data
        if not text:
            return text
        whole, self._open = self._open.startswith("\ufffd".encode()), b""
        return text[1:] if text[0] == "\ufffd" and not whole else text


class _Skip:
    """Leaves out the first bytes of a text."""

    def __init__(self, count: int) -> None:
        self._left = count

    def __bool__(self) -> bool:
        return self._left > 0

    def cut(self, data: bytes) -> bytes:
        """These bytes without those that are left out."""
        kept = data[self._left :]
        self._left = max(0, self._left - len(data))
        return kept


class _Bytes:
    """Tokens that stand for bytes: an incremental UTF-8 decoder is exact, whatever the bytes are."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip: bytes) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skip = _Skip(len(skip))
        self._utf8 = _Utf8(b"".join(map(self._bytes_of, context[-CONTEXT_TOKENS:])) + skip)

    def feed(self, token_id: int) -> str:
        return self._utf8.feed(self._skip.cut(self._bytes_of(token_id)))

    def finish(self) -> str:
        return self._utf8.finish()


class _Window:
    """Any other decoder: decode the latest tokens with and without the new one, and take the difference.

    A blank which the decoder drops or adds at the start of a text thus falls on the tokens before the new
    one. Tokens that stand for single bytes (``<0xE6>``) go through a UTF-8 decoder of their own.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip: bytes) -> None:
        self._tokenizer = tokenizer
        self._context = list(context[-CONTEXT_TOKENS:])
        self._skip = _Skip(len(skip))
        known = [tokenizer.fallback_byte(index) for index in self._context]
        last = next((at for at in reversed(range(len(known))) if known[at] is None), -1)
        self._utf8 = _Utf8(bytes(byte for byte in known[last + 1 :] if byte is not None) + skip)

    def feed(self, token_id: int) -> str:
        if self._tokenizer.token(token_id) is None:
            return ""
        before, self._context = self._context, [*self._context, token_id][-CONTEXT_TOKENS:]
        if self._skip:
            return self._utf8.feed(self._skip.cut(self._tokenizer.piece_bytes(token_id)))
        byte = self._tokenizer.fallback_byte(token_id)
        if byte is not None:
            return self._utf8.feed(bytes([byte]))
        base = self._tokenizer.decode(before)
        return self.finish() + self._tokenizer.decode([*before, token_id])[len(base) :]

    def finish(self) -> str:
        return self._utf8.finish()
