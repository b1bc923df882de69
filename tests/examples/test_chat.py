"""The chat example: turns build on each other, Ctrl-C ends an answer, and old turns make room for new ones."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.examples import example

from pyramid_rt import InputError, Pyramid

chat = example("chat")
SHORT: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}


def test_each_answer_follows_from_all_that_was_said(tiny: Pyramid) -> None:
    pieces: list[str] = []
    talk = chat.Chat(tiny, pieces.append, "Be brief.", **SHORT)
    chat.converse(talk, ["Hello", "And you?", "", "never read"], lambda _: None)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    first = tiny.generate(asked, **SHORT).text
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "And you?"}]
    second = tiny.generate(asked, **SHORT).text
    assert talk.messages == [*asked, {"role": "assistant", "content": second}]
    assert "".join(pieces) == first + second


def test_only_the_new_message_is_processed(tiny: Pyramid) -> None:
    talk = chat.Chat(tiny, lambda _: None, None, **SHORT)
    first = talk.say("Hello").stats
    assert talk.say("And you?").stats.reused_tokens >= first.prompt_tokens - 1


def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny: Pyramid) -> None:
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    talk = chat.Chat(tiny, write, None, max_new_tokens=150, ignore_eos=True)
    result = talk.say("Hello")
    assert result.finish_reason == "cancelled"
    assert len(result.tokens) < 150
    assert talk.messages[-1] == {"role": "assistant", "content": result.text}
    assert len(talk.say("Again").tokens) > 0


def test_the_oldest_turns_make_room(tiny: Pyramid) -> None:
    said: list[str] = []
    talk = chat.Chat(tiny, lambda _: None, "S", **SHORT)
    chat.converse(talk, ["x" * 100] * 4, said.append)
    assert talk.messages[0] == {"role": "system", "content": "S"}
    assert len(talk.messages) < 1 + 2 * 4
    assert talk.messages[-1]["role"] == "assistant"
    chat.converse(talk, ["y" * 400], said.append)
    assert any("max_seq" in piece for piece in said)
    with pytest.raises(InputError, match="max_seq"):
        talk.say("y" * 400)


def test_weights_that_are_not_there_are_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["chat.py", "/no/such/place"])
    assert chat.main() == 2
    assert capsys.readouterr().err == "error: /no/such/place does not exist; expected a weights directory\n"
