"""Chat messages to text, by the template that came with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from pyramid_rt import checks
from pyramid_rt.errors import InputError
from pyramid_rt.text.sandbox import TemplateEnvironment, bounded, written

MAX_TEMPLATE = 2**18
ASSISTANT = "assistant"

# Stands at the end of the message that is to be continued while the chat is rendered: no text has it, and a template
# that trims the message takes its blank off.
_MARK = "\ue0f1\ue0f2\ue0f1"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled Jinja template, run in a sandbox: it is a program that came with the weights."""

    def __init__(self, source: str, where: str) -> None:
        """Compile ``source``; ``where`` names it in errors.

        Raises:
            InputError: it is no valid template.
        """
        self._where = where
        if len(source) > MAX_TEMPLATE:
            raise InputError(
                f"prompt: the chat template ({where}) has {len(source)} characters, more than {MAX_TEMPLATE}"
            )
        try:
            with bounded():
                self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # the compiler may stumble over a template in any way
            raise InputError(f"prompt: the chat template ({where}) is broken: {error}") from error

    def render(
        self,
        messages: Sequence[Any],
        names: Mapping[str, str],
        continue_final_message: bool | None = None,
    ) -> str:
        """Return the chat up to where the assistant's answer begins, or goes on.

        Args:
            messages: see `plain_messages`.
            names: the special tokens the template may write, as ``bos_token``.
            continue_final_message: True: up to the end of the last message's text, without what closes it. False:
                all messages, and the head of an answer. None: True where the last message is the assistant's.

        Raises:
            InputError: a message is malformed, the template refuses the messages or takes too much, or it drops the
                text that is to be continued.
        """
        chat = plain_messages(messages)
        if not _goes_on(chat, continue_final_message):
            return self._run(chat, names, add_generation_prompt=True)
        last = chat[-1]
        content = last.get("content")
        if content is None:
            raise InputError("prompt: continue_final_message needs a last message with content, found none")
        text = self._run(
            [*chat[:-1], {**last, "content": content + _MARK + " "}], names, add_generation_prompt=False
        )
        end = text.rfind(_MARK)
        if end < 0 or content.strip() not in text[:end]:
            raise InputError(
                f"prompt: the chat template ({self._where}) does not write the last message as it is, so that its "
                "text cannot be continued; continue_final_message=False asks for a new answer after it"
            )
        trimmed = not text.startswith(_MARK + " ", end)
        return text[:end].rstrip() if trimmed else text[:end]

    def _run(self, chat: list[dict[str, Any]], names: Mapping[str, str], add_generation_prompt: bool) -> str:
        try:
            with bounded():
                return written(
                    self._template.generate(
                        messages=[_with_reasoning(message) for message in chat],
                        tools=None,
                        documents=None,
                        add_generation_prompt=add_generation_prompt,
                        **names,
                    )
                )
        except Exception as error:  # anything may come out of somebody else's program
            raise InputError(
                f"prompt: the chat template ({self._where}) refused the messages: {error}"
            ) from error


def goes_on(messages: Sequence[Any], continue_final_message: bool | None) -> bool:
    """True where the text of a chat ends within its last message; see `ChatTemplate.render`."""
    return _goes_on(plain_messages(messages), continue_final_message)


def _goes_on(chat: Sequence[Mapping[str, Any]], continue_final_message: bool | None) -> bool:
    if continue_final_message is not None:
        return continue_final_message
    last = chat[-1]
    return last["role"] == ASSISTANT and "content" in last and not last.get("tool_calls")


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as templates expect them, in plain values: strings, numbers, lists and dicts.

    A message is a mapping with a ``role`` and a ``content``, or an object with ``model_dump`` (as the client of an
    OpenAI server gives them). The content is a string, or a list of parts ``{"type": "text", "text": ...}``, which
    are joined as they are. It may be missing where there are ``tool_calls``. Keys whose value is None are left out.

    Raises:
        InputError: names the message, the key and what was found.
    """
    if not messages:
        raise InputError("prompt: the list of messages is empty")
    plain = []
    for index, message in enumerate(messages):
        where = f"prompt: message {index}"
        try:
            plain.append(_plain_message(where, message))
        except InputError:
            raise
        except RecursionError:
            raise InputError(f"{where} is nested too deep, or holds itself") from None
        except Exception as error:  # a caller's own type may raise anything
            raise InputError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    return plain


def _plain_message(where: str, message: Any) -> dict[str, Any]:
    dump = getattr(message, "model_dump", None)
    if callable(dump) and not isinstance(message, Mapping):
        message = dump()
    if not isinstance(message, Mapping):
        found = f"{type(message).__name__}: {checks.shown(message)}"
        raise InputError(f"{where} must be an object with role and content, found {found}")
    plain: dict[str, Any] = {}
    for key, value in message.items():
        if value is not None:
            name = checks.text(f"{where}: every key", key)
            plain[name] = _plain(f"{where}: {name!r}", value)
    for key in ("role", "content"):
        if key == "content" and plain.get("tool_calls") and plain.get(key) is None:
            continue  # an assistant's turn may consist of calls alone
        if key not in message:
            raise InputError(f"{where} has no {key!r}, only {sorted(map(str, message))}")
        value = _joined(where, plain.get(key)) if key == "content" else plain.get(key)
        if not isinstance(value, str):
            raise InputError(f"{where}: {key!r} must be a string, found {type(value).__name__}")
        plain[key] = value
    return plain


def _joined(where: str, content: Any) -> Any:
    """Text parts put together; anything but a list of parts as it is."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for number, part in enumerate(content):
        place = f"{where}: part {number} of 'content'"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            found = checks.shown(kind if isinstance(part, dict) else part)
            raise InputError(
                f'{place} must be text, {{"type": "text", "text": ...}}, found {found}: these models read no other'
            )
        texts.append(checks.text(f"{place}: 'text'", part.get("text")))
    return "".join(texts)


def _plain(where: str, value: Any) -> Any:
    """A value in the types of JSON, for the template to see nothing else; InputError for what is none of them."""
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {checks.text(f"{where}: every key", key): _plain(where, one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(where, one) for one in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            number = value.item()
        except Exception:  # a tensor without data
            raise InputError(
                f"{where}: a value must be text, a number or one of their lists and objects"
            ) from None
        return _plain(where, number)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return _plain(where, dump())
    raise InputError(f"{where} must hold text, numbers, lists and objects, found {type(value).__name__}")


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning can be read by each of the names that templates use."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is its body and no more."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _chat_environment() -> TemplateEnvironment:
    """The whitespace rules, filters and globals that published templates were written against."""
    environment = TemplateEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _chat_environment()
