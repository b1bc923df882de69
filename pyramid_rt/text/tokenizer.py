"""A tier's tokenizer: text to token ids and back, and chat messages to text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pyramid_rt import checks
from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.json_files import kind_of, read_bytes
from pyramid_rt.text.chat import ChatTemplate
from pyramid_rt.text.comparison import vocabulary_difference
from pyramid_rt.text.library import library
from pyramid_rt.text.token_files import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    TokenFiles,
    read_token_files,
)

TEMPLATE_FILE = "chat_template.jinja"

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders that leave it at replacing characters and joining; what `Strip` takes from the start of a text is no part
# of a token's meaning.
_SPELLING_DECODERS = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}


class Tokenizer:
    """A model's tokenizer, with the chat template beside it. Safe to use from several threads.

    Attributes:
        directory: where it was read.
        digest: equal digests mean equal tokenizers.
        vocab_size: one more than the highest token id it knows.
        plain_size: the same without tokens that were added to its model's vocabulary.
        special_ids: ids of the special tokens, which never show in text.
        byte_level: every token stands for bytes (`token_bytes`), joined and read as UTF-8.
    """

    def __init__(self, files: TokenFiles, directory: Path) -> None:
        """Wrap what was read; `from_dir` is the usual way to get one."""
        core = files.core
        # A limit or a padding saved from training would cut or lengthen prompts unseen.
        core.no_truncation()
        core.no_padding()
        self._core, self._settings = core, files.settings
        self._names, self._disputed = files.names, files.disputed
        self.directory = directory
        self.digest = files.digest
        self.vocab_size: int = 1 + max(self._vocabulary().values(), default=-1)
        self.plain_size: int = 1 + max(core.get_vocab(with_added_tokens=False).values(), default=-1)
        added = core.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._decoders = list(_flat(files.decoder))
        kinds = {str(one["type"]) for one in self._decoders}
        self.byte_level: bool = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self._byte_fallback = "ByteFallback" in kinds

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where they are, the files beside it; see `token_files`.

        Raises:
            WeightsError: a file is missing, unreadable, not what its name says, or contradicts another one.
        """
        directory = Path(directory)
        return cls(read_token_files(directory), directory)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any Unicode text; special tokens that are spelt out in it become their ids.
            add_special_tokens: True: what the tokenizer's own post-processor adds (as a BOS). False: nothing.
                None: the same as True, but what would stand in front of the text is not added where the text
                begins with it, as a chat does that was rendered by its template.

        Raises:
            InputError: the text holds something that is not a Unicode character (a lone surrogate).
            TokenizerError: the tokenizer fails at this text.
        """
        checks.unicode_text("prompt", text)
        with library(f"prompt: the tokenizer {self.directory / TOKENIZER_FILE} fails at this text"):
            encoding = self._core.encode(text, add_special_tokens=add_special_tokens is not False)
        ids: list[int] = list(encoding.ids)
        if add_special_tokens is None:
            mask = (
                encoding.special_tokens_mask
            )  # 1 for what the post-processor added, not for what the text spells
            lead = next((number for number, added in enumerate(mask) if not added), len(mask))
            if lead and ids[lead : 2 * lead] == ids[:lead]:
                return ids[lead:]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Any],
        *,
        add_special_tokens: bool | None = None,
        continue_final_message: bool | None = None,
    ) -> list[int]:
        """Return the ids of a rendered chat. The template writes the BOS, so none is added unless told to.

        Raises:
            InputError: as `render_chat`. TokenizerError: as `encode`.
        """
        text = self.render_chat(messages, continue_final_message)
        return self.encode(text, add_special_tokens=add_special_tokens is True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str | None:
        """Return the vocabulary's own spelling of an id, None for an id it does not know."""
        spelling: str | None = self._core.id_to_token(token_id)
        return spelling

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes an id stands for, empty for an unknown id. Only where `byte_level` holds."""
        spelling = self.token(token_id)
        if spelling is None:
            return b""
        try:
            return bytes([BYTE_OF_CHAR[char] for char in spelling])
        except KeyError:  # an added token, which is spelt as plain text
            return spelling.encode()

    def fallback_byte(self, token_id: int) -> int | None:
        """Return the byte that a token like ``<0xE6>`` stands for, None for every other token."""
        spelling = self.token(token_id) if self._byte_fallback else None
        match = BYTE_TOKEN.fullmatch(spelling) if spelling else None
        return int(match[1], 16) if match else None

    @cached_property
    def spells_pieces(self) -> bool:
        """True where every token stands for a piece of text of its own: `piece_bytes` holds."""
        kinds = {one["type"] for one in self._decoders}
        return self.byte_level or (bool(kinds) and kinds <= _SPELLING_DECODERS and self._replaced is not None)

    def piece_bytes(self, token_id: int) -> bytes:
        """Return the bytes an id adds to a text, at its start too: ``▁the`` is a blank and ``the``.

        Empty for unknown and special ids. Only where `spells_pieces` holds.
        """
        if token_id in self.special_ids:
            return b""
        if self.byte_level:
            return self.token_bytes(token_id)
        byte = self.fallback_byte(token_id)
        if byte is not None:
            return bytes([byte])
        spelling = self.token(token_id) or ""
        for old, new in self._replaced or ():
            spelling = spelling.replace(old, new)
        return spelling.encode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """Return one token for people to read: special ones spelt out, parts of characters as U+FFFD."""
        if token_id in self.special_ids:
            return self.token(token_id) or ""
        if self.spells_pieces:
            return self.piece_bytes(token_id).decode("utf-8", "replace")
        return self._decode([token_id], skip_special_tokens=False)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token that is spelt exactly so, None where there is none."""
        index: int | None = self._core.token_to_id(text)
        return index if index in self.special_ids else None

    def special_within(self, text: str) -> str | None:
        """Return a special token that is spelt out somewhere in a text, None where there is none."""
        return next((spelling for spelling in self._special_spellings if spelling in text), None)

    def render_chat(self, messages: Sequence[Any], continue_final_message: bool | None = None) -> str:
        """Return the text of a chat by the directory's own template.

        Args:
            messages: each has a ``role`` and a ``content``, see `plain_messages`; the template sees further keys.
            continue_final_message: True: the text ends within the last message, for the model to go on with it.
                False: it ends where the assistant's answer begins. None: True where the last message is an
                assistant's, else False.

        Raises:
            InputError: there is no template, a message is malformed, or the template refuses the chat.
            WeightsError: the template wants a token that the tokenizer's files contradict each other about.
        """
        if self._template is None:
            raise InputError(
                f"prompt: a list of messages needs a chat template, and {self.directory} has none "
                f"(neither {TEMPLATE_FILE} nor chat_template in {SETTINGS_FILE})"
            )
        return self._template.render(messages, self._names, continue_final_message)

    def difference(self, other: Tokenizer) -> str | None:
        """Return how ``other`` differs in what ids mean, None when it does not; see `comparison`."""
        if self.digest == other.digest:
            return None
        added = self._added_ids | other._added_ids
        return vocabulary_difference(self._vocabulary(), other._vocabulary(), added)

    def same_as(self, other: Tokenizer) -> bool:
        """True where ids mean the same in both."""
        return self.difference(other) is None

    def _vocabulary(self) -> dict[str, int]:
        """Ids by spelling, added tokens included; made anew, since it is large and rarely wanted."""
        return dict(self._core.get_vocab(with_added_tokens=True))

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        with library(f"the tokenizer {self.directory / TOKENIZER_FILE} fails at ids"):
            return str(self._core.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def _special_spellings(self) -> list[str]:
        return [spelling for index in sorted(self.special_ids) if (spelling := self.token(index))]

    @cached_property
    def _replaced(self) -> list[tuple[str, str]] | None:
        """Replacements that the decoder makes in every token; None where it has patterns, or makes none."""
        pairs: list[tuple[str, str]] = []
        for one in self._decoders:
            if one["type"] == "Metaspace":
                pairs.append((str(one.get("replacement", "\u2581")), " "))
            if one["type"] == "Replace":
                pattern = one.get("pattern", {}).get("String")
                if not isinstance(pattern, str):
                    return None
                pairs.append((pattern, str(one.get("content", ""))))
        return pairs or None

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """The chat template, compiled at its first use; its own file wins over the settings."""
        path = self.directory / TEMPLATE_FILE
        if kind_of(path) is not None:
            return self._compiled(read_bytes(path).decode("utf-8", "replace"), str(path))
        where = f"chat_template in {self.directory / SETTINGS_FILE}"
        value = self._settings.get("chat_template")
        if isinstance(value, list):  # several, by name
            entries = [entry for entry in value if isinstance(entry, Mapping)]
            value = next((e.get("template") for e in entries if e.get("name") == "default"), None)
        if value is None:
            return None
        if not isinstance(value, str):
            raise WeightsError(f"{where} must be text, found {type(value).__name__}")
        return self._compiled(value, where)

    def _compiled(self, source: str, where: str) -> ChatTemplate:
        for name, message in self._disputed.items():
            if re.search(rf"\b{re.escape(name)}\b", source):
                raise WeightsError(f"the chat template ({where}) uses {name}, and {message}")
        return ChatTemplate(source, where)


def _flat(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The decoders of a section of tokenizer.json, in order; of the members where it is a sequence."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for one in decoder["decoders"]:
            yield from _flat(one)
    else:
        yield decoder


def _bytes_by_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the rest is moved up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


BYTE_OF_CHAR = _bytes_by_char()
