"""kernels/decide/filters.py against the reference filters, in Triton's interpreter or on the GPU."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.decode_states import BASE, make_decode_state, open_verify, put_rows, random_rows
from helpers.equality import assert_equal_tensors, assert_everywhere
from helpers.oracle import DEVICE

from pyramid_rt.kernels.decide import filters as filter_kernels
from pyramid_rt.kernels.decide.decode_state import DecodeState, active_at
from pyramid_rt.kernels.reference import sampling as ops

# Values of top_k, top_p, min_p, as a request may set them together.
FILTERS = (
    (0, 0.9, 0.0), (3, 1.0, 0.0), (0, 1.0, 0.05), (70, 0.95, 0.01), (3, 0.5, 0.5), (5000, 0.99, 0.0),
    (1, 1.0, 0.0), (0, 1.0, 1.0), (0, 0.001, 0.0),
)  # fmt: skip


def rows_of_all_kinds(vocab: int) -> torch.Tensor:
    """A plain row, one of few values many times, one that is -inf in half of its entries, and a one-hot one."""
    rows = random_rows(4, vocab, seed=vocab)
    rows[1] = torch.randint(-3, 9, (vocab,), generator=torch.Generator().manual_seed(1)).float()
    rows[2, vocab // 2 :] = -math.inf
    rows[3] = -math.inf
    rows[3, vocab - 1] = 2.0
    return rows


def with_filters(
    vocab: int, rows: torch.Tensor, temperature: float, values: tuple[int, float, float]
) -> DecodeState:
    state = make_decode_state(vocab, rows.shape[0], temperature=temperature)
    for name, value in zip(("top_k", "top_p", "min_p"), values, strict=True):
        getattr(state, name).fill_(value)
    put_rows(state, 1, rows)
    open_verify(state, [0] * (rows.shape[0] - 1))
    return state


def check(state: DecodeState, rows: torch.Tensor, *, filters: bool) -> None:
    """Cut, normaliser and own tokens of tier 1 against the reference."""
    count, vocab = rows.shape
    rows = rows.to(DEVICE)
    processed = ops.process_logits(
        rows,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        filters=filters,
    )
    scaled = ops.process_logits(
        rows,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        filters=False,
    )
    kept = (scaled >= state.cut[1, :count, None]) & (scaled > -math.inf)
    assert_equal_tensors(kept, processed > -math.inf)
    exact = processed.double().logsumexp(-1)
    torch.testing.assert_close(state.normaliser[1, :count].double(), exact, rtol=1e-6, atol=2e-6)
    noise = ops.own_noise(state.seed, torch.arange(count, device=DEVICE) + BASE, vocab)
    assert state.own[1, :count].tolist() == (processed + noise).argmax(-1).tolist()
    assert state.non_finite[1, :count].tolist() == [0] * count
    assert_everywhere(state.own[1, count:] < 0, state.own[1, count:])
    assert_everywhere(state.normaliser[1, count:].isnan(), state.normaliser[1, count:])
    assert not state.arrivals.any()


@pytest.mark.parametrize("values", FILTERS, ids=str)
@pytest.mark.parametrize(("vocab", "temperature"), [(5, 1.3), (101, 0.7)])
def test_filters_are_those_of_the_reference(
    vocab: int, temperature: float, values: tuple[int, float, float]
) -> None:
    rows = rows_of_all_kinds(vocab)
    state = with_filters(vocab, rows, temperature, values)
    filter_kernels.plan(state, 1, 4, draw=False, filters=True).run()
    check(state, rows, filters=True)


@pytest.mark.parametrize("values", [(40, 0.8, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2)], ids=str)
def test_rows_of_more_than_one_share(values: tuple[int, float, float]) -> None:
    rows = random_rows(1, 4801, seed=3)
    state = with_filters(4801, rows, 0.8, values)
    filter_kernels.plan(state, 1, 1, draw=False, filters=True).run()
    check(state, rows, filters=True)


def test_a_vocabulary_of_49152() -> None:
    rows = random_rows(1, 49152, seed=9)
    state = with_filters(49152, rows, 0.5, (20, 0.9, 0.0))
    filter_kernels.plan(state, 1, 1, draw=False, filters=True).run()
    check(state, rows, filters=True)
    # Only what is near the top was listed.
    assert int(state.amounts[0].sum()) < 200


@pytest.mark.parametrize("vocab", [7, 101, 4801])
def test_without_filters_only_the_sum_is_taken(vocab: int) -> None:
    rows = random_rows(2, vocab, seed=vocab)
    state = make_decode_state(vocab, 2, temperature=1.4, lists=False)
    put_rows(state, 1, rows)
    put_rows(state, 0, rows.flip(-1))
    open_verify(state, [1])
    filter_kernels.plan(state, 1, 2, draw=False, filters=False, below=True).run()
    check(state, rows, filters=False)
    below = (rows[0].flip(-1) / 1.4).double().logsumexp(-1)
    assert float(state.normaliser[0, 0]) == pytest.approx(float(below), abs=2e-6)
    assert_everywhere(state.normaliser[0, 1:].isnan(), state.normaliser[0, 1:])


def test_a_short_proposal_leaves_the_later_rows_below_alone() -> None:
    state = make_decode_state(101, 3, temperature=1.4, lists=False)
    for level in range(2):
        put_rows(state, level, random_rows(3, 101, seed=level))
    open_verify(state, [1])
    filter_kernels.plan(state, 1, 3, draw=False, filters=False, below=True).run()
    assert state.normaliser[0, :3].isnan().tolist() == [False, True, True]
    assert state.normaliser[1, :3].isnan().tolist() == [False, False, True]


def test_the_unfiltered_winner_may_fall() -> None:
    # All entries alike and top-k 1 of a row whose largest entry is not the noisy winner.
    rows = torch.zeros(1, 101)
    rows[0, 40] = 1e-3
    state = with_filters(101, rows, 1.0, (1, 1.0, 0.0))
    assert int(state.statistics.token[1, 0][state.statistics.best[1, 0].argmax()]) != 40
    filter_kernels.plan(state, 1, 1, draw=False, filters=True).run()
    assert int(state.own[1, 0]) == 40


def test_temperature_0_in_the_same_binary() -> None:
    rows = rows_of_all_kinds(101)
    rows[0, 17] = rows[0, 60] = 50.0
    state = with_filters(101, rows, 0.0, (3, 0.5, 0.0))
    filter_kernels.plan(state, 1, 4, draw=False, filters=True).run()
    assert state.own[1, :4].tolist() == rows.argmax(-1).tolist()
    assert int(state.own[1, 0]) == 17


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_cannot_be_decided(value: float) -> None:
    rows = random_rows(2, 101, seed=2)
    rows[0] = value if value == -math.inf else rows[0]
    rows[0, 70] = value
    state = with_filters(101, rows, 1.0, (3, 0.9, 0.0))
    filter_kernels.plan(state, 1, 2, draw=False, filters=True).run()
    assert state.non_finite[1, :2].tolist() == [1, 0]
    assert 0 <= int(state.own[1, 0]) < 101


def test_rows_past_the_proposal_are_left_alone() -> None:
    rows = random_rows(3, 101, seed=4)
    state = with_filters(101, rows, 1.0, (3, 1.0, 0.0))
    open_verify(state, [5])
    filter_kernels.plan(state, 1, 3, draw=False, filters=True).run()
    assert_everywhere(state.own[1, :2] >= 0, state.own[1, :2])
    assert_everywhere(state.own[1, 2:] < 0, state.own[1, 2:])


@pytest.mark.parametrize("level", [0, 1])
def test_inactive_verifies_and_draws_are_left_alone(level: int) -> None:
    rows = random_rows(3, 101, seed=4)
    state = with_filters(101, rows, 1.0, (3, 1.0, 0.0))
    put_rows(state, 0, rows)
    launch = filter_kernels.plan(state, level, 1, draw=level == 0, filters=True)
    if level == 1:
        launch = filter_kernels.plan(state, level, 3, draw=False, filters=True)
    state.control[active_at(2, level)] = 0
    launch.run()
    assert_everywhere(state.own < 0, state.own)
    assert_everywhere(state.normaliser.isnan(), state.normaliser)
    assert not state.arrivals.any()
    state.control[active_at(2, level)] = 1
    launch.run()
    assert (state.own[level] >= 0).any()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("level", {"level": 2}),
        ("level", {"level": 0}),
        ("count", {"count": 65}),
        ("count", {"draw": True, "level": 0}),
        ("below", {"below": True}),
        ("state.picked", {"state": make_decode_state(101, 3, lists=False)}),
    ],
)
def test_refuses(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "state": make_decode_state(101, 3), "level": 1, "count": 3, "draw": False, "filters": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{argument} "):
        filter_kernels.plan(**(arguments | change))  # type: ignore[arg-type]
