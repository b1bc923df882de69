"""Decisions to time and the torch ops that each replaces, see `timed`.

A decision changes the state that it began from. So every call of a graph has a control block, token buffer and
sources of its own, and the first call of each replay begins by copying all of them back: three small copies, shared
by up to 64 decisions.

Rows are one set, which stays in the L2 from call to call: a round decides on logits that the head has just written.
`cold` gives the same launches over sets of rows that pass three times the L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.kernel_check.problems import decode_state as decode_states
from bench.kernel_check.problems.base import Place, Source
from bench.kernel_check.problems.decode_state import BASE
from bench.kernel_check.timed import TIMED, Call, Config, Workload, source_for
from bench.kernel_check.traffic import copies_for, traffic
from pyramid_rt.kernels.decide import decision, readback, sample
from pyramid_rt.kernels.decide import filters as filter_kernels
from pyramid_rt.kernels.decide.decode_state import COUNTERS, DecodeState
from pyramid_rt.kernels.forward.head import TileStatistics
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference import sampling as ops
from pyramid_rt.models.shapes import Shape

# Calls of a graph between two resets; each has a state of its own. The interpreter is slow and times nothing.
STATES = {"cuda": 64, "cpu": 2, "meta": 2}
HEAT = 0.7
THRESHOLD = 0.1
FILTERED = 1


@dataclass(frozen=True)
class Chain:
    """Launches that belong together, run as one; `before` puts the states back in a call that begins a replay."""

    parts: tuple[Launch, ...]
    before: Callable[[], object] | None = None

    def run(self) -> None:
        """All of them."""
        if self.before is not None:
            self.before()
        for launch in self.parts:
            launch.run()

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of the last, which decides."""
        return self.parts[-1].grid


class TimedDecision:
    """A verify of T positions by the upper of two tiers, every token of it the upper tier's own.

    Each rule then looks at every position. A subclass says which kernels run.
    """

    op = "decide"
    rule: decision.RuleName = "fuzzy"
    filters = False
    lists = False

    def __init__(
        self, shape: Shape, dtype: str, place: Place, l2_bytes: int, context: int, config: Config = None
    ) -> None:
        self.shape, self.place, self.l2_bytes = shape, place, l2_bytes
        self.source = source_for(self.op, shape, "float32", place)
        self.state = self._board()
        self.length, self.most_states = 0, STATES[place.device.type]
        self.states: dict[str, Tensor] = {}
        self.initial: dict[str, Tensor] = {}

    def _board(self) -> DecodeState:
        return decode_states.make_decode_state(self.place, self.shape.vocab, WINDOW, lists=self.lists)

    def count(self, length: int) -> int:
        """Positions of the launch: a verify has at least two."""
        return max(2, length)

    def parts(self, state: DecodeState, length: int) -> tuple[Launch, ...]:
        """The launches of one decision."""
        return (decision.plan(state, 1, self.count(length), self.rule),)

    def fill(self, state: DecodeState, source: Source) -> None:
        """Rows of both tiers, on which their own tokens agree for most positions."""
        decode_states.request(
            state, temperature=HEAT, filters=FILTERED if self.filters else 0, threshold=THRESHOLD
        )
        p = source.random(WINDOW, self.shape.vocab, scale=3.0)
        q = p + source.random(*p.shape, scale=0.05)
        self.set_apart(p, q)
        for level, rows in ((0, q), (1, p)):
            self.scores = decode_states.scores(state, rows)
            decode_states.put_rows(state, level, rows, self.scores)
            if level == 0:
                self.first_scores = self.scores[:1].clone()
        self.noise = self.scores - p / state.temperature

    def set_apart(self, p: Tensor, q: Tensor) -> None:
        """Change the rows [64, V] of both tiers where a rule should find a token to refuse."""

    def open(self, length: int) -> None:
        """The open round of every state."""
        best = self.state.statistics.best[1, : self.count(length) - 1].argmax(-1, keepdim=True)
        proposed = self.state.statistics.token[1].gather(-1, best).squeeze(-1)
        decode_states.open_verify(self.state, 1, proposed.to(torch.int64))

    def prepare(self, length: int) -> None:
        """Fill the decode state at the first call; stack the states of this length."""
        if self.place.device.type == "meta":
            self.states = {
                n: torch.stack([getattr(self.state, n)] * self.most_states)
                for n in ("control", "tokens", "source")
            }
            return
        if not self.states:
            self.fill(self.state, self.source)
        if self.length != length:
            self.open(length)
            self.length = length
            self.initial = {}
            for name in ("control", "tokens", "source"):
                kept: Tensor = getattr(self.state, name)
                self.initial[name] = kept.clone()
                self.states[name] = kept.repeat(self.most_states, *[1] * kept.dim())

    def reset(self) -> None:
        """Put all states back: broadcast copies."""
        for name, stacked in self.states.items():
            stacked.copy_(self.initial[name])

    def chains(self, length: int, state: Sequence[DecodeState]) -> list[Chain]:
        """A chain per state, the decode states' rows in turn."""
        self.prepare(length)
        made = []
        for i in range(self.states["control"].shape[0]):
            control, tokens, source = (self.states[name][i] for name in ("control", "tokens", "source"))
            own = replace(state[i % len(state)], control=control, tokens=tokens, source=source)
            made.append(Chain(self.parts(own, length), self.reset if i == 0 else None))
        return made

    def launches(self, length: int) -> list[Chain]:
        """See the module: rows in the L2."""
        return self.chains(length, [self.state])

    def cold(self, length: int) -> list[Chain]:
        """The same over rotated rows; none where what is read is so little that it always lies in the L2."""
        self.prepare(length)
        stationary = traffic(self.op, self.shape, length=length).stationary
        count = copies_for(stationary, self.l2_bytes)
        if count > self.most_states:
            return []
        sets = [self.state]
        s = self.state.statistics
        for _ in range(count - 1):
            copied = TileStatistics(s.peak.clone(), s.total.clone(), s.best.clone(), s.token.clone())
            sets.append(replace(self.state, rows=self.state.rows.clone(), statistics=copied))
        return self.chains(length, sets)

    def compilable(self, length: int) -> tuple[Launch, ...]:
        """The launches of this T that a compiler should see."""
        return self.parts(self.state, length)

    # torch's side

    def rows(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw rows of both tiers [T, V], [T - 1, V], positions [T], and the proposed tokens [T - 1]."""
        count = self.count(length)
        p, q = (
            self.state.rows[1, :count, : self.shape.vocab],
            self.state.rows[0, : count - 1, : self.shape.vocab],
        )
        proposed = self.state.tokens[BASE : BASE + count - 1]
        return p, q, decode_states.positions(self.state, count), proposed

    def decision(self, length: int) -> Callable[[], Tensor]:
        """The torch steps' ops as far as the token that follows what stands, without what they write.

        Scores with noise are made beforehand, though a torch round draws them: the head's kernel does so here.
        """
        raise NotImplementedError

    def peers(self, length: int) -> dict[str, list[Call]]:
        """One form: the ops of `torch_steps` on tensors of the same rows."""
        self.prepare(length)
        return {"torch steps": [self.decision(length)]}


class TimedFuzzy(TimedDecision):
    """Fuzzy acceptance, js on raw logits: one pass over the rows of both tiers."""

    op, rule = "decide", "fuzzy"

    def decision(self, length: int) -> Callable[[], Tensor]:
        """Own tokens of scaled rows, divergence, prefix."""
        p, q, _, _ = self.rows(length)
        m = q.shape[0]
        score, threshold = self.scores[: m + 1], self.state.thresholds[0]

        def run() -> Tensor:
            own = score.argmax(-1)
            stands = ops.divergence("js", p[:m], q) <= threshold
            return own.gather(0, stands.to(torch.int64).cumprod(0).sum(0).reshape(1))

        return run


class TimedMatch(TimedDecision):
    """Exact match: the tiles' winners alone, whose rows the head has looked at."""

    op, rule = "match", "match"

    def decision(self, length: int) -> Callable[[], Tensor]:
        """Own tokens and the prefix that equals them."""
        _, q, _, proposed = self.rows(length)
        m = q.shape[0]
        score = self.scores[: m + 1]

        def run() -> Tensor:
            own = score.argmax(-1)
            return own.gather(0, (proposed == own[:m]).to(torch.int64).cumprod(0).sum(0).reshape(1))

        return run


class TimedFiltered(TimedDecision):
    """Top-k 50 and top-p 0.95, then match: two launches."""

    op, rule, filters, lists = "filtered", "match", True, True

    def parts(self, state: DecodeState, length: int) -> tuple[Launch, ...]:
        """Thresholds, decision."""
        count = self.count(length)
        made = filter_kernels.plan(state, 1, count, draw=False, filters=True)
        return made, decision.plan(state, 1, count, self.rule, stored=True)

    def decision(self, length: int) -> Callable[[], Tensor]:
        """A sort of every row, own tokens, prefix."""
        p, q, _, proposed = self.rows(length)
        m, b, noise = q.shape[0], self.state, self.noise[: q.shape[0] + 1]

        def run() -> Tensor:
            kept = ops.process_logits(p, b.temperature, b.top_k, b.top_p, b.min_p, filters=True)
            own = (kept + noise).argmax(-1)
            return own.gather(0, (proposed == own[:m]).to(torch.int64).cumprod(0).sum(0).reshape(1))

        return run


class TimedRejection(TimedDecision):
    """Rejection without filters: normalisers of both tiers' rows, then the verdict and a residual."""

    op, rule = "reject", "rejection"

    def parts(self, state: DecodeState, length: int) -> tuple[Launch, ...]:
        """Thresholds of both tiers, verdict."""
        count = self.count(length)
        made = filter_kernels.plan(state, 1, count, draw=False, filters=False, below=True)
        return made, decision.plan(state, 1, count, "rejection", stored=True)

    def set_apart(self, p: Tensor, q: Tensor) -> None:
        """Token 0 is all that the lower tier wants, and nothing to the upper."""
        p[:, 0], q[:, 0] = -30.0, 20.0

    def open(self, length: int) -> None:
        """The last proposed token is token 0, so that a residual is drawn."""
        super().open(length)
        self.state.tokens[BASE + self.count(length) - 2] = 0

    def decision(self, length: int) -> Callable[[], Tensor]:
        """Log-softmax of both, verdicts, the residual with its noise."""
        p, q, places, proposed = self.rows(length)
        m, b, vocab = q.shape[0], self.state, self.shape.vocab
        token, score = proposed.unsqueeze(-1), self.scores[: m + 1]

        def run() -> Tensor:
            p_log, q_log = (torch.log_softmax(rows / b.temperature, -1) for rows in (p, q))
            own = score.argmax(-1)
            u = ops.uniform(ops.random_words(b.seed, places[:m], ops.PURPOSE_ACCEPT, 0, 1).squeeze(-1))
            px, qx = (log.gather(-1, token).squeeze(-1).exp() for log in (p_log[:m], q_log))
            accepted = (u * qx < px).to(torch.int64).cumprod(0).sum(0)
            row = accepted.clamp(max=m - 1).reshape(1)
            noise = ops.gumbel(ops.random_words(b.seed, row + BASE, ops.PURPOSE_RESIDUAL, 0, vocab))
            chosen = ops.residual_token(p_log.index_select(0, row), q_log.index_select(0, row), noise)
            return torch.where(accepted == m, own.gather(0, accepted.reshape(1)), chosen)

        return run


class TimedSample(TimedDecision):
    """A draft's step: one token from the winners of one row's tiles. T plays no part."""

    op = "sample"

    def parts(self, state: DecodeState, length: int) -> tuple[Launch, ...]:
        """One."""
        return (sample.plan(state, 0, first=False, stored=False),)

    def open(self, length: int) -> None:
        """The first position of a burst."""
        super().open(2)
        self.state.control[0] = BASE

    def decision(self, length: int) -> Callable[[], Tensor]:
        """The row's winner."""
        return lambda: self.first_scores.argmax(-1)


class TimedReport(TimedDecision):
    """The vector that the host reads. T plays no part."""

    op = "readback"

    def _board(self) -> DecodeState:
        state = super()._board()
        self.most = 20
        self.reported = self.source.scalar(BASE)
        self.numbers = self.source.new(3 + (2 + COUNTERS) * state.tiers_count + self.most, dtype=torch.int64)
        return state

    def parts(self, state: DecodeState, length: int) -> tuple[Launch, ...]:
        """One."""
        return (readback.plan(state, self.reported, self.numbers, self.most),)

    def decision(self, length: int) -> Callable[[], Tensor]:
        """The readback where torch decides: words, counters and tokens put together."""
        b = self.state
        end, cached, bad, ended = b.control[:1], b.control[2:4], b.control[8:10], b.ended.reshape(1)

        def run() -> Tensor:
            tokens = b.tokens[BASE : BASE + self.most]
            parts = (self.reported.reshape(1), end, ended.to(torch.int64), cached, bad, b.counters.flatten())
            return torch.cat((*parts, tokens))

        return run


TIMED_DECISIONS: dict[str, Callable[..., TimedDecision]] = {
    "decide": TimedFuzzy,
    "match": TimedMatch,
    "filtered": TimedFiltered,
    "reject": TimedRejection,
    "sample": TimedSample,
    "readback": TimedReport,
}
# Everything that can be timed.
WORKLOADS: dict[str, Callable[..., Workload]] = {**TIMED, **TIMED_DECISIONS}
