"""Files of prompts: JSON lines, or plain text with a line between two prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.json_files import read_bytes
from pyramid_rt.text.tokenizer import Tokenizer

JSON_LINES = (".jsonl", ".ndjson")
SEPARATOR = "---"


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """A prompt and where it stands.

    Attributes:
        where: file and line, for messages.
        content: a text, or chat messages.
    """

    where: str
    content: str | list[dict[str, Any]]


def read_prompts(file: str | Path) -> list[FilePrompt]:
    """Read a file of prompts, UTF-8.

    A file that ends in ``.jsonl`` or ``.ndjson`` has one JSON object a line, ``{"prompt": "..."}`` or
    ``{"messages": [{"role": ..., "content": ...}, ...]}``; empty lines do not count. Any other file is text, with
    a line of just ``---`` between two prompts; the last newline of a prompt does not belong to it.

    Raises:
        InputError: the file cannot be read, a prompt is empty or malformed, or there is none; names the line.
    """
    file = Path(file)
    try:
        # Newlines are taken as they are: splitlines() would also split at form feeds and the like.
        text = read_bytes(file).decode("utf-8").replace("\r\n", "\n")
    except WeightsError as error:  # of a file, a device, a pipe
        raise InputError(str(error)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start})") from error
    lines = text.split("\n")
    parsed = _json_lines(file, lines) if file.suffix in JSON_LINES else _plain(file, lines)
    prompts = list(parsed)
    if not prompts:
        raise InputError(f"{file}: expected at least one prompt, found none")
    return prompts


def encode(prompt: FilePrompt, tokenizer: Tokenizer, max_seq: int) -> list[int]:
    """A prompt as token ids. Raises InputError, with the place, also where it leaves no room in the context."""
    try:
        if isinstance(prompt.content, str):
            ids = tokenizer.encode(prompt.content)
        else:
            ids = tokenizer.encode_chat(prompt.content)
    except InputError as error:
        raise InputError(f"{prompt.where}: {error}") from error
    # Two tokens are the least from which anything can be measured.
    if not 0 < len(ids) <= max_seq - 2:
        raise InputError(
            f"{prompt.where}: the prompt has {len(ids)} tokens; expected 1 to {max_seq - 2}, as max_seq is {max_seq}"
        )
    return ids


def _plain(file: Path, lines: list[str]) -> Iterator[FilePrompt]:
    first = 0
    for index in [*(i for i, line in enumerate(lines) if line == SEPARATOR), len(lines)]:
        block = lines[first:index]
        if index == len(lines) and not any(line.strip() for line in block):
            return  # what follows the last separator, or an empty file
        if index == len(lines) and not block[-1]:
            block.pop()  # the file's last newline
        if not any(line.strip() for line in block):
            raise InputError(f"{file}, line {first + 1}: the prompt is empty")
        yield FilePrompt(f"{file}, line {first + 1}", "\n".join(block))
        first = index + 1


def _json_lines(file: Path, lines: list[str]) -> Iterator[FilePrompt]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON: {error}") from error
        except RecursionError:
            raise InputError(f"{where}: nested too deep") from None
        yield FilePrompt(where, _content(where, entry))


def _content(where: str, entry: Any) -> str | list[dict[str, Any]]:
    if not isinstance(entry, dict) or len(entry.keys() & {"prompt", "messages"}) != 1:
        raise InputError(
            f'{where}: expected an object with either "prompt" or "messages", found {_short(entry)}'
        )
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str) or not entry["prompt"]:
            raise InputError(f'{where}: "prompt" must be a text, found {_short(entry["prompt"])}')
        return str(entry["prompt"])
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise InputError(f'{where}: "messages" must be a list of objects, found {_short(messages)}')
    return messages


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
