"""Chat messages to text, by the template that came with a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyramid_rt.errors import InputError

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A compiled Jinja template, run in a sandbox: it is a program that came with the weights."""

    def __init__(self, source: str, where: str) -> None:
        """Compile ``source``; ``where`` names it in errors.

        Raises:
            InputError: it is no valid template.
        """
        self._where = where
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # the compiler may stumble over a template in any way
            raise InputError(f"prompt: the chat template ({where}) is broken: {error}") from error

    def render(self, messages: Messages, names: Mapping[str, str]) -> str:
        """Return the chat up to where the assistant's answer begins.

        Args:
            messages: checked by `check_messages`.
            names: the special tokens the template may write, as ``bos_token``.

        Raises:
            InputError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **names,
            )
        except Exception as error:  # anything may come out of somebody else's program
            raise InputError(
                f"prompt: the chat template ({self._where}) refused the messages: {error}"
            ) from error


def check_messages(messages: Messages) -> None:
    """Raise InputError, naming the message and the key, unless each has a role and a content."""
    if not messages:
        raise InputError("prompt: the list of messages is empty")
    for index, message in enumerate(messages):
        where = f"prompt: message {index}"
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise InputError(f"{where} must be an object with role and content, found {kind}")
        for key in ("role", "content"):
            value = message.get(key)
            if value is None and key == "content" and message.get("tool_calls"):
                continue  # an assistant's turn may consist of calls alone
            if key not in message:
                raise InputError(f"{where} has no {key!r}, only {sorted(map(str, message))}")
            if not isinstance(value, str):
                raise InputError(f"{where}: {key!r} must be a string, found {type(value).__name__}")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is its body and no more."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _chat_environment() -> ImmutableSandboxedEnvironment:
    """The whitespace rules, filters and globals that published templates were written against."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _chat_environment()
