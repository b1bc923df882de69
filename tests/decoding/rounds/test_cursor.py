"""A cursor of the host and one of the device do the same with the same calls."""

from __future__ import annotations

import random

import pytest
import torch

from pyramid_rt.decoding.counters import COLUMN, COUNTERS
from pyramid_rt.decoding.rounds.cursor import Cursor, but_not, entry
from pyramid_rt.decoding.rules import Match
from pyramid_rt.decoding.state import RoundPlan, State

VOCAB, MAX_SEQ, STOP = 7, 40, 3
CPU = torch.device("cpu")


def start(host: bool, end: int = 5) -> tuple[Cursor, State]:
    plan = RoundPlan((Match(), Match()), (2, 3), 1, host_control=host, sampled=False, filters=False)
    state = State.allocate(plan, MAX_SEQ, VOCAB, CPU)
    state.end.fill_(end)
    state.limit.fill_(30)
    state.stop_mask[STOP] = True
    state.cached[2].fill_(end - 1)
    return Cursor(plan, state), state


def numbers(state: State) -> tuple[object, ...]:
    cached = [int(value) for value in state.cached]
    tokens = state.tokens[:MAX_SEQ].tolist()
    return int(state.end), bool(state.ended), cached, tokens, state.counters.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_both_kinds_agree(seed: int) -> None:
    found = []
    for host in (True, False):
        draw = random.Random(seed)
        cursor, state = start(host)
        for _ in range(4):
            cursor.look()
            begin = cursor.mark()
            for _ in range(draw.randint(1, 4)):
                cursor.put(torch.tensor([draw.randrange(VOCAB)]), cursor.unfinished())
            cursor.cache_holds(0, cursor.end - 1, True if host else torch.tensor(True))
            count = cursor.end - begin
            cursor.count_forwards(0, count)
            assert cursor.tokens(begin, 2).tolist() == state.tokens[int(begin) : int(begin) + 2].tolist()
            accepted = cursor.number(torch.tensor(draw.randint(0, int(count))))
            whole = accepted == count
            active = True if host else torch.tensor(True)
            replace = but_not(active, whole & cursor.ended)
            own = torch.arange(VOCAB)
            differing = torch.tensor(draw.randint(0, 1)) if draw.random() < 0.5 else None
            cursor.count_verify(0, (count, accepted, differing), (whole, replace, active))
            cursor.roll_back(1, begin + accepted, whole, active)
            cursor.put(entry(own, accepted), replace)
            cursor.store()
        found.append(numbers(state))
    assert found[0] == found[1]
    assert found[0][0] > 5  # type: ignore[operator]


def test_what_is_inactive_changes_nothing() -> None:
    for host in (True, False):
        cursor, state = start(host)
        before = numbers(state)
        inactive = False if host else torch.tensor(False)
        cursor.look()
        cursor.put(torch.tensor([STOP]), inactive)
        cursor.cache_holds(2, cursor.end + 1, inactive)
        cursor.roll_back(1, cursor.end - 2, inactive, inactive)
        cursor.store()
        assert numbers(state) == before


def test_the_host_writes_at_the_end_of_a_round_alone() -> None:
    cursor, state = start(host=True)
    cursor.look()
    cursor.put(torch.tensor([STOP]), True)
    assert (cursor.end, cursor.ended) == (6, True)
    assert (int(state.end), bool(state.ended)) == (5, False)
    cursor.store()
    assert (int(state.end), bool(state.ended)) == (6, True)


def test_a_round_that_was_broken_off_counts_for_nothing() -> None:
    cursor, state = start(host=True)
    cursor.look()
    cursor.count_forwards(1, 4)
    cursor.put(torch.tensor([1]), True)
    cursor.look()
    cursor.count_forwards(0, 1)
    cursor.store()
    expected = [[0] * len(COUNTERS) for _ in range(3)]
    expected[0][COLUMN["forwards"]] = 1
    assert state.counters.tolist() == expected
    assert int(state.end) == 5
