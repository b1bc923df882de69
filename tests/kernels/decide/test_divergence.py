"""kernels/decide/divergence.py, as a fuzzy verify leaves it, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.decode_states import make_decode_state, open_verify, put_rows, random_rows
from helpers.equality import assert_equal_tensors, assert_everywhere
from torch import Tensor

from pyramid_rt.kernels.decide import decision
from pyramid_rt.kernels.decide import filters as filter_kernels
from pyramid_rt.kernels.decide.decode_state import DecodeState
from pyramid_rt.kernels.reference import sampling as ops


def verify_board(p: Tensor, q: Tensor, temperature: float = 0.7) -> DecodeState:
    """The rows p [m, V] verify the rows q [m, V]; the row after them is p's last again."""
    state = make_decode_state(p.shape[1], p.shape[0] + 1, temperature=temperature)
    state.thresholds.fill_(0.25)
    put_rows(state, 1, torch.cat((p, p[-1:])))
    put_rows(state, 0, q)
    open_verify(state, [0] * p.shape[0])
    return state


def distances(state: DecodeState, count: int, kind: str, *, processed: bool = False) -> Tensor:
    decision.plan(state, 1, count + 1, "fuzzy", kind=kind, processed=processed, stored=processed).run()
    assert_everywhere(state.distance[count:].isnan(), state.distance[count:])
    assert not state.arrivals.any()
    return state.distance[:count].cpu()


def close(found: Tensor, p_logits: Tensor, q_logits: Tensor, kind: str) -> None:
    """As near to the float64 divergence as float32 sums of about a thousand terms are."""
    exact = ops.divergence(kind, p_logits.double(), q_logits.double()).float()
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=2e-6)


def pairs(vocab: int) -> tuple[Tensor, Tensor]:
    """Rows near and far from each other, with -inf in the one, the other, and in both."""
    p = random_rows(5, vocab, seed=vocab)
    q = p + random_rows(5, vocab, seed=1) * torch.tensor([0.0, 0.05, 0.5, 0.2, 1.0]).unsqueeze(1)
    p[2, : vocab // 3] = -math.inf
    q[3, vocab // 2 :] = -math.inf
    p[4, ::3] = q[4, ::3] = -math.inf
    return p, q


@pytest.mark.parametrize("kind", ops.DIVERGENCES)
def test_raw_divergences(kind: str) -> None:
    p, q = pairs(101)
    state = verify_board(p, q)
    found = distances(state, 5, kind)
    assert found[0] == 0.0
    close(found, p, q, kind)


@pytest.mark.parametrize("kind", ["js", "topk_kl"])
def test_more_than_one_share(kind: str) -> None:
    p, q = (rows[1:2] for rows in pairs(4801))
    close(distances(verify_board(p, q), 1, kind), p, q, kind)


def test_a_vocabulary_of_49152() -> None:
    p = random_rows(1, 49152, seed=5)
    q = p + random_rows(1, 49152, seed=6, spread=0.5)
    state = verify_board(p, q)
    found = distances(state, 1, "topk_js")
    close(found, p, q, "topk_js")
    # Only what is near the top was listed.
    assert int(state.amounts[0].sum()) < 200


@pytest.mark.parametrize("kind", ["js", "js_fsd", "kl", "tv", "topk_js", "topk_kl_reversed"])
@pytest.mark.parametrize("filters", [False, True], ids=["plain", "filtered"])
def test_processed_divergences(kind: str, filters: bool) -> None:
    p, q = (rows[:3] for rows in pairs(101))
    state = verify_board(p, q)
    if filters:
        state.top_k.fill_(60)
        state.top_p.fill_(0.97)
        open_verify(state, [0] * 3)
        # As after an inner round: the tier below has its own thresholds.
        filter_kernels.plan(state, 1, 4, draw=False, filters=True).run()
        swapped = verify_board(q, p)
        swapped.top_k.copy_(state.top_k)
        swapped.top_p.copy_(state.top_p)
        filter_kernels.plan(swapped, 1, 4, draw=False, filters=True).run()
        for name in ("normaliser", "cut", "own"):
            getattr(state, name)[0] = getattr(swapped, name)[1]
    else:
        filter_kernels.plan(state, 1, 4, draw=False, filters=False, below=True).run()
    found = distances(state, 3, kind, processed=True)
    cpu = [value.cpu() for value in (state.temperature, state.top_k, state.top_p, state.min_p)]
    assert found[0] == 0.0
    processed_p, processed_q = (ops.process_logits(rows, *cpu, filters=filters) for rows in (p, q))
    close(found, processed_p, processed_q, kind)


@pytest.mark.parametrize("kind", ["js", "js_fsd", "kl", "kl_reversed", "tv", "topk_js"])
def test_temperature_0_compares_one_hot_rows(kind: str) -> None:
    p, q = random_rows(2, 101, seed=1), random_rows(2, 101, seed=2)
    q[1, p[1].argmax()] = 99.0
    state = verify_board(p, q, temperature=0.0)
    filter_kernels.plan(state, 1, 3, draw=False, filters=False, below=True).run()
    found = distances(state, 2, kind, processed=True)
    apart = {"js": math.log(2), "topk_js": math.log(2), "tv": 1.0}.get(kind, math.inf)
    assert found.tolist() == [pytest.approx(apart), 0.0]


@pytest.mark.parametrize("kind", ["topk_js", "topk_tv"])
def test_equal_entries_at_the_border_of_the_top(kind: str) -> None:
    # 30 entries above, 60 at the border: 20 of them, those with the lowest indices, are in.
    p = torch.full((1, 200), -2.0)
    p[0, 100:130] = 3.0
    p[0, torch.arange(0, 180, 3)] = 1.0
    top = (p[0] > 1.0).sum()
    q = random_rows(1, 200, seed=3)
    found = distances(verify_board(p, q), 1, kind)
    equal = (p[0] == 1.0).nonzero().squeeze(1)[: ops.DIVERGENCE_TOP_K - int(top)]
    inside = torch.cat(((p[0] > 1.0).nonzero().squeeze(1), equal))
    rest = torch.ones(200, dtype=torch.bool)
    rest[inside] = False
    logs = [rows[0].double().log_softmax(-1) for rows in (p, q)]
    bucketed = [torch.cat((log[inside], log[rest].logsumexp(0, keepdim=True))).unsqueeze(0) for log in logs]
    exact = ops.divergence(kind.removeprefix("topk_"), *bucketed)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-5)


def test_the_same_bits_again() -> None:
    p, q = pairs(4801)
    first, second = (distances(verify_board(p[2:4], q[2:4]), 2, "js") for _ in range(2))
    assert_equal_tensors(first, second)
