"""kernels/decide/sample.py: one token put without a verify."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.decode_states import BASE, control_of, make_decode_state, open_verify, put_rows, random_rows
from helpers.equality import assert_equal_tensors
from helpers.oracle import CONFIG, DEVICE, sums_of_squares

from pyramid_rt.kernels.decide import filters as filter_kernels
from pyramid_rt.kernels.decide import sample
from pyramid_rt.kernels.decide.decode_state import DecodeState, active_at
from pyramid_rt.kernels.forward import head
from pyramid_rt.kernels.limits import NO_POSITION
from pyramid_rt.kernels.reference import sampling as ops


def own_token(rows: torch.Tensor, state: DecodeState) -> int:
    if float(state.temperature) == 0:
        return int(rows[0].argmax())
    noise = ops.own_noise(state.seed.cpu(), torch.tensor([BASE]), rows.shape[1])
    return int((rows / float(state.temperature) + noise)[0].argmax())


def drawn(rows: torch.Tensor, *, tiers: int = 2, temperature: float = 0.7, limit: int = 90) -> DecodeState:
    """A decode state whose lowest tier is about to draw for the position `BASE`."""
    state = make_decode_state(rows.shape[1], 2, tiers=tiers, temperature=temperature)
    open_verify(state, [], level=1 if tiers > 1 else 0, limit=limit)
    put_rows(state, 0, rows)
    return state


@pytest.mark.parametrize("tiers", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("vocab", [5, 101, 4099])
def test_a_draw(vocab: int, temperature: float, tiers: int) -> None:
    rows = random_rows(1, vocab, seed=vocab)
    state = drawn(rows, tiers=tiers, temperature=temperature)
    sample.plan(state, 0, first=False, stored=False).run()
    found = control_of(state)
    assert int(state.tokens[BASE]) == own_token(rows, state)
    assert (found["end"], found["ended"], found["bad"]) == (BASE + 1, False, [NO_POSITION] * tiers)
    assert found["cached"][0] == BASE  # type: ignore[index]
    assert (int(state.origin[BASE]), int(state.source[0])) == (0, 0)
    assert state.counters.sum() == state.counters[0, 6] == 1
    # Only plain decoding opens a round here; else the proposal goes on.
    assert found["base"] == [BASE + 1 if tiers == 1 else BASE] * tiers


@pytest.mark.parametrize("stored", [False, True])
def test_the_first_token_opens_the_first_round(stored: bool) -> None:
    rows = random_rows(1, 101, seed=3)
    state = make_decode_state(101, 2, tiers=3)
    state.top_k.fill_(1)
    state.control[0], state.control[1] = BASE, 90
    sample.plan_begin(state).run()
    assert control_of(state)["base"] == [BASE] * 3
    put_rows(state, 2, rows)
    if stored:
        filter_kernels.plan(state, 2, 1, draw=True, filters=True).run()
    sample.plan(state, 2, first=True, stored=stored).run()
    found = control_of(state)
    assert int(state.tokens[BASE]) == (int(rows.argmax()) if stored else own_token(rows, state))
    assert (found["end"], found["base"], found["active"]) == (BASE + 1, [BASE + 1] * 3, [1] * 3)
    assert found["cached"] == [0, 0, BASE]
    assert not state.counters.any()


@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_a_stop_token_ends_the_burst(tiers: int) -> None:
    rows = random_rows(1, 101, seed=3)
    state = drawn(rows, tiers=tiers)
    state.stop_mask[own_token(rows, state)] = True
    for _ in range(2):
        sample.plan(state, 0, first=False, stored=False).run()
        assert (control_of(state)["end"], control_of(state)["ended"]) == (BASE + 1, True)
        # The proposal is still to be judged.
        assert control_of(state)["active"] == [0, *[1] * (tiers - 1)]
    assert int(state.counters[0, 6]) == 1


def test_a_burst_goes_on_where_there_is_room() -> None:
    state = drawn(random_rows(1, 101, seed=3), limit=BASE + 2)
    for active in ([1, 1], [0, 1]):
        put_rows(state, 0, random_rows(1, 101, seed=4), base=int(state.control[0]))
        sample.plan(state, 0, first=False, stored=False).run()
        assert control_of(state)["active"] == active


@pytest.mark.parametrize("why", ["limit", "inactive"])
def test_nothing_is_put_at_the_limit_or_where_the_round_is_inactive(why: str) -> None:
    state = drawn(random_rows(1, 101, seed=3), limit=BASE if why == "limit" else 90)
    if why == "inactive":
        state.control[active_at(2, 0)] = 0
    before = state.control.clone()
    sample.plan(state, 0, first=False, stored=False).run()
    assert_equal_tensors(state.control, before)
    assert not state.tokens.any()
    assert not state.counters.any()


@pytest.mark.parametrize("tiers", [1, 2])
def test_the_end_of_plain_decoding_closes_the_round(tiers: int) -> None:
    state = drawn(random_rows(1, 101, seed=3), tiers=tiers, limit=BASE + 1)
    sample.plan(state, 0, first=False, stored=False).run()
    assert control_of(state)["active"] == ([0] if tiers == 1 else [0, 1])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_cannot_be_decided_are_reported(value: float) -> None:
    rows = random_rows(1, 101, seed=3)
    rows[0] = value if value == -math.inf else rows[0]
    rows[0, 70] = value
    state = drawn(rows)
    sample.plan(state, 0, first=False, stored=False).run()
    assert control_of(state)["bad"] == [BASE, NO_POSITION]
    assert 0 <= int(state.tokens[BASE]) < 101


@pytest.mark.parametrize(("level", "first"), [(1, False), (0, True), (2, True)])
def test_refuses(level: int, first: bool) -> None:
    with pytest.raises(ValueError, match=r"^level "):
        sample.plan(make_decode_state(101, 2), level, first=first, stored=False)


def test_the_tests_leave_rows_as_the_head_does() -> None:
    width, vocab = 40, 101
    weight, x = (
        random_rows(vocab, width, seed=1, spread=0.3).to(DEVICE),
        random_rows(64, width, seed=2).to(DEVICE),
    )
    head_board, state = (make_decode_state(vocab, 31, temperature=0.8) for _ in range(2))
    positions = torch.arange(3, device=DEVICE) + BASE
    drawn_noise = head.Noise(head_board.seed, positions, head_board.temperature)
    rows, found = head_board.rows[1], head_board.statistics_of(1)
    head.run(
        x, sums_of_squares(x, 64), 1e-5, weight, positions, vocab, rows, found,
        drawn_noise, CONFIG,
    )  # fmt: skip
    put_rows(state, 1, rows[:3, :vocab])
    expected = state.statistics_of(1)
    assert_equal_tensors(rows[:3], state.rows[1, :3])
    assert_equal_tensors(found.peak[:3], expected.peak[:3])
    assert_equal_tensors(found.token[:3], expected.token[:3])
    torch.testing.assert_close(found.total[:3], expected.total[:3], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.best[:3], expected.best[:3], rtol=1e-6, atol=1e-6)


def test_a_board_must_fit_together() -> None:
    state = make_decode_state(101, 2)
    for name, value in (
        ("control", torch.zeros(5, dtype=torch.int64, device=DEVICE)),
        ("stop_mask", torch.zeros(90, dtype=torch.bool, device=DEVICE)),
        ("counters", torch.zeros(2, 6, dtype=torch.int64, device=DEVICE)),
        ("seed", torch.zeros(2, dtype=torch.int32, device=DEVICE)),
    ):
        kept = {field: getattr(state, field) for field in DecodeState.__dataclass_fields__}
        with pytest.raises(ValueError, match=rf"^state\.({name}|rows) "):
            sample.plan_begin(DecodeState(**(kept | {name: value})))
    for name in ("tiers_count", "row_count", "capacity", "vocab_size"):
        sizes = {"tiers_count": 2, "row_count": 4, "capacity": 80, "vocab_size": 9, name: 0}
        with pytest.raises(ValueError, match=f"^{name} "):
            DecodeState.allocate(**sizes, lists=False, device=DEVICE)
