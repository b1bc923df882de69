"""The Ray Serve example: two replicas on this machine, two hundred requests, one replica killed in the middle."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import signal
import threading

import pytest
from helpers.examples import serving

from pyramid_rt import demo_weights, load

pytest.importorskip("ray.serve", reason="needs the extra ray")
httpx = pytest.importorskip("httpx", reason="needs the extra test")

REQUESTS, AT_ONCE = 200, 8
PROMPTS = ("def f(", "import os", "class A:", "for i in ")


@pytest.mark.timeout(600)
def test_every_answer_is_right_or_a_clear_error_though_a_replica_dies() -> None:
    with load(demo_weights(), device="cpu") as rt:
        expected = {
            prompt: rt.generate(prompt, max_new_tokens=12, ignore_eos=True).text for prompt in PROMPTS
        }
    served: collections.Counter[str] = collections.Counter()
    killed = threading.Event()
    lock = threading.Lock()

    with serving("ray_serve", "--replicas", "2", "--device", "cpu", within=240) as url:

        def ask(number: int) -> str | None:
            """None where the answer is right; else what was wrong with it."""
            prompt = PROMPTS[number % len(PROMPTS)]
            body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True}
            try:
                answer = httpx.post(f"{url}/completions", json=body, timeout=120)
            except httpx.TransportError as error:
                return f"connection: {error!r}"
            if answer.status_code != 200:
                assert answer.status_code >= 500, (answer.status_code, answer.text)
                assert answer.text
                return f"status {answer.status_code}"
            assert answer.json()["choices"][0]["text"] == expected[prompt]
            replica = answer.headers["x-replica"]
            with lock:
                served[replica] += 1
                if sum(served.values()) >= REQUESTS // 2 and len(served) > 1 and not killed.is_set():
                    killed.set()
                    os.kill(int(replica), signal.SIGKILL)
            return None

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            wrong = [found for found in pool.map(ask, range(REQUESTS)) if found is not None]
        assert killed.is_set()
        # The dead one's requests, and those that were sent to it before it was missed.
        assert len(wrong) <= REQUESTS // 4, collections.Counter(wrong)
        assert sum(served.values()) + len(wrong) == REQUESTS
        assert len(served) >= 2
        assert ask(0) is None or ask(0) is None
