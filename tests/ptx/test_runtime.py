"""The whole runtime on compiled kernels: the demo pyramid decodes as it does with the torch backend.

Needs PYRAMID_PTX=sm_80 (or sm_90), as `make test-compiled` sets it; PYRAMID_PTX_TOKENS says how many tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyramid_rt
from ptx import device, machine
from ptx.machine import Schedule
from pyramid_rt import Pyramid

pytestmark = [
    pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING),
    pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80"),
    pytest.mark.timeout(1800),
]

TOKENS = int(os.environ.get("PYRAMID_PTX_TOKENS") or 32)
PROMPT = "def fib(n):\n"
DEMO = Path(pyramid_rt.__file__).parent / "demo"


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, Pyramid]]:
    """The demo pyramid on both, control on the device: with `triton`, kernels decide too."""
    options: dict[str, Any] = {"device": "cpu", "control": "device", "max_seq": 512}
    torch_one = pyramid_rt.load(DEMO, backend="torch", **options)
    triton_one = pyramid_rt.load(DEMO, backend="triton", **options)
    with torch_one, triton_one:
        yield {"torch": torch_one, "triton": triton_one}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["ar", "sd", "psd", "psd_f"])
def test_text_and_statistics_equal_those_of_torch(
    backends: dict[str, Pyramid], method: str, temperature: float
) -> None:
    """Races are looked for by the kernels' own tests; here the values count."""
    with device.scheduled(Schedule(seed=1, detect=False)):
        found = {
            name: pyramid.generate(
                PROMPT, method=method, max_new_tokens=TOKENS, temperature=temperature, seed=3
            )
            for name, pyramid in backends.items()
        }
    ours, theirs = found["triton"], found["torch"]
    assert ours.tokens == theirs.tokens
    assert ours.text == theirs.text
    for mine, other in zip(ours.stats.tiers, theirs.stats.tiers, strict=True):
        assert (mine.forwards, mine.proposed, mine.accepted, mine.survived) == (
            other.forwards,
            other.proposed,
            other.accepted,
            other.survived,
        )
