"""A tier's tokenizer: text to token ids and back, and chat messages to text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.json_files import kind_of, parse_object, read_bytes
from pyramid_rt.text.chat import ChatTemplate, check_messages

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What templates may refer to by name; tokenizer_config.json spells each as a string or as an object.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """What ``tokenizer.json`` says, with the chat template beside it. Safe to use from several threads.

    Attributes:
        directory: where it was read.
        digest: SHA-256 of ``tokenizer.json``; equal digests mean equal tokenizers.
        vocab_size: one more than the highest token id it knows.
        plain_size: the same without tokens that were added to its model's vocabulary.
        special_ids: ids of the special tokens, which never show in text.
        byte_level: every token stands for bytes (`token_bytes`), joined and read as UTF-8.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        directory: Path,
        digest: str,
        decoder: Mapping[str, Any] | None,
        settings: Mapping[str, Any],
    ) -> None:
        """Wrap a loaded tokenizer; `from_dir` is the usual way to get one."""
        # A limit or a padding saved from training would cut or lengthen prompts unseen.
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._settings = settings
        self.directory = directory
        self.digest = digest
        self.vocab_size: int = 1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1)
        self.plain_size: int = 1 + max(core.get_vocab(with_added_tokens=False).values(), default=-1)
        added = core.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        kinds = _decoder_kinds(decoder)
        self.byte_level: bool = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self._byte_fallback = "ByteFallback" in kinds

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where there is one, ``tokenizer_config.json``.

        Raises:
            WeightsError: a file is missing, unreadable or not what its name says.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        data = read_bytes(path)
        spec = parse_object(path, data)
        try:
            core = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the binding raises bare Exception for whatever it dislikes
            raise WeightsError(f"{path}: not a tokenizer: {error}") from error
        settings_path = directory / SETTINGS_FILE
        settings = (
            parse_object(settings_path, read_bytes(settings_path))
            if kind_of(settings_path) is not None
            else {}
        )
        return cls(core, directory, hashlib.sha256(data).hexdigest(), spec.get("decoder"), settings)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` as the tokenizer's own post-processor leaves them (a BOS included).

        Raises:
            InputError: the text holds something that is not a Unicode character (a lone surrogate).
        """
        return self._encode(text, specials=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a rendered chat; the template writes the BOS itself, so none is added.

        Raises:
            InputError: as `render_chat`.
        """
        return self._encode(self.render_chat(messages), specials=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._core.decode(list(ids), skip_special_tokens=True))

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

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a chat by the directory's own template, ready for the assistant's answer.

        Args:
            messages: each has a ``role`` and a ``content`` (strings); further keys reach the template.

        Raises:
            InputError: there is no template, a message is malformed, or the template refuses the chat.
        """
        check_messages(messages)
        if self._template is None:
            raise InputError(
                f"prompt: a list of messages needs a chat template, and {self.directory} has none "
                f"(neither {TEMPLATE_FILE} nor chat_template in {SETTINGS_FILE})"
            )
        names = {key: value for key in NAMED_TOKENS if (value := self._named_token(key)) is not None}
        return self._template.render(messages, names)

    def difference(self, other: Tokenizer) -> str | None:
        """Return how ``other`` differs in what ids mean or how text becomes ids, None when it does not.

        Decoders, truncation and padding are left out: the target's tokenizer alone writes the text.
        """
        if self.digest == other.digest:
            return None
        # Written out again by one library version, both files have the same defaults filled in.
        mine, theirs = json.loads(self._core.to_str()), json.loads(other._core.to_str())
        parts = [
            _vocabulary_difference(self._core.get_vocab(True), other._core.get_vocab(True)),
            _merges_difference(mine["model"], theirs["model"]),
            _value_difference("model settings", _model_settings(mine), _model_settings(theirs)),
            _added_difference(mine["added_tokens"], theirs["added_tokens"]),
        ]
        for section in ("normalizer", "pre_tokenizer", "post_processor"):
            parts.append(_value_difference(section.replace("_", "-"), mine[section], theirs[section]))
        found = [part for part in parts if part]
        return "; ".join(found) if found else None

    def same_as(self, other: Tokenizer) -> bool:
        """Whether ids mean the same and text becomes the same ids in both."""
        return self.difference(other) is None

    def _encode(self, text: str, specials: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"prompt: character {error.start} is {text[error.start]!r}, a lone surrogate and no text"
            ) from error
        return list(self._core.encode(text, add_special_tokens=specials).ids)

    def _named_token(self, key: str) -> str | None:
        value = self._settings.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        return value if isinstance(value, str) else None

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """The chat template, compiled at its first use; its own file wins over the settings."""
        path = self.directory / TEMPLATE_FILE
        if kind_of(path) is not None:
            return ChatTemplate(read_bytes(path).decode("utf-8", "replace"), str(path))
        where = f"chat_template in {self.directory / SETTINGS_FILE}"
        value = self._settings.get("chat_template")
        if isinstance(value, list):  # several, by name
            entries = [entry for entry in value if isinstance(entry, Mapping)]
            value = next((e.get("template") for e in entries if e.get("name") == "default"), None)
        if value is None:
            return None
        if not isinstance(value, str):
            raise WeightsError(f"{where} must be text, found {type(value).__name__}")
        return ChatTemplate(value, where)


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    """The types of a decoder from tokenizer.json, of its members where it is a sequence."""
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*map(_decoder_kinds, decoder["decoders"]))
    return {decoder["type"]}


def _bytes_by_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the rest is moved up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


BYTE_OF_CHAR = _bytes_by_char()


def _vocabulary_difference(mine: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    if mine == theirs:
        return None
    here = {index: token for token, index in mine.items()}
    there = {index: token for token, index in theirs.items()}
    other = sorted(index for index in here.keys() | there.keys() if here.get(index) != there.get(index))
    index = other[0]
    return (
        f"vocabulary: {len(mine)} tokens against {len(theirs)}, {len(other)} ids differ, "
        f"the first is {index}: {here.get(index)!r} against {there.get(index)!r}"
    )


def _merges_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    here, there = mine.get("merges") or [], theirs.get("merges") or []
    if here == there:
        return None
    pairs = zip(here, there, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(here), len(there)))
    return f"merges: {len(here)} against {len(there)}, different from number {first} on"


def _model_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec["model"].items() if key not in ("vocab", "merges")}


def _added_difference(mine: Sequence[Any], theirs: Sequence[Any]) -> str | None:
    here, there = ({entry["content"]: entry for entry in side} for side in (mine, theirs))
    other = [content for content in here | there if here.get(content) != there.get(content)]
    if not other:
        return None
    content = other[0]
    what = _value_difference(repr(content), here.get(content), there.get(content))
    return f"added tokens: {len(here)} against {len(there)}, {len(other)} differ, for instance {what}"


def _value_difference(name: str, mine: Any, theirs: Any) -> str | None:
    """Name the first place at which two JSON values differ."""
    if mine == theirs:
        return None
    if isinstance(mine, dict) and isinstance(theirs, dict):
        key = next(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        return _value_difference(f"{name}.{key}", mine.get(key), theirs.get(key))
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        index = next(index for index, value in enumerate(mine) if value != theirs[index])
        return _value_difference(f"{name}[{index}]", mine[index], theirs[index])
    return f"{name}: {_short(mine)} against {_short(theirs)}"


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
