"""kernels/decide/readback.py, and the reader of rounds: the same vector from the kernel and from torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracle import DEVICE

from pyramid_rt import Fuzzy, Match
from pyramid_rt.decoding.place import place_for
from pyramid_rt.decoding.readback import RoundReader
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.kernels.decide import readback

PLAN = RoundPlan((Fuzzy(0.2), Match()), (3, 5), 2, host_control=False, sampled=True, filters=False)
MAX_SEQ = 40


def scrambled(state: State, end: int) -> State:
    """Numbers everywhere, each of its own."""
    numbers = iter(range(1000, 10**6))
    for tensor in (state.tokens, state.counters, state.bad):
        values = [next(numbers) for _ in range(tensor.numel())]
        tensor.copy_(torch.tensor(values, device=DEVICE).reshape(tensor.shape))
    for cached in state.cached:
        cached.fill_(next(numbers))
    state.end.fill_(end)
    state.ended.fill_(end % 2 == 1)
    return state


@pytest.mark.parametrize("ends", [(7, 12, 13), (90, 98, 104)])
def test_kernel_and_torch_report_the_same(ends: tuple[int, ...]) -> None:
    device = torch.device(DEVICE)
    by_kernels = scrambled(State.for_kernels(PLAN, MAX_SEQ, 11, device), ends[0])
    plain = scrambled(State.allocate(PLAN, MAX_SEQ, 11, device), ends[0])
    readers = [RoundReader(PLAN, state, 1, place_for(device)) for state in (by_kernels, plain)]
    for reader in readers:
        reader.restart(ends[0] - 2)
    for end in ends:
        for state in (by_kernels, plain):
            state.end.fill_(end)
            state.ended.fill_(end % 2 == 1)
        seen = []
        for reader in readers:
            reader.gather()
            reader.post()
            seen.append(reader.take())
        assert seen[0] == seen[1]
        assert seen[0].end == end
        assert seen[0].ended == (end % 2 == 1)
        begin = ends[0] - 2 if end == ends[0] else ends[ends.index(end) - 1]
        known = by_kernels.tokens[begin:end].tolist()
        assert seen[0].tokens == known
        assert seen[0].counters == by_kernels.counters.tolist()


def test_rounds_are_read_in_their_order_and_dropped_together() -> None:
    state = scrambled(State.allocate(PLAN, MAX_SEQ, 11, torch.device(DEVICE)), 5)
    reader = RoundReader(PLAN, state, 1, place_for(torch.device(DEVICE)))
    reader.restart(5)
    for end in (7, 10):
        state.end.fill_(end)
        reader.gather()
        reader.post()
    assert reader.posted == 2
    assert [reader.take().end, reader.take().end] == [7, 10]
    for _ in range(5):
        reader.gather()
        reader.post()
        reader.restart(6)
        assert reader.posted == 0


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("reported", {"reported": torch.zeros(1, dtype=torch.int64, device=DEVICE)}),
        ("numbers", {"numbers": torch.zeros(5, dtype=torch.int64, device=DEVICE)}),
        ("most", {"most": 0}),
    ],
)
def test_refuses(argument: str, change: dict[str, Any]) -> None:
    state = State.for_kernels(PLAN, MAX_SEQ, 11, torch.device(DEVICE)).decode_state
    size = 3 + 9 * 3 + 4
    arguments: dict[str, Any] = {
        "state": state,
        "reported": torch.zeros((), dtype=torch.int64, device=DEVICE),
        "numbers": torch.zeros(size, dtype=torch.int64, device=DEVICE),
        "most": 4,
    }
    with pytest.raises(ValueError, match=f"^{argument} "):
        readback.plan(**(arguments | change))
