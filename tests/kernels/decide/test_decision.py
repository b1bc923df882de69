"""kernels/decide/decision.py and kernels/decide/commit.py: whole verifies against the rules written out in torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from helpers.decode_states import BASE, control_of, make_decode_state, open_verify, put_rows, random_rows
from helpers.equality import assert_equal_tensors, assert_everywhere
from helpers.oracle import DEVICE
from torch import Tensor

from pyramid_rt.kernels.decide import decision
from pyramid_rt.kernels.decide import filters as filter_kernels
from pyramid_rt.kernels.decide.decode_state import DecodeState, active_at
from pyramid_rt.kernels.limits import NO_POSITION
from pyramid_rt.kernels.reference import sampling as ops

THRESHOLD = 0.1
VOCAB = 101


@dataclass
class Case:
    """A verify of `tokens`: p [m + 1, V] are the rows of the verifying tier, q [m, V] of the proposing one."""

    p: Tensor
    q: Tensor
    tokens: list[int]
    temperature: float = 0.7
    seed: Tensor = field(default_factory=lambda: torch.tensor([0x7654_3210, 0xFEDC_BA98]))

    @property
    def positions(self) -> Tensor:
        return torch.arange(len(self.tokens) + 1) + BASE

    def processed(self, rows: Tensor) -> Tensor:
        """Log-probabilities without filters."""
        if self.temperature == 0:
            return ops.one_hot_logprobs(rows)
        return torch.log_softmax(rows / self.temperature, -1)

    def own(self) -> list[int]:
        """The verifying tier's own tokens."""
        if self.temperature == 0:
            return self.p.argmax(-1).tolist()
        noise = ops.own_noise(self.seed, self.positions, self.p.shape[1])
        return (self.p / self.temperature + noise).argmax(-1).tolist()

    def stands(self, rule: str, kind: str = "js") -> list[bool]:
        m = len(self.tokens)
        matches = [token == own for token, own in zip(self.tokens, self.own(), strict=False)]
        if rule == "match":
            return matches
        if rule == "rejection":
            words = ops.random_words(self.seed, self.positions[:m], ops.PURPOSE_ACCEPT, 0, 1)
            x = torch.tensor(self.tokens).unsqueeze(1)
            p, q = (self.processed(rows).gather(1, x).exp() for rows in (self.p[:m], self.q))
            return (ops.uniform(words) * q < p).squeeze(1).tolist()
        near = (ops.divergence(kind, self.p[:m], self.q) <= THRESHOLD).tolist()
        return [a or b for a, b in zip(near, matches, strict=True)] if rule == "fuzzy_or_match" else near

    def residual(self, row: int) -> int:
        words = ops.random_words(
            self.seed, self.positions[row : row + 1], ops.PURPOSE_RESIDUAL, 0, self.p.shape[1]
        )
        p, q = self.processed(self.p[row : row + 1]), self.processed(self.q[row : row + 1])
        return int(ops.residual_token(p, q, ops.gumbel(words)))

    def expected(self, rule: str, kind: str = "js") -> tuple[int, int]:
        """The number of tokens that stand, and the token after them."""
        stands = [*self.stands(rule, kind), False]
        accepted = stands.index(False)
        falls = accepted < len(self.tokens)
        return accepted, self.residual(accepted) if rule == "rejection" and falls else self.own()[accepted]

    def state(self, count: int, **options: object) -> DecodeState:
        """Opened for a verify of up to `count` - 1 tokens."""
        state = make_decode_state(self.p.shape[1], count, temperature=self.temperature)
        state.seed.copy_(self.seed)
        state.thresholds.fill_(THRESHOLD)
        put_rows(state, 1, self.p)
        put_rows(state, 0, self.q)
        open_verify(state, self.tokens, **options)  # type: ignore[arg-type]
        return state


def run(state: DecodeState, count: int, rule: str, kind: str = "js") -> None:
    if rule == "rejection":
        filter_kernels.plan(state, 1, count, draw=False, filters=False, below=True).run()
    decision.plan(state, 1, count, rule, kind=kind, stored=rule == "rejection").run()  # type: ignore[arg-type]
    assert not state.arrivals.any()


def random_case(seed: int, m: int, vocab: int = VOCAB, temperature: float = 0.7) -> Case:
    """Two related tiers; most proposed tokens are drawn by the lower one."""
    p = random_rows(m + 1, vocab, seed=seed)
    q = p[:m] + random_rows(m, vocab, seed=seed + 1, spread=0.8)
    case = Case(p, q, [0] * m, temperature)
    case.tokens = Case(torch.cat((q, q[-1:])), q, [0] * m, temperature).own()[:m]
    return case


def check(state: DecodeState, case: Case, rule: str, kind: str = "js", *, before: int = 1) -> int:
    """The whole state after a verify, without end-of-sequence and limit. Returns how many stood."""
    accepted, token = case.expected(rule, kind)
    m, position = len(case.tokens), BASE + accepted
    found = control_of(state)
    assert state.tokens[BASE : position + 1].tolist() == [*case.tokens[:accepted], token]
    assert state.origin[BASE : position + 1].tolist() == [0] * accepted + [1]
    assert (found["end"], found["ended"]) == (position + 1, False)
    assert found["cached"] == [min(BASE + m - 1, position), position]
    assert found["bad"] == [NO_POSITION] * 2
    # The next outer round is open.
    assert (found["base"], found["active"]) == ([position + 1] * 2, [1, 1])
    differs = sum(a != b for a, b in zip(case.tokens[:accepted], case.own(), strict=False))
    lossy = rule.startswith("fuzzy")
    counters = [m, accepted, differs if lossy else 0, int(accepted == m), 1, before, 0]
    assert state.counters[0].tolist() == counters
    assert state.counters[1].tolist() == [0] * 6 + [before]
    near = case.stands("fuzzy", kind)[:accepted] if lossy else [False] * accepted
    assert state.source[: accepted + 1].tolist() == [0 if n else 1 for n in near] + [1]
    return accepted


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rule", decision.RULES)
def test_verifies(rule: str, temperature: float) -> None:
    stood = set()
    for seed in range(6):
        m = 1 + seed % 4
        case = random_case(seed * 10, m, temperature=temperature)
        state = case.state(5)
        run(state, 5, rule)
        stood.add(check(state, case, rule) - m)
    assert 0 in stood
    assert min(stood) < 0


@pytest.mark.parametrize("rule", decision.RULES)
def test_identical_tiers_accept_everything(rule: str) -> None:
    case = random_case(3, 5)
    case.q = case.p[:5]
    case.tokens = case.own()[:5]
    state = case.state(6)
    run(state, 6, rule)
    assert check(state, case, rule) == 5


@pytest.mark.parametrize("rule", decision.RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_disjoint_tiers_reject_everything(rule: str, temperature: float) -> None:
    p, q = torch.zeros(4, VOCAB), torch.zeros(3, VOCAB)
    p[:, 50:], q[:, :50] = -math.inf, -math.inf
    case = Case(p, q, [60, 70, 80], temperature)
    state = case.state(4)
    run(state, 4, rule)
    assert check(state, case, rule) == 0


@pytest.mark.parametrize(("rule", "vocab"), [("match", 49152), ("fuzzy", 4096), ("rejection", 4801)])
def test_larger_vocabularies(rule: str, vocab: int) -> None:
    case = random_case(8, 1, vocab=vocab)
    state = case.state(2)
    run(state, 2, rule)
    check(state, case, rule)


def test_a_verify_of_64_positions() -> None:
    case = random_case(5, 63, vocab=20)
    case.tokens = case.own()[:63]
    case.tokens[41] = (case.tokens[41] + 1) % 20
    state = case.state(64)
    run(state, 64, "match")
    assert check(state, case, "match") == 41


def test_residual_of_a_token_that_tier_0_drew_at_a_fuzzy_tier() -> None:
    # Three tiers; the second let one token of the first stand and put the other one itself.
    p, q, r = random_rows(3, VOCAB, seed=1), random_rows(2, VOCAB, seed=2), random_rows(2, VOCAB, seed=3)
    fell = []
    for first in range(12):
        tokens = [first, int(q[1].argmax())]
        state = make_decode_state(VOCAB, 3, tiers=3, temperature=1.0)
        for level, rows in enumerate((r, q, p)):
            put_rows(state, level, rows)
        open_verify(state, tokens, level=2)
        state.source[:2] = torch.tensor([0, 1], device=DEVICE)
        for level in (1, 2):
            filter_kernels.plan(state, level, 3, draw=False, filters=False, below=True).run()
        decision.plan(state, 2, 3, "rejection", stored=True).run()
        case = Case(p, torch.stack((r[0], q[1])), tokens, 1.0, state.seed.cpu())
        words = ops.random_words(case.seed, case.positions[:2], ops.PURPOSE_ACCEPT, 1, 1)
        logs = torch.tensor(tokens).unsqueeze(1)
        px, qx = (case.processed(rows).gather(1, logs).exp() for rows in (p[:2], case.q))
        stands = [*(ops.uniform(words) * qx < px).squeeze(1).tolist(), False]
        accepted = stands.index(False)
        token = case.own()[2]
        if accepted < 2:
            row = slice(accepted, accepted + 1)
            noise = ops.random_words(case.seed, case.positions[row], ops.PURPOSE_RESIDUAL, 1, VOCAB)
            token = int(
                ops.residual_token(case.processed(p[row]), case.processed(case.q[row]), ops.gumbel(noise))
            )
        assert state.tokens[BASE : BASE + accepted + 1].tolist() == [*tokens[:accepted], token]
        fell.append(accepted)
    assert 0 in fell
    assert max(fell) > 0


@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_a_stop_token_that_stands_takes_no_bonus(rule: str) -> None:
    case = random_case(3, 3)
    case.q, case.tokens = case.p[:3], case.own()[:3]
    state = case.state(4)
    state.ended.fill_(True)
    state.stop_mask[case.tokens[2]] = True
    run(state, 4, rule)
    found = control_of(state)
    assert (found["end"], found["ended"], found["active"]) == (BASE + 3, True, [0, 0])
    assert state.counters[0].tolist() == [3, 3, 0, 1, 0, 1, 0]
    assert found["cached"] == [BASE + 2, BASE + 3]


def test_a_stop_token_that_falls_does_not_end_and_a_correction_may() -> None:
    case = random_case(3, 3)
    own = case.own()
    case.tokens = [own[0], (own[1] + 1) % VOCAB, 5]
    for stop in (5, own[1]):
        state = case.state(4)
        state.ended.fill_(True)
        state.stop_mask[stop] = True
        run(state, 4, "match")
        found = control_of(state)
        assert (found["end"], found["ended"]) == (BASE + 2, stop == own[1])
        assert int(state.tokens[BASE + 1]) == own[1]


def test_the_limit_takes_the_bonus_but_not_a_correction() -> None:
    case = random_case(3, 3)
    case.tokens = case.own()[:3]
    state = case.state(4, limit=BASE + 3)
    run(state, 4, "match")
    found = control_of(state)
    assert (found["end"], found["ended"], found["active"]) == (BASE + 3, False, [0, 0])
    case.tokens[2] = (case.tokens[2] + 1) % VOCAB
    state = case.state(4, limit=BASE + 3)
    run(state, 4, "match")
    assert control_of(state)["end"] == BASE + 3
    assert int(state.tokens[BASE + 2]) == case.own()[2]


@pytest.mark.parametrize("rule", decision.RULES)
def test_an_inactive_verify_changes_nothing(rule: str) -> None:
    case = random_case(3, 3)
    state = case.state(4)
    state.control[active_at(2, 1)] = 0
    before = [tensor.clone() for tensor in (state.control, state.tokens, state.origin, state.counters)]
    run(state, 4, rule)
    after = [state.control.clone(), state.tokens, state.origin, state.counters]
    # But for the mark of the next outer round.
    after[0][4:8] = before[0][4:8]
    for a, b in zip(before, after, strict=True):
        assert_equal_tensors(a, b)
    assert_everywhere(state.own < 0, state.own)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("rule", decision.RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_cannot_be_decided_are_reported(rule: str, value: float) -> None:
    case = random_case(3, 3)
    case.p[1] = value if value == -math.inf else case.p[1]
    case.p[1, 70] = value
    # Not of the proposal, so nobody's business.
    padded = torch.cat((case.p, torch.full((1, VOCAB), math.nan)))
    state = case.state(5)
    put_rows(state, 1, padded)
    run(state, 5, rule)
    assert control_of(state)["bad"] == [NO_POSITION, BASE + 1]


def test_an_inner_verify_opens_the_next_inner_round() -> None:
    case = random_case(3, 3)
    case.tokens = case.own()[:3]
    for until, active in ((None, 1), (5, 1), (4, 0)):
        state = make_decode_state(VOCAB, 4, tiers=3)
        state.seed.copy_(case.seed)
        put_rows(state, 1, case.p)
        open_verify(state, case.tokens)
        decision.plan(state, 1, 4, "match", until=until).run()
        found = control_of(state)
        end = BASE + 4
        # Four tokens of the second tier's proposal stand now; the outer round goes on where it began.
        assert (found["end"], found["base"], found["active"]) == (end, [end, BASE, BASE], [active, active, 1])
        assert state.source[:4].tolist() == [1] * 4


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("rule", {"rule": "lenient"}),
        ("kind", {"kind": "chi"}),
        ("level", {"level": 0}),
        ("level", {"level": 2}),
        ("count", {"count": 1}),
        ("count", {"count": 65}),
        ("stored", {"rule": "rejection"}),
        ("stored", {"rule": "fuzzy", "processed": True}),
        ("until", {"until": 0}),
        (
            "state.picked",
            {"rule": "fuzzy", "kind": "topk_js", "state": make_decode_state(VOCAB, 3, lists=False)},
        ),
    ],
)
def test_refuses(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "state": make_decode_state(VOCAB, 3),
        "level": 1,
        "count": 3,
        "rule": "match",
    }
    with pytest.raises(ValueError, match=f"^{argument} "):
        decision.plan(**(arguments | change))  # type: ignore[arg-type]
