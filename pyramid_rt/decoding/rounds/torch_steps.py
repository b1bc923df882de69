"""The steps of a round in plain torch, on any device and with any tier.

All of it is tensor code of fixed shapes on the device; what does not apply is masked. Under `host_control` the
numbers that a round counts with are the host's own, so that it can skip inactive inner rounds and trim windows;
without it they are tensors, and nothing is read until the round is over. Both ways run the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyramid_rt.decoding.observing import Observer, Verify
from pyramid_rt.decoding.proposers import Proposer, ProposerTier
from pyramid_rt.decoding.rounds.cursor import Cursor, Flag, Number, but_not, entry
from pyramid_rt.decoding.rounds.recursion import Recursion, Script, Segment, TierTimer, horizon, timing
from pyramid_rt.decoding.rules import Evidence, Rule, Verdict
from pyramid_rt.decoding.state import MAX_WINDOW, RoundPlan, State
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import InputError
from pyramid_rt.kernels.limits import NO_POSITION
from pyramid_rt.kernels.reference import sampling as ops


@dataclass(frozen=True, slots=True)
class OpenRound:
    """A round that is open at a tier: the tier below makes a proposal, this one judges it."""

    level: int
    active: Flag  # an inactive round changes nothing
    base: Number  # where this tier's own proposal begins
    proposal: Number  # where the proposal of the tier below begins


class TorchSteps:
    """Steps of the recursion over `tiers` (small to large) by `plan`, on `state`, in plain torch.

    Every tier must hand in logits of at least `vocab_size` columns; only those are decoded over.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        plan: RoundPlan,
        state: State,
        vocab_size: int,
        clock: TierTimer | None = None,
    ) -> None:
        self.tiers, self.plan, self.state, self.vocab_size, self.clock = tiers, plan, state, vocab_size, clock
        self._capacity = state.tokens.shape[-1]
        self._noise_rows = _NoiseRows() if plan.host_control else None
        self._at = Cursor(plan, state)
        self._horizon = self._capacity
        self.observer: Observer | None = None

    def restart(self, clock: TierTimer | None) -> None:
        """A new request, with a seed of its own; its forwards are timed by this clock."""
        self.clock = clock
        self._noise_rows = _NoiseRows() if self.plan.host_control else None

    def begin(self, known_end: int | None = None) -> OpenRound | None:
        """Open an outer round at the end of the sequence; None where the host sees that it is finished."""
        if known_end is not None:
            self._horizon = horizon(known_end, self.plan, self._capacity)
        self._at.look()
        active = self._at.unfinished()
        if self.plan.host_control and not active:
            return None
        end = self._at.mark()
        return OpenRound(self.plan.tiers - 1, active, end, end)

    def inner(self, outer: OpenRound) -> OpenRound | None:
        """Open an inner round of the tier below `outer`'s; None where the host sees that no more are due."""
        plan, level = self.plan, outer.level - 1
        active = outer.active & self._at.unfinished()
        if plan.inner_rounds is None:
            active = active & (self._at.end - outer.proposal < plan.lengths[level])
        if plan.host_control and not active:
            return None
        return OpenRound(level, active, outer.proposal, self._at.mark())

    def first_token(self, row: Tensor, kv_bound: int, window: Tensor, start: Tensor) -> None:
        """The end of the target's prefill: run the last window, commit the target's own token after it.

        Args:
            row: int64 [1], the window row of the prompt's last token.
            kv_bound, window, start: as in `Tier.forward`.
        """
        target = self.plan.tiers - 1
        self._at.look()
        end, active = self._at.mark(), self._at.unfinished()
        raw = self._run(target, window, start, row, kv_bound)
        token, peak = self._own_tokens(raw, end)
        self._note_bad(target, peak, end, 1, active)
        self._keep_logprobs(raw)
        self._at.cache_holds(target, end, active)
        self._at.put(token, active)
        self._at.store()

    def sample(self, opened: OpenRound) -> None:
        """Tier 0 puts a proposal; stop tokens, the limit and an inactive round cut it."""
        lowest = self.tiers[0]
        if isinstance(lowest, ProposerTier):
            self._take_offer(lowest.proposer, opened)
        else:
            self._draw(opened)

    def _take_offer(self, proposer: Proposer, opened: OpenRound) -> None:
        """A proposal of tokens that no model has drawn, each of which was sure to come."""
        plan, at, base, active = self.plan, self._at, opened.proposal, opened.active
        steps = min(plan.burst, int(at.limit - base)) if plan.host_control else plan.burst
        proposal = proposer.propose(self.state.tokens, at.end, steps)
        tokens, offered = proposal.tokens, proposal.count
        if proposal.parents is not None:
            raise InputError(f"proposer {proposer.name!r} offered a tree, expected a chain: parents=None")
        if plan.host_control:
            offered = int(offered)
            wrong = [token for token in tokens[:offered].tolist() if not 0 <= token < self.vocab_size]
            if wrong or offered > steps:
                raise InputError(
                    f"proposer {proposer.name!r} offered {offered} tokens, {wrong} among them; expected at most "
                    f"{steps}, of ids in 0..{self.vocab_size - 1}"
                )
        else:  # no look from the host: whatever else a token may be, it is one of the vocabulary
            tokens = tokens.clamp(0, self.vocab_size - 1)
        for step in range(offered if isinstance(offered, int) else steps):
            if not plan.host_control:
                active = active & at.unfinished() & (step < offered)
            elif at.ended:
                break
            at.put(tokens[step : step + 1], active)
        if self.state.effective_rows[0] is not None:
            sure = torch.full((steps, self.vocab_size), -math.inf, dtype=torch.float32, device=tokens.device)
            self._keep_rows(0, 0, sure, sure.scatter(1, tokens[:steps].unsqueeze(-1), 0.0))
        self.state.origin.index_fill_(0, at.places(base, steps), 0)

    def _draw(self, opened: OpenRound) -> None:
        """A burst of tier 0's own tokens."""
        plan, state, at = self.plan, self.state, self._at
        base, active, steps, width = opened.proposal, opened.active, plan.burst, plan.window(0)
        if plan.host_control:
            width = int(base - at.cached[0])
            steps = min(steps, int(at.limit - base))
        tokens: list[Tensor] = []
        peaks: list[Tensor] = []
        for step in range(steps):
            if step == 0:
                raw = self._window(0, width, base, 1)
            else:
                if not plan.host_control:
                    active = active & at.unfinished()
                elif at.ended:  # the limit cut `steps` beforehand
                    break
                # The one token the draft has not seen; in an inactive step, some row past `cached`.
                raw = self._run(0, tokens[-1], at.end - 1, at.line[:1], self._bound(base, step))
            token, peak = self._own_tokens(raw, at.end)
            tokens.append(token)
            peaks.append(peak)
            if plan.tiers == 1:
                self._keep_logprobs(raw)
            elif plan.keep_own[0] or plan.keep_effective[0]:
                processed = self._logprobs(raw) if plan.keep_effective[0] else None
                self._keep_rows(0, at.end - base, raw, processed)
            at.put(token, active)
        count = at.end - base
        self._note_bad(0, torch.cat(peaks), base, count, opened.active)
        state.origin.index_fill_(0, at.places(base, len(tokens)), 0)
        at.cache_holds(0, at.end - 1, opened.active)
        at.count_forwards(0, count)
        if plan.tiers == 1:
            at.store()

    def verify(self, opened: OpenRound) -> None:
        """The round's tier judges the tokens that it was opened for."""
        plan, state, at = self.plan, self.state, self._at
        level, below, active = opened.level, opened.level - 1, opened.active
        proposal, base = opened.proposal, opened.base
        count = at.end - proposal
        most, width = plan.longest[below], plan.window(level)
        if plan.host_control:
            most, width = int(count), int(at.end - at.cached[level])
        raw = self._window(level, width, proposal, most + 1)
        own, peak = self._own_tokens(raw, proposal)
        self._note_bad(level, peak, proposal, count + 1, active)

        up = level < plan.tiers - 1
        rule = plan.rules[below]
        processed = self._logprobs(raw) if self._needs_processed(rule, level) else None
        evidence = self._evidence(below, raw, processed, own, proposal, most)
        verdict = rule.judge(evidence)
        stands = verdict.stands if plan.host_control else verdict.stands & (at.line[:most] < count)
        prefix = stands.cumprod(0)
        accepted = at.number(prefix.sum(0))
        whole = accepted == count
        position = proposal + accepted
        replace = but_not(active, whole & (at.ended | (position >= at.limit)))
        token = entry(own, accepted)
        if rule.residual and most > 0:  # what falls was proposed
            drawn = self._residual(evidence, below, accepted, position)
            token = torch.where(at.tensor(whole), token, drawn)

        if self.observer is not None:
            origin = state.origin.index_select(0, at.places(proposal, most))
            numbers, flags = (proposal, count, accepted), (active, replace)
            self.observer.saw(Verify.of(level, rule, evidence, origin, numbers, flags, token))
        if up and (plan.keep_own[level] or plan.keep_effective[level]):
            self._keep_rows(
                level, proposal - base, raw, self._effective_rows(verdict, evidence, processed, prefix)
            )
        # Where standing means being the own token there is nothing to count.
        differing = None if rule.lossless else (prefix * (evidence.proposed != evidence.own)).sum(0)
        if level == 1 and isinstance(self.tiers[0], ProposerTier):
            self.tiers[0].proposer.heard(raw, proposal)
        at.count_verify(below, (count, accepted, differing), (whole, replace, active))
        at.roll_back(level, position, whole, active)
        # What stands at a position past the end is never read, so this need not be masked.
        state.origin.index_fill_(0, at.places(position, 1), level)
        at.put(token, replace)
        if not up:
            self._keep_logprobs(raw)
            at.store()

    def _evidence(
        self, below: int, raw: Tensor, processed: Tensor | None, own: Tensor, proposal: Number, most: int
    ) -> Evidence:
        """The evidence of the rule above tier `below`, cut to the proposed positions."""
        state, rule = self.state, self.plan.rules[below]
        below_rows, effective = state.own_rows[below], state.effective_rows[below]
        below_raw = below_rows[:most] if below_rows is not None else None
        below_processed = None
        if rule.needs_below_processed:
            assert below_raw is not None
            below_processed = self._logprobs(below_raw)
        uniform = None
        if rule.needs_effective:
            places = self._at.places(proposal, most)
            words = ops.random_words(state.seed, places, ops.PURPOSE_ACCEPT, below, 1)
            uniform = ops.uniform(words.squeeze(-1))
        return Evidence(
            proposed=self._at.tokens(proposal, most),
            own=own[:most],
            raw=raw[:most],
            processed=processed[:most] if processed is not None else None,
            below_raw=below_raw,
            below_processed=below_processed,
            effective=effective[:most] if effective is not None else None,
            threshold=state.thresholds[below],
            uniform=uniform,
        )

    def _residual(self, evidence: Evidence, stage: int, accepted: Number, position: Number) -> Tensor:
        """The correction [1] of a rejection at the row `accepted`, whose position is `position`."""
        assert evidence.processed is not None
        assert evidence.effective is not None
        last = evidence.effective.shape[0] - 1
        row = self._at.places(accepted, 1).clamp(max=last)
        place = self._at.places(position, 1)
        words = ops.random_words(self.state.seed, place, ops.PURPOSE_RESIDUAL, stage, self.vocab_size)
        p_log, q_log = evidence.processed.index_select(0, row), evidence.effective.index_select(0, row)
        return ops.residual_token(p_log, q_log, ops.gumbel(words))

    def _effective_rows(
        self, verdict: Verdict, evidence: Evidence, processed: Tensor | None, prefix: Tensor
    ) -> Tensor | None:
        """The effective rows [m + 1, V] of the tokens that stand and of the replacement after them.

        `prefix` (int64 [m]) is 1 where a token stands; past it the verdict may be about stale rows.
        """
        if processed is None or verdict.inherited is None or evidence.effective is None:
            return processed
        most = evidence.proposed.shape[0]
        inherited = (verdict.inherited & (prefix > 0)).unsqueeze(-1)
        kept = torch.where(inherited, evidence.effective, processed[:most])
        return torch.cat((kept, processed[most:]))

    def _needs_processed(self, rule: Rule, level: int) -> bool:
        if rule.needs_processed:
            return True
        return level < self.plan.tiers - 1 and self.plan.keep_effective[level]

    # Pieces

    def _window(self, level: int, width: int, first: Number, count: int) -> Tensor:
        """Run the `width` tokens from the tier's cached length on.

        Returns: raw logits [count, V] float32 of the positions from `first` on.
        """
        start = self._at.cached[level]
        rows = self._at.places(first - 1 - start, count)
        if not self.plan.host_control:
            rows = rows.clamp(0, width - 1)
        return self._run(level, self._at.tokens(start, width), start, rows, self._bound(start, width))

    def _bound(self, start: Number, width: int) -> int:
        """Cache rows that a window of `width` from `start` on may look at, known to the host."""
        return start + width if isinstance(start, int) else self._horizon

    def _run(self, level: int, window: Tensor, start: Number, rows: Tensor, bound: int) -> Tensor:
        if isinstance(start, int):
            start = self._at.line[start]
        with timing(self.clock, level):
            logits = self.tiers[level].forward(window, start, rows, bound)
        assert logits is not None
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def _own_tokens(self, raw: Tensor, first: Number) -> tuple[Tensor, Tensor]:
        """Own tokens [R] of the raw rows from position `first` on.

        Returns: they, and a value [R] that is finite iff the row can be decided.
        """
        if not self.plan.sampled:
            best = raw.max(-1)
            return best.indices, best.values
        noise = (
            self._noise_rows.take(self.state.seed, first, raw.shape)
            if self._noise_rows is not None and isinstance(first, int)
            else ops.own_noise(self.state.seed, self._at.places(first, raw.shape[0]), self.vocab_size)
        )
        return (self._processed(raw) + noise).argmax(-1), raw.amax(-1)

    def _processed(self, raw: Tensor) -> Tensor:
        s = self.state
        return ops.process_logits(raw, s.temperature, s.top_k, s.top_p, s.min_p, filters=self.plan.filters)

    def _logprobs(self, raw: Tensor) -> Tensor:
        """Processed log-probabilities [R, V]; one-hot at temperature 0."""
        return torch.log_softmax(self._processed(raw), -1) if self.plan.sampled else ops.one_hot_logprobs(raw)

    def _keep_rows(self, level: int, offset: Number, raw: Tensor, processed: Tensor | None) -> None:
        """Store the rows of tier `level`'s proposal from `offset` on, where a rule above reads them."""
        index = (self._at.places(offset, raw.shape[0]),)
        own, effective = self.state.own_rows[level], self.state.effective_rows[level]
        if own is not None:
            own.index_put_(index, raw)
        if effective is not None:
            assert processed is not None
            effective.index_put_(index, processed)

    def _keep_logprobs(self, raw: Tensor) -> None:
        if self.state.logprob_rows is not None:
            self.state.logprob_rows[: raw.shape[0]].copy_(raw)

    def _note_bad(self, level: int, peak: Tensor, first: Number, count: Number, active: Flag) -> None:
        """Remember the first position whose row had NaN, +inf or nothing but -inf.

        `peak` [R] belongs to the positions from `first` on, of which `count` are valid where `active`.
        """
        if self.plan.host_control and math.isfinite(float(peak.sum())):
            return
        rows = peak.shape[0]
        valid = (self._at.line[:rows] < count) & active
        found = torch.where(valid & ~peak.isfinite(), self._at.places(first, rows), NO_POSITION).amin(0)
        bad = self.state.bad[level]
        bad.copy_(torch.minimum(bad, found))


class _NoiseRows:
    """Own-token noise drawn once per position, in blocks: for host control, where the host knows positions.

    A block begins at a multiple of its length, so that a position's row is always computed at one place of one shape:
    torch's vectors and the borders between its threads then fall alike, and the row's bits follow from the position
    alone. Drawing a block costs little more than a single row.
    """

    BLOCK = 16

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._first = 0

    def take(self, seed: Tensor, first: int, shape: torch.Size) -> Tensor:
        """Noise [R, V] for R positions from `first` on."""
        count, vocab_size = shape
        if self._rows is None or first < self._first:
            self._rows = seed.new_empty((0, vocab_size), dtype=torch.float32)
            self._first = first // self.BLOCK * self.BLOCK
        self._drop_before(first)
        while first - self._first + count > self._rows.shape[0]:
            begin = self._first + self._rows.shape[0]
            positions = torch.arange(begin, begin + self.BLOCK, dtype=torch.int64, device=seed.device)
            self._rows = torch.cat((self._rows, ops.own_noise(seed, positions, vocab_size)))
        offset = first - self._first
        return self._rows[offset : offset + count]

    def _drop_before(self, first: int) -> None:
        """Forget whole blocks that are further back than any rollback reaches."""
        assert self._rows is not None
        spare = (first - self._first - MAX_WINDOW) // self.BLOCK * self.BLOCK
        if spare > MAX_WINDOW:
            self._rows, self._first = self._rows[spare:], self._first + spare


class TorchRoundRunner:
    """Rounds that are computed step by step."""

    steps_class: ClassVar[type[TorchSteps]] = TorchSteps

    def __init__(
        self,
        tiers: Sequence[Tier],
        plan: RoundPlan,
        state: State,
        vocab_size: int,
        clock: TierTimer | None = None,
    ) -> None:
        """Arguments as `TorchSteps`."""
        self.moved: Sequence[Tensor] = ()
        self.steps = self.steps_class(tiers, plan, state, vocab_size, clock)
        self.recursion = Recursion(plan, self.steps)

    def watched_by(self, observer: Observer) -> None:
        """See `RoundRunner`."""
        self.steps.observer = observer

    @property
    def clock(self) -> TierTimer | None:
        """See `RoundRunner`."""
        return self.steps.clock

    @clock.setter
    def clock(self, clock: TierTimer | None) -> None:
        self.steps.clock = clock

    def restart(self, clock: TierTimer | None) -> None:
        """See `RoundRunner`."""
        self.steps.restart(clock)

    def park(self, context: int) -> None:
        """See `RoundRunner`; every round looks at the state anew."""

    def launches(self) -> int | None:
        """See `RoundRunner`."""
        return None

    def outer_round(self, known_end: int | None = None) -> None:
        """See `RoundRunner`."""
        self.recursion.outer_round(known_end)

    def sections(self, known_end: int) -> Sequence[Segment]:
        """See `RoundRunner`."""
        script = Script(self.steps, [tier.name for tier in self.steps.tiers])
        Recursion(self.steps.plan, script).outer_round(known_end)
        return script.sections

    def first_token(self, row: Tensor, kv_bound: int, window: Tensor, start: Tensor) -> None:
        """See `RoundRunner`."""
        self.steps.first_token(row, kv_bound, window, start)
