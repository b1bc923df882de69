"""From what a caller passes as a prompt to token ids that are safe to decode after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyramid_rt import checks
from pyramid_rt.errors import InputError
from pyramid_rt.text.chat import goes_on
from pyramid_rt.text.tokenizer import Tokenizer

EXPECTED = (
    "a string, a list of token ids, or a list of chat messages ({'role': ..., 'content': ...}); ids may also be a "
    "tensor or an array of integers with one dimension"
)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as token ids.

    Attributes:
        ids: each known to be in the vocabulary.
        open_end: the prompt ends within a text that is to go on; False for a chat whose template wrote the end.
    """

    ids: list[int]
    open_end: bool


def encode_prompt(
    prompt: Any,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    add_special_tokens: bool | None = None,
    continue_final_message: bool | None = None,
) -> EncodedPrompt:
    """Check a prompt and turn it into ids.

    Args:
        prompt: see `EXPECTED`.
        tokenizer: needed for texts and chats.
        vocab_size: ids lie below it.
        add_special_tokens: see `Tokenizer.encode` and `Tokenizer.encode_chat`; ids are taken as they are.
        continue_final_message: of a chat; see `Tokenizer.render_chat`.

    Raises:
        InputError: the prompt is none, or does not go with the options; or an id is out of the vocabulary.
    """
    if isinstance(prompt, str):
        _refuse_continuing(continue_final_message, "a text")
        text = checks.text("prompt", prompt)
        found = _needed(tokenizer, "a string prompt needs").encode(text, add_special_tokens)
        return EncodedPrompt(_produced(found, tokenizer, vocab_size), True)
    entries = _entries(prompt)
    if entries and is_message(entries[0]):
        known = _needed(tokenizer, "a chat prompt needs")
        found = known.encode_chat(
            entries, add_special_tokens=add_special_tokens, continue_final_message=continue_final_message
        )
        return EncodedPrompt(
            _produced(found, tokenizer, vocab_size), goes_on(entries, continue_final_message)
        )
    _refuse_continuing(continue_final_message, "token ids")
    if add_special_tokens:
        raise InputError("add_special_tokens=True needs a text or a chat; token ids are taken as they are")
    return EncodedPrompt(token_ids("prompt", entries, vocab_size), True)


def token_ids(name: str, values: Iterable[Any], vocab_size: int) -> list[int]:
    """Ids of a caller, each an integer in the vocabulary. Raises InputError with the first that is not."""
    ids: list[int] = []
    for position, value in enumerate(values):
        index = value if type(value) is int else _whole(name, position, value)
        if not 0 <= index < vocab_size:
            raise InputError(
                f"{name}: token id {checks.shown(index)} is out of range 0..{vocab_size - 1}, at [{position}]"
            )
        ids.append(index)
    return ids


def split_stops(stops: Sequence[str], tokenizer: Tokenizer | None) -> tuple[list[str], list[int]]:
    """Stop strings that are looked for in the text, and the ids of those that are special tokens.

    A special token never shows in text, so a stop string that is one stops at its id.

    Raises:
        InputError: there is no tokenizer; or a special token is part of a longer stop string, which could not match.
    """
    if not stops:
        return [], []
    known = _needed(tokenizer, "stop strings need")
    strings: list[str] = []
    ids: list[int] = []
    for number, stop in enumerate(stops):
        index = known.special_id(stop)
        if index is not None:
            ids.append(index)
            continue
        within = known.special_within(stop)
        if within is not None:
            raise InputError(
                f"stop[{number}] {stop!r} holds the special token {within!r}, which never shows in text, so it would "
                f"never match; give {within!r} alone"
            )
        strings.append(stop)
    return strings, ids


def is_message(value: Any) -> bool:
    """True where an entry of a prompt is a chat message, if perhaps a wrong one."""
    return isinstance(value, Mapping) or callable(getattr(value, "model_dump", None))


def _entries(prompt: Any) -> list[Any]:
    """The entries of a prompt that is no string, unchecked."""
    if isinstance(prompt, Mapping):
        if "input_ids" in prompt:
            hint = "pass its 'input_ids', those of one text, as a list"
        else:
            hint = "a chat is a list of messages, also of one: [message]"
        raise InputError(f"prompt must be {EXPECTED}; found {checks.shown(prompt)}: {hint}")
    shape = getattr(prompt, "shape", None)
    if shape is not None and len(shape) != 1:
        hint = "; of a batch of one, pass prompt[0]" if len(shape) > 1 else ""
        raise InputError(
            f"prompt must be {EXPECTED}; found {type(prompt).__name__} of shape {tuple(shape)}{hint}"
        )
    try:
        return checks.sequence("prompt", prompt, "token ids or of messages")
    except InputError:
        raise InputError(f"prompt must be {EXPECTED}; found {checks.shown(prompt)}") from None


def _whole(name: str, position: int, value: Any) -> int:
    try:
        return checks.whole(name, value)
    except InputError:
        raise InputError(
            f"{name} must hold token ids (integers); {name}[{position}] is {checks.shown(value)}"
        ) from None


def _needed(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise InputError(f"{what} a tokenizer, and this pyramid has none")
    return tokenizer


def _refuse_continuing(continue_final_message: bool | None, what: str) -> None:
    if continue_final_message:
        raise InputError(f"continue_final_message=True needs chat messages, found {what}")


def _produced(ids: list[int], tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Ids that the tokenizer made of a text: its files may know more tokens than the model."""
    for index in ids:
        if not 0 <= index < vocab_size:
            spelling = tokenizer.token(index) if tokenizer is not None else None
            raise InputError(
                f"prompt: the tokenizer makes token id {index} ({spelling!r}) of it, which is out of range "
                f"0..{vocab_size - 1}: the models have no such token"
            )
    return ids
