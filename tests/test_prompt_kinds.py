"""A prompt is a string, a list of token ids or a list of messages; anything else is refused by what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyramid_rt import InputError, Pyramid
from pyramid_rt.text.chat import plain_messages

MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    "prompt",
    [
        None, 5, 1.5, True, b"def f", bytearray(b"x"), {5, 6}, {5: 6}, iter([5, 6]), object(), print,
        torch.tensor([[5, 6, 7]]), torch.tensor(5), np.array([[5]]), (n for n in (5, 6)),
    ],
)  # fmt: skip
def test_other_kinds_are_refused(tiny: Pyramid, prompt: Any) -> None:
    with pytest.raises(InputError, match=r"prompt.*a list.*found"):
        tiny.generate(prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    "prompt",
    [
        [5, "6"], [5, None], [5.0], [True], [5, MESSAGE], [torch.tensor(5.0)], torch.tensor([5.0]), [[5]],
        np.array(["a"]), [10**400], [-1],
    ],
)  # fmt: skip
def test_what_is_no_token_id_is_refused(tiny: Pyramid, prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt"):
        tiny.generate(prompt, max_new_tokens=1)


def test_one_message_without_its_list_is_told_so(tiny: Pyramid) -> None:
    with pytest.raises(InputError, match=r"list of messages, also of one: \[message\]"):
        tiny.generate(MESSAGE, max_new_tokens=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="message 1 must be an object with role and content, found int: 5"):
        tiny.generate([MESSAGE, 5], max_new_tokens=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt",
    [
        (5, 6, 7), range(5, 8), np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int32(5), np.uint8(6), 7],
        [torch.tensor(5), 6, 7],
    ],
)  # fmt: skip
def test_integers_of_any_library_are_token_ids(tiny: Pyramid, prompt: Any) -> None:
    tokens = tiny.generate([5, 6, 7], max_new_tokens=4).tokens
    assert tiny.generate(prompt, max_new_tokens=4).tokens == tokens


class Failing:
    def model_dump(self) -> dict[str, Any]:
        raise ValueError("not today")


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "a", "x": _nested(5000)}, "nested too deep, or holds itself"),
        ({"role": "user", "content": _endless()}, "nested too deep, or holds itself"),
        (Failing(), "cannot be read: ValueError: not today"),
    ],
)
def test_messages_that_cannot_be_read(message: Any, words: str) -> None:
    with pytest.raises(InputError, match=rf"^prompt: message 0 .*{words}"):
        plain_messages([message])
