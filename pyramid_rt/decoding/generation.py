"""One generation on the device: prompt processing, outer rounds, and what the host reads after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyramid_rt.decoding.counters import COUNTERS
from pyramid_rt.decoding.engine import Engine
from pyramid_rt.decoding.healing import Constraint, draw
from pyramid_rt.decoding.observing import VerifyRecord
from pyramid_rt.decoding.place import inside
from pyramid_rt.decoding.readback import Snapshot
from pyramid_rt.decoding.tiers import PromptTier, shared_prefix
from pyramid_rt.errors import NonFiniteLogitsError
from pyramid_rt.kernels.limits import NO_POSITION
from pyramid_rt.params import SamplingParams
from pyramid_rt.result import TokenLogprobs
from pyramid_rt.stats import ForwardClock
from pyramid_rt.trace import How


@dataclass(frozen=True, slots=True)
class Commit:
    """The tokens of one outer round (or of the prompt's end), as the host sees them.

    Attributes:
        tokens: their ids. logprobs: theirs, where asked for.
        records: the verifies of the round, where the plan has them watched.
        how: tokens came about that no verify has seen.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    records: list[VerifyRecord] = field(default_factory=list)
    how: How = "plain"


class Generation:
    """Decodes one prompt. `start` once, then `advance` until `finished`; `close` when nothing more is wanted.

    Under device control the next round is started before the last one is read, so that the device need not
    wait for the host; tokens past the last commit read by the host are discarded.

    Args:
        engine: of the method; everything of the request in its state is overwritten.
        thresholds: one per rule, used by the fuzzy ones.
        prompt: 1 to max_seq - 1 token ids.
        stop_ids: ids that end the sequence.
        reuse: take what the tiers' caches hold of the prompt already.
        constraint: on the first tokens, which the target then draws alone; see `healing`.
        interrupted: asked between two parts of the prompt; once it says so, `start` and `advance` leave the rest
            undone and commit nothing, and neither may be called again.
    """

    def __init__(
        self,
        engine: Engine,
        thresholds: Sequence[float],
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        *,
        reuse: bool = True,
        constraint: Constraint | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.place = engine.place
        self._interrupted = interrupted
        self._engine, self._tiers, self._plan, self._state = engine, engine.tiers, engine.plan, engine.state
        self._reuse, self._constraint, self._stop_ids = reuse, constraint, frozenset(stop_ids)
        self._filters = params.filters
        self._prompt = list(prompt)
        self._tokens = list(prompt)
        self._context = min(tier.max_seq for tier in self._tiers)
        self._filled = [False] * self._plan.tiers
        self._clock = ForwardClock(self._plan.tiers, self._state.tokens.device)
        self._last: Snapshot | None = None
        self._limit = min(len(prompt) + params.max_new_tokens, self._context)
        self.finished = params.max_new_tokens == 0
        self.stopped = False
        self.reused = 0
        self._begin(thresholds, params, seed, stop_ids)

    @inside
    def start(self) -> Commit:
        """Process the prompt in the target, which gives the first token; the lower tiers follow later.

        Under a constraint: the tokens that it covers.
        """
        for tier in self._tiers:
            if isinstance(tier, PromptTier):
                tier.begin(len(self._prompt))
        target, end = self._plan.tiers - 1, len(self._prompt)
        self.reused = self._share(target, end - 1)
        chunk = self._engine.chunk
        begin = max(self.reused, (end - 1) // chunk * chunk)
        if not self._prefill(target, self.reused, begin):
            return Commit([])
        return self._first_token(begin) if self._constraint is None else self._draw(self._constraint, begin)

    @inside
    def advance(self) -> Commit:
        """The tokens of the next outer round."""
        if not self._filled[-1]:
            # The tokens under the constraint are there, and the target has not seen the last of them.
            return self._first_token(len(self._prompt) - 1)
        if not self._fill_lower_tiers():
            return Commit([])
        engine = self._engine
        while engine.unread <= engine.ahead and (engine.unread == 0 or self._goes_on()):
            engine.launch(self._furthest())
        return self._read()

    def _first_token(self, begin: int) -> Commit:
        """The target's own token after the prompt, of which its cache holds what lies before `begin`."""
        self._engine.first_token(begin, len(self._prompt))
        self._filled[-1] = True
        self._clock.restart()
        return replace(self._read(), how="first")

    def _draw(self, constraint: Constraint, begin: int) -> Commit:
        """The tokens under the constraint. What follows takes them for the end of the prompt."""
        state, end = self._state, len(self._prompt)
        drawn = draw(
            self._tiers[-1],
            state,
            constraint,
            self._prompt,
            begin,
            self._limit,
            self._stop_ids,
            filters=self._filters,
        )
        self._prompt += drawn.tokens
        self._tokens += drawn.tokens
        state.tokens[end : len(self._prompt)].copy_(
            torch.tensor(drawn.tokens, dtype=torch.int64, device=state.tokens.device)
        )
        state.end.fill_(len(self._prompt))
        self._engine.restart(len(self._prompt), self._clock)
        self.stopped = bool(self._stop_ids.intersection(drawn.tokens[-1:]))
        self.finished = self.stopped or len(self._prompt) >= self._limit
        return Commit(drawn.tokens, self._logprobs(drawn.tokens, drawn.rows), how="healed")

    @inside
    def close(self) -> None:
        """Note what the caches hold for the next call, once the device has finished what it was given."""
        cached = [int(value) for value in torch.stack(self._state.cached).tolist()]
        for tier, filled, count in zip(self._tiers, self._filled, cached, strict=True):
            if filled:
                tier.held = self._tokens[:count]

    def counters(self) -> list[list[int]]:
        """`State.counters` as of the last commit."""
        if self._last is not None:
            return self._last.counters
        return [[0] * len(COUNTERS) for _ in self._tiers]

    @inside
    def seconds(self) -> list[float | None]:
        """Per tier, spent in its forwards (in its steps, where those are graphs); None where one graph hides it."""
        return list(self._clock.seconds()) if self._engine.timed else [None] * self._plan.tiers

    @inside
    def survived(self) -> list[int]:
        """Per tier, the tokens it put there among those committed after the prompt's first."""
        origin = self._state.origin[len(self._prompt) + 1 : len(self._tokens)]
        return (
            torch.bincount(origin, minlength=self._plan.tiers).tolist()
            if origin.numel()
            else [0] * self._plan.tiers
        )

    @inside
    def _begin(
        self, thresholds: Sequence[float], params: SamplingParams, seed: int, stop_ids: Sequence[int]
    ) -> None:
        self._engine.restart(len(self._prompt), self._clock)
        state, device = self._state, self._state.tokens.device
        prompt = torch.tensor(self._prompt, dtype=torch.int64, device=device)
        state.tokens[: len(self._prompt)].copy_(prompt)
        state.end.fill_(len(self._prompt))
        state.limit.fill_(self._limit)
        state.ended.fill_(False)
        for cached in state.cached:
            cached.fill_(0)
        state.stop_mask.zero_()
        if stop_ids:
            state.stop_mask[torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)] = True
        words = [seed & 0xFFFFFFFF, seed >> 32]
        state.seed.copy_(torch.tensor(words, dtype=torch.int64, device=device))
        state.temperature.fill_(params.temperature)
        state.top_k.fill_(params.top_k)
        state.top_p.fill_(params.top_p)
        state.min_p.fill_(params.min_p)
        for stage, threshold in enumerate(thresholds):
            state.thresholds[stage] = threshold
        state.counters.zero_()
        state.bad.fill_(NO_POSITION)

    def _share(self, level: int, most: int) -> int:
        """The count of the prompt's first tokens, up to `most`, that a tier's cache holds; the rest is given up."""
        count = min(shared_prefix(self._tiers[level].held, self._prompt), most) if self._reuse else 0
        whole, bulk = self._engine.whole_chunks(level, len(self._prompt)), self._engine.bulk(level)
        if bulk != whole or count < whole:
            # Rows that whole chunks made are equal to no others: what this prompt would have made otherwise goes.
            count = self._engine.whole_chunks(level, min(count, whole, bulk) + 1)
        # Before anything is written: an interrupted call must not leave an untrue list behind.
        self._engine.keep(level, count)
        return count

    def _fill_lower_tiers(self) -> bool:
        """The prompt into the caches of the lower tiers, once; False where it was interrupted."""
        for level in range(self._plan.tiers - 1):
            if not self._filled[level]:
                end = len(self._prompt)
                if not self._prefill(level, self._share(level, end), end):
                    return False
                self._state.cached[level].fill_(end)
                self._filled[level] = True
        return True

    def _prefill(self, level: int, begin: int, end: int) -> bool:
        """Positions begin .. end - 1 of the prompt into a tier's cache, in chunks that end at fixed positions.

        False where it was interrupted before the last of them.
        """
        whole = self._engine.whole_chunks(level, len(self._prompt))
        while begin < min(whole, end):
            if self._interrupted():
                return False
            begin = self._engine.fill_chunk(level, begin)
        chunk = self._engine.chunk
        while begin < end:
            if self._interrupted():
                return False
            stop = min((begin // chunk + 1) * chunk, end)
            self._engine.fill(level, begin, stop)
            begin = stop
        return True

    def _furthest(self) -> int:
        """An upper bound of `State.end`, with the rounds that were not read yet."""
        return min(len(self._tokens) + self._engine.unread * self._plan.longest_commit, self._limit)

    def _goes_on(self) -> bool:
        """True where rounds that were not read may leave something to do: each commits at least one token."""
        return len(self._tokens) + self._engine.unread < self._limit

    def _read(self) -> Commit:
        """The one look of the host at a round: what was committed, or which tier failed.

        Raises NonFiniteLogitsError; then the round's tokens are not committed and the caches are cleared.
        """
        snapshot = self._engine.read()
        first = min(snapshot.bad)
        if first != NO_POSITION:
            for tier in self._tiers:
                tier.reset()
            self._filled = [False] * self._plan.tiers
            raise NonFiniteLogitsError(self._tiers[snapshot.bad.index(first)].name, first)
        logprobs = self._logprobs(snapshot.tokens, self._state.logprob_rows)
        self._tokens += snapshot.tokens
        self._last = snapshot
        self.stopped = snapshot.ended
        self.finished = self.stopped or snapshot.end >= self._limit
        return Commit(snapshot.tokens, logprobs, self._engine.observed())

    def _logprobs(self, tokens: list[int], rows: Tensor | None) -> list[TokenLogprobs]:
        if rows is None or self._plan.logprobs is None or not tokens:
            return []
        logs = torch.log_softmax(rows[: len(tokens)], -1)
        index = torch.tensor(tokens, dtype=torch.int64, device=logs.device).unsqueeze(-1)
        chosen = logs.gather(-1, index).squeeze(-1).tolist()
        best = logs.topk(min(self._plan.logprobs, logs.shape[-1]), -1)
        ids, values = best.indices.tolist(), best.values.tolist()
        return [
            TokenLogprobs(token, value, tuple(zip(ids[row], values[row], strict=True)))
            for row, (token, value) in enumerate(zip(tokens, chosen, strict=True))
        ]
