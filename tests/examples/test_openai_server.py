"""The HTTP example, as OpenAI's own client sees it, over the loopback."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.examples import example, serving

from pyramid_rt import Pyramid

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="needs the extra test")
openai = pytest.importorskip("openai", reason="needs the extra test")

CHAT = [{"role": "user", "content": "Hello"}]
ALL = {"ignore_eos": True}  # in extra_body: a random model may say at once that it is done


@pytest.fixture(scope="module")
def url(tiny_dir: Path) -> Iterator[str]:
    with serving("openai_server", "--weights", str(tiny_dir), "--device", "cpu", within=120) as address:
        yield address


@pytest.fixture
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def test_a_completion(client: Any, tiny: Pyramid) -> None:
    answer = client.completions.create(model="any", prompt="The quick", max_tokens=12, extra_body=ALL)
    expected = tiny.generate("The quick", max_new_tokens=12, ignore_eos=True)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, "length")
    assert answer.usage is not None
    assert answer.usage.model_dump(include=set(expected.usage)) == expected.usage
    assert (answer.object, answer.model) == ("text_completion", "any")


def test_a_chat(client: Any, tiny: Pyramid) -> None:
    answer = client.chat.completions.create(
        model="any", messages=CHAT, max_tokens=12, temperature=0.9, seed=5, extra_body=ALL
    )
    expected = tiny.generate(CHAT, max_new_tokens=12, temperature=0.9, seed=5, ignore_eos=True)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == expected.usage["total_tokens"]


def test_streams_add_up_and_end_with_usage(client: Any, tiny: Pyramid) -> None:
    options = {"model": "any", "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.completions.create(prompt="The quick", extra_body=ALL, **options))
    expected = tiny.generate("The quick", max_new_tokens=20, ignore_eos=True)
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected.text
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage.completion_tokens == 20
    assert len(parts) > 3
    said = list(client.chat.completions.create(messages=CHAT, extra_body=ALL, **options))
    text = "".join(part.choices[0].delta.content or "" for part in said if part.choices)
    assert text == tiny.generate(CHAT, max_new_tokens=20, ignore_eos=True).text
    assert said[0].choices[0].delta.role == "assistant"
    assert said[-1].usage.total_tokens == said[-1].usage.prompt_tokens + 20


def test_a_stop_string_ends_the_text(client: Any, tiny: Pyramid) -> None:
    text = tiny.generate("The quick", max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=2).text
    stop = text[5:7]
    options = {"model": "any", "prompt": "The quick", "max_tokens": 20, "temperature": 1.0, "seed": 2}
    answer = client.completions.create(stop=stop, extra_body=ALL, **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    answer = client.completions.create(stop=["never there", stop], extra_body=ALL, **options)
    assert answer.choices[0].text == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"max_tokens": -1}, None, "max_new_tokens"),
        ({"temperature": "hot"}, None, "temperature"),
        ({"n": 2}, "n", "n is not offered"),
        ({"presence_penalty": 1.5}, "presence_penalty", "not offered"),
        ({"stop": ""}, None, "stop"),
        ({"prompt": ["a", "b"]}, "prompt", "one prompt at a time"),
        ({"prompt": ""}, "prompt", "missing"),
        ({"prompt": [10**9]}, None, "out of range"),
        ({"prompt": "x" * 5000}, None, "max_seq"),
        ({"nonsense": 1}, "nonsense", "not offered"),
        ({"stream": "yes"}, "stream", "stream must be a bool"),
        ({"max_tokens": -1, "stream": True}, None, "max_new_tokens"),
    ],
)
def test_mistakes_are_json(client: Any, options: dict[str, object], param: str, words: str) -> None:
    body = {"prompt": "The", "max_tokens": 2, **options}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body=body, cast_to=object)
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.param == param
    assert words in caught.value.message


def test_a_body_that_is_no_json_is_told_so(url: str) -> None:
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        answer = httpx.post(f"{url}/completions", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["pyramid"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_pyramid(url: str, client: Any, stream: bool) -> None:
    """Twenty requests of 200 tokens whose clients leave: one that stays does not wait for all of them."""
    address = httpx.URL(url)
    body = json.dumps({"prompt": "The", "max_tokens": 200, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def whole() -> float:
        begin = time.monotonic()
        client.completions.create(model="any", prompt="The", max_tokens=200, extra_body=ALL)
        return time.monotonic() - begin

    alone = min(whole() for _ in range(2))
    for _ in range(20):
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(head + body)
            if stream:
                connection.recv(64)
    assert whole() < 10 * alone + 2


def test_requests_at_once_are_all_answered(url: str, tiny: Pyramid) -> None:
    expected = tiny.generate("The quick", max_new_tokens=8, ignore_eos=True).text
    body = {"prompt": "The quick", "max_tokens": 8, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: httpx.post(f"{url}/completions", json=body, timeout=60), range(24))
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}


def test_weights_that_are_not_there_are_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["openai_server.py", "--weights", "/no/such/place"])
    with pytest.raises(SystemExit):
        example("openai_server").main()
    assert capsys.readouterr().err.endswith(
        "error: /no/such/place does not exist; expected a weights directory\n"
    )
