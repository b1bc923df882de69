"""The files of a tokenizer read together: tokenizer.json, and the tokens that the files beside it declare.

Fine-tunes often leave tokenizer.json as it was and name their tokens in `tokenizer_config.json`
(`added_tokens_decoder`, `bos_token`, `additional_special_tokens`) or, in older checkpoints, in
`special_tokens_map.json` and `added_tokens.json`. The rules by which they count are those of transformers:

- where the settings have `added_tokens_decoder`, the two older files do not count; else the older files do, and
  `special_tokens_map.json` has the last word on names;
- a declared token that tokenizer.json has with other flags gets the declared ones;
- declared tokens that are new come first, by id, then the named ones, then the additional special ones.

The library numbers new tokens itself, so a declared id that does not come out is a contradiction between files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pyramid_rt import checks
from pyramid_rt.errors import WeightsError
from pyramid_rt.json_files import kind_of, parse_object, read_bytes
from pyramid_rt.text.library import library

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ID = re.compile(r"[0-9]{1,10}")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Sixteen million: the largest vocabularies have a quarter of a million tokens.
_MOST_IDS = 2**24
_EXTRAS = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """A tokenizer as its directory describes it.

    Attributes:
        core: the library's tokenizer, with every declared token added.
        digest: SHA-256 of tokenizer.json and of the tokens added to it.
        decoder: that section of tokenizer.json.
        settings: tokenizer_config.json; empty where there is none.
        names: spellings of the tokens that templates may refer to by name, as `bos_token`.
        disputed: names that two files give to different tokens; the message of the error for whoever needs one.
    """

    core: tokenizers.Tokenizer
    digest: str
    decoder: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    names: Mapping[str, str]
    disputed: Mapping[str, str]


def read_token_files(directory: Path) -> TokenFiles:
    """Read a tokenizer's files.

    Raises:
        WeightsError: a file is missing, unreadable, not what its name says, or contradicts another one.
    """
    path = directory / TOKENIZER_FILE
    data = read_bytes(path)
    spec = parse_object(path, data)
    _check_size_of_ids(path, spec)
    with library(f"{path}: not a tokenizer"):
        core = tokenizers.Tokenizer.from_str(data.decode())
    settings = _optional(directory / SETTINGS_FILE)
    known = _Declarations(directory, spec, settings)
    with library(f"{path}: cannot add the tokens that the files beside it declare"):
        _add(core, known)
        _check_ids(core, known, path)
        core.encode_special_tokens = settings.get("split_special_tokens") is True
        added = sorted((index, repr(token)) for index, token in core.get_added_tokens_decoder().items())
    digest = hashlib.sha256(data + repr(added).encode()).hexdigest()
    names = {key: _content(value) for key, value in known.names.items()}
    return TokenFiles(core, digest, spec.get("decoder"), settings, names, known.disputed)


def _check_size_of_ids(path: Path, spec: Mapping[str, Any]) -> None:
    """Raise WeightsError for an id that no tokenizer has: the library makes tables up to the largest, or aborts."""
    model = spec.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    added = spec.get("added_tokens")
    ids = list(vocab.items()) if isinstance(vocab, Mapping) else []
    ids += [(one.get("content"), one.get("id")) for one in added or () if isinstance(one, Mapping)]
    for content, index in ids:
        if isinstance(index, int | float) and not 0 <= index < _MOST_IDS:
            raise WeightsError(
                f"{path}: token {content!r:.80} has the id {index!r:.40}, expected 0..{_MOST_IDS - 1}"
            )


@dataclass(frozen=True, slots=True)
class _Token:
    """A declared token, the id it is declared for, and where."""

    index: int
    token: AddedToken
    where: str


@dataclass(slots=True)
class _Declarations:
    """Tokens and names that the files beside tokenizer.json declare."""

    directory: Path
    spec: Mapping[str, Any]
    settings: Mapping[str, Any]
    tokens: list[_Token] = field(default_factory=list)
    names: dict[str, str | AddedToken] = field(default_factory=dict)
    extras: list[str | AddedToken] = field(default_factory=list)
    disputed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = str(self.directory / SETTINGS_FILE)
        self._take_names(where, self.settings)
        extras = next((self.settings[key] for key in _EXTRAS if self.settings.get(key)), None)
        self._take_extras(where, extras)
        if "added_tokens_decoder" in self.settings:
            self._take_decoder(f"{where}, 'added_tokens_decoder'", self.settings["added_tokens_decoder"])
        else:
            self._take_special_file(listed=bool(extras))
            self._take_added_file()
        padding = self.spec.get("padding")
        if isinstance(padding, Mapping) and isinstance(padding.get("pad_token"), str):
            self.names.setdefault("pad_token", padding["pad_token"])
        flags = {_content(one.token): one.token for one in self.tokens}
        for key in NAMED_TOKENS:
            if key in self.names:
                self.names[key] = flags.get(_content(self.names[key]), self.names[key])

    def _take_names(self, where: str, content: Mapping[str, Any], *, special: bool = False) -> None:
        """Named tokens; `special` where the file holds nothing but special tokens and does not say so."""
        others = [key for key in content if key.endswith("_token") and key not in NAMED_TOKENS]
        for key in (*NAMED_TOKENS, *others):
            value = content.get(key)
            if value is None:
                continue
            if (
                key in NAMED_TOKENS
                or isinstance(value, str)
                or (isinstance(value, Mapping) and "__type" in value)
            ):
                self.names[key] = _named(f"{where}, {key!r}", value, special=special)

    def _take_extras(self, where: str, value: Any, *, special: bool = False) -> None:
        """Additional special tokens: a list, or an object that names them."""
        if value is None:
            return
        if isinstance(value, Mapping):
            for key, one in value.items():
                self.names[key] = _named(f"{where}, {key!r} of the special tokens", one, special=special)
            return
        if not isinstance(value, list):
            raise WeightsError(
                f"{where}: the additional special tokens must be a list, found {checks.shown(value)}"
            )
        for number, one in enumerate(value):
            self.extras.append(_named(f"{where}, additional special token {number}", one, special=special))

    def _take_decoder(self, where: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise WeightsError(f"{where} must be an object, found {type(value).__name__}")
        for key, entry in value.items():
            if not _ID.fullmatch(key) or not isinstance(entry, Mapping):
                raise WeightsError(
                    f"{where}: expected ids with objects, found {checks.shown(key)}: {checks.shown(entry)}"
                )
            self.tokens.append(_Token(int(key), _flagged(f"{where}, {key!r}", entry), where))

    def _take_special_file(self, *, listed: bool) -> None:
        path = self.directory / SPECIAL_FILE
        content = _optional(path)
        before = dict(self.names)
        self._take_names(str(path), content, special=True)
        for key in self.names.keys() & before.keys():
            ours, theirs = _content(before[key]), _content(self.names[key])
            if ours != theirs:
                self.disputed[key] = (
                    f"{self.directory / SETTINGS_FILE} says {key} is {ours!r}, {path} says {theirs!r}: "
                    "one of them is out of date"
                )
        extra = content.get("extra_special_tokens")
        if extra is not None or not listed:
            self._take_extras(str(path), extra or content.get("additional_special_tokens"), special=True)

    def _take_added_file(self) -> None:
        path = self.directory / ADDED_FILE
        special = {_content(value) for value in (*self.names.values(), *self.extras)}
        for content, index in _optional(path).items():
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise WeightsError(f"{path}: the id of {content!r} must be an integer >= 0, found {index!r}")
            flag = content in special
            self.tokens.append(
                _Token(index, AddedToken(content, normalized=not flag, special=flag), str(path))
            )
        # Tokens that tokenizer.json has too keep its flags.
        own = {entry["content"]: entry for entry in self.spec.get("added_tokens") or ()}
        for number, one in enumerate(self.tokens):
            entry = own.get(_content(one.token))
            if entry is not None:
                self.tokens[number] = _Token(one.index, _flagged(str(path), entry), one.where)


def _add(core: tokenizers.Tokenizer, known: _Declarations) -> None:
    """Add what is not there yet, in transformers' order: the library numbers tokens as they come."""
    there = core.get_added_tokens_decoder()
    same = {repr(token) for token in there.values()}
    declared = sorted(known.tokens, key=lambda one: one.index)
    new = [one.token for one in declared if repr(one.token) not in same]
    spelt = {token.content for token in (*there.values(), *new)}
    for value in (*known.names.values(), *known.extras):
        if _content(value) not in spelt:
            spelt.add(_content(value))
            new.append(AddedToken(value, special=True) if isinstance(value, str) else value)
    named = {_content(value) for value in known.names.values()}
    for token in new:
        if token.content in named:
            token.special = True
    if new:
        core.add_tokens(new)


def _check_ids(core: tokenizers.Tokenizer, known: _Declarations, path: Path) -> None:
    """Raise WeightsError where a token did not get the id that a file declares for it."""
    for one in known.tokens:
        content = one.token.content
        actual = core.token_to_id(content)
        if not content or actual == one.index:
            continue
        holder = core.id_to_token(one.index)
        other = f", where {one.index} is {holder!r}" if holder is not None else ""
        raise WeightsError(
            f"{one.where}: {content!r} has the id {one.index} there, but {actual} by {path}{other}"
        )


def _named(where: str, value: Any, *, special: bool) -> str | AddedToken:
    """A token that is given as its spelling or as an object."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise WeightsError(
            f"{where} must be a string or an object with 'content', found {checks.shown(value)}"
        )
    return _flagged(where, {**value, "special": True} if special else value)


def _flagged(where: str, entry: Mapping[str, Any]) -> AddedToken:
    content = entry.get("content")
    if not isinstance(content, str):
        raise WeightsError(f"{where}: 'content' must be a string, found {checks.shown(content)}")
    flags = {key: entry[key] for key in _FLAGS if key in entry}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise WeightsError(f"{where}: {key!r} must be true or false, found {checks.shown(value)}")
    return AddedToken(content, **flags)


def _content(value: str | AddedToken) -> str:
    return value if isinstance(value, str) else str(value.content)


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return parse_object(path, read_bytes(path)) if kind_of(path) is not None else {}
