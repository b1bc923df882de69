"""The steps of a round in plain torch, on any device and with any tier.

All of it is tensor code of fixed shapes on the device; what does not apply is masked. Under `host_control` the
host also reads lengths, to skip inactive inner rounds and to trim windows; without it nothing is read until the
round is over. Both ways run the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyramid_rt.kernels import sampling_reference as ops
from pyramid_rt.recursion import Clock, Recursion, Script, Section, horizon
from pyramid_rt.rules import Evidence, Fuzzy, Rule, Verdict
from pyramid_rt.state import COLUMN, MAX_WINDOW, NO_POSITION, Plan, State
from pyramid_rt.tiers import Tier


@dataclass(frozen=True, slots=True)
class Round:
    """A round that is open at a tier: the tier below makes a proposal, this one judges it."""

    level: int
    live: Tensor  # bool []: an inactive round changes nothing
    base: Tensor  # int64 []: where this tier's own proposal begins
    proposal: Tensor  # int64 []: where the proposal of the tier below begins


class TorchSteps:
    """Steps of the recursion over `tiers` (small to large) by `plan`, on `state`, in plain torch.

    Every tier must hand in logits of at least `vocab_size` columns; only those are decoded over.
    """

    def __init__(
        self, tiers: Sequence[Tier], plan: Plan, state: State, vocab_size: int, clock: Clock | None = None
    ) -> None:
        self.tiers, self.plan, self.state, self.vocab_size, self.clock = tiers, plan, state, vocab_size, clock
        device = state.tokens.device
        self._steps = torch.arange(MAX_WINDOW + 1, device=device)
        self._levels = torch.arange(plan.tiers, device=device)
        self._noise_rows = _NoiseRows() if plan.host_control else None
        self._capacity = state.tokens.shape[-1]
        self._horizon = self._capacity

    def restart(self, clock: Clock | None) -> None:
        """A new request, with a seed of its own; its forwards are timed by this clock."""
        self.clock = clock
        self._noise_rows = _NoiseRows() if self.plan.host_control else None

    def begin(self, known_end: int | None = None) -> Round | None:
        """Open an outer round at the end of the sequence; None where the host sees that it is finished."""
        if known_end is not None:
            self._horizon = horizon(known_end, self.plan, self._capacity)
        live = self._unfinished()
        if self.plan.host_control and not bool(live):
            return None
        end = self.state.end.clone()
        return Round(self.plan.tiers - 1, live, end, end)

    def inner(self, outer: Round) -> Round | None:
        """Open an inner round of the tier below `outer`'s; None where the host sees that no more are due."""
        plan, state, level = self.plan, self.state, outer.level - 1
        live = outer.live & self._unfinished()
        if plan.inner_rounds is None:
            live = live & (state.end - outer.proposal < plan.lengths[level])
        if plan.host_control and not bool(live):
            return None
        return Round(level, live, outer.proposal, state.end.clone())

    def first_token(self, row: Tensor, kv_bound: int, window: Tensor, start: Tensor) -> None:
        """The end of the target's prefill: run the last window, commit the target's own token after it.

        Args:
            row: int64 [1], the window row of the prompt's last token.
            kv_bound, window, start: as in `Tier.forward`.
        """
        target, state = self.plan.tiers - 1, self.state
        raw = self._run(target, window, start, row, kv_bound)
        token, peak = self._own_tokens(raw, state.end.reshape(1))
        live = self._unfinished()
        self._note_bad(target, peak, state.end.reshape(1), live)
        self._keep_logprobs(raw)
        state.cached[target].copy_(state.end)
        self._put(token, live)

    def sample(self, opened: Round) -> None:
        """Tier 0 draws its own tokens; stop tokens, the limit and an inactive round cut the burst."""
        plan, state = self.plan, self.state
        base, active, steps = opened.proposal, opened.live, plan.burst
        width = plan.window(0)
        if plan.host_control:
            width = int(base) - int(state.cached[0])
            steps = min(steps, int(state.limit) - int(base))
        live = active
        tokens: list[Tensor] = []
        peaks: list[Tensor] = []
        for step in range(steps):
            if step == 0:
                row = (base - 1 - state.cached[0]).clamp(0, width - 1).reshape(1)
                raw = self._window(0, width, row)
            else:
                if not plan.host_control:
                    live = live & self._unfinished()
                elif bool(state.ended):  # the limit cut `steps` beforehand
                    break
                # The one token the draft has not seen; in a step that is not live, some row past `cached`.
                raw = self._run(0, tokens[-1], state.end - 1, self._steps[:1], self._bound(base, step))
            token, peak = self._own_tokens(raw, state.end.reshape(1))
            tokens.append(token)
            peaks.append(peak)
            if plan.tiers == 1:
                self._keep_logprobs(raw)
            elif plan.keep_own[0] or plan.keep_effective[0]:
                processed = self._logprobs(raw) if plan.keep_effective[0] else None
                self._keep_rows(0, state.end - base, raw, processed)
            self._put(token, live)
        positions = base + self._steps[: len(tokens)]
        self._note_bad(0, torch.cat(peaks), positions, positions < state.end)
        state.origin.index_put_((positions,), self._levels[:1])
        self._set(state.cached[0], state.end - 1, active)
        state.counters[0, COLUMN["forwards"]] += state.end - base

    def verify(self, opened: Round) -> None:
        """The round's tier judges the tokens that it was opened for."""
        plan, state = self.plan, self.state
        level, below, active = opened.level, opened.level - 1, opened.live
        proposal, base = opened.proposal, opened.base
        most, width = plan.longest[below], plan.window(level)
        if plan.host_control:
            most = int(state.end) - int(proposal)
            width = int(state.end) - int(state.cached[level])
        steps = self._steps[: most + 1]
        positions = proposal + steps
        rows = (positions - 1 - state.cached[level]).clamp(0, width - 1)
        raw = self._window(level, width, rows)
        own, peak = self._own_tokens(raw, positions)
        count = state.end - proposal
        self._note_bad(level, peak, positions, active & (steps <= count))

        up = level < plan.tiers - 1
        rule = plan.rules[below]
        processed = self._logprobs(raw) if self._needs_processed(rule, level) else None
        evidence = self._evidence(below, raw, processed, own, positions, most)
        verdict = rule.judge(evidence)
        prefix = (verdict.stands & (steps[:most] < count)).to(torch.int64).cumprod(0)
        accepted = prefix.sum(0)
        whole = accepted == count
        position = proposal + accepted
        replace = active & ~(whole & (state.ended | (position >= state.limit)))
        token = own.gather(0, accepted.reshape(1))
        if rule.residual:
            token = torch.where(whole, token, self._residual(evidence, below, accepted, position))

        if up and (plan.keep_own[level] or plan.keep_effective[level]):
            self._keep_rows(
                level, proposal - base, raw, self._handed_up(verdict, evidence, processed, prefix)
            )
        # Where standing means being the own token there is nothing to count.
        differing = None if rule.lossless else (prefix * (evidence.proposed != evidence.own)).sum(0)
        self._count(below, active, count, accepted, differing, torch.stack((whole, replace, active)))
        self._set(state.ended, state.ended & whole, active)
        self._set(state.end, position, active)
        for tier in range(level):
            self._set(state.cached[tier], torch.minimum(state.cached[tier], position), active)
        self._set(state.cached[level], position, active)
        # A position past the end belongs to nobody, so this need not be masked.
        state.origin.index_put_((position.reshape(1),), self._levels[level : level + 1])
        self._put(token, replace)
        if not up:
            self._keep_logprobs(raw)

    def _evidence(
        self, below: int, raw: Tensor, processed: Tensor | None, own: Tensor, positions: Tensor, most: int
    ) -> Evidence:
        """What the rule above tier `below` may see, cut to the proposed positions."""
        state, rule = self.state, self.plan.rules[below]
        below_rows, effective = state.own_rows[below], state.effective_rows[below]
        below_raw = below_rows[:most] if below_rows is not None else None
        below_processed = None
        if isinstance(rule, Fuzzy) and rule.divergence_on == "processed":
            assert below_raw is not None
            below_processed = self._logprobs(below_raw)
        uniform = None
        if rule.needs_effective:
            words = ops.random_words(state.seed, positions[:most], ops.PURPOSE_ACCEPT, below, 1)
            uniform = ops.uniform(words.squeeze(-1))
        return Evidence(
            proposed=state.tokens.gather(0, positions[:most]),
            own=own[:most],
            raw=raw[:most],
            processed=processed[:most] if processed is not None else None,
            below_raw=below_raw,
            below_processed=below_processed,
            effective=effective[:most] if effective is not None else None,
            threshold=state.thresholds[below],
            uniform=uniform,
        )

    def _residual(self, evidence: Evidence, stage: int, accepted: Tensor, position: Tensor) -> Tensor:
        """The correction [1] of a rejection at the row `accepted`, whose position is `position`."""
        assert evidence.processed is not None
        assert evidence.effective is not None
        last = evidence.effective.shape[0] - 1
        row = accepted.clamp(max=last).reshape(1)
        words = ops.random_words(
            self.state.seed, position.reshape(1), ops.PURPOSE_RESIDUAL, stage, self.vocab_size
        )
        p_log, q_log = evidence.processed.index_select(0, row), evidence.effective.index_select(0, row)
        return ops.residual_token(p_log, q_log, ops.gumbel(words))

    def _handed_up(
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
        if rule.needs_effective or (isinstance(rule, Fuzzy) and rule.divergence_on == "processed"):
            return True
        return level < self.plan.tiers - 1 and self.plan.keep_effective[level]

    # Pieces

    def _unfinished(self) -> Tensor:
        return (self.state.end < self.state.limit) & ~self.state.ended

    def _window(self, level: int, width: int, rows: Tensor) -> Tensor:
        """Run the `width` tokens from the tier's cached length on; raw logits of `rows`, [R, V] float32."""
        start = self.state.cached[level]
        window = self.state.tokens.gather(0, start + self._steps[:width])
        return self._run(level, window, start, rows, self._bound(start, width))

    def _bound(self, start: Tensor, width: int) -> int:
        """Cache rows that a window of `width` from `start` on may look at, known to the host."""
        return int(start) + width if self.plan.host_control else self._horizon

    def _run(self, level: int, window: Tensor, start: Tensor, rows: Tensor, bound: int) -> Tensor:
        with self.clock.measure(level) if self.clock is not None else nullcontext():
            logits = self.tiers[level].forward(window, start, rows, bound)
        assert logits is not None
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def _own_tokens(self, raw: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Own tokens [R] of raw rows, and a value [R] that is finite iff the row can be decided."""
        if not self.plan.noisy:
            best = raw.max(-1)
            return best.indices, best.values
        noise = (
            self._noise_rows.take(self.state.seed, int(positions[0]), raw.shape)
            if self._noise_rows is not None
            else ops.own_noise(self.state.seed, positions, self.vocab_size)
        )
        return (self._processed(raw) + noise).argmax(-1), raw.amax(-1)

    def _processed(self, raw: Tensor) -> Tensor:
        s = self.state
        return ops.process_logits(raw, s.temperature, s.top_k, s.top_p, s.min_p, filters=self.plan.filters)

    def _logprobs(self, raw: Tensor) -> Tensor:
        """Processed log-probabilities [R, V]; one-hot at temperature 0."""
        return torch.log_softmax(self._processed(raw), -1) if self.plan.noisy else ops.one_hot_logprobs(raw)

    def _set(self, value: Tensor, new: Tensor, active: Tensor) -> None:
        """Overwrite a scalar of the state where `active`; under host control nothing inactive comes this far."""
        value.copy_(new if self.plan.host_control else torch.where(active, new, value))

    def _put(self, token: Tensor, live: Tensor) -> None:
        """Append token [1] where `live`; elsewhere the write goes to the buffer's last entry."""
        state = self.state
        slot = torch.where(live, state.end, self._capacity - 1).reshape(1)
        state.tokens.index_put_((slot,), token)
        state.ended.logical_or_(live & state.stop_mask.gather(0, token).squeeze(0))
        state.end.add_(live)

    def _keep_rows(self, level: int, offset: Tensor, raw: Tensor, processed: Tensor | None) -> None:
        """Store the rows of tier `level`'s proposal from `offset` on, where a rule above reads them."""
        index = (offset + self._steps[: raw.shape[0]],)
        own, effective = self.state.own_rows[level], self.state.effective_rows[level]
        if own is not None:
            own.index_put_(index, raw)
        if effective is not None:
            assert processed is not None
            effective.index_put_(index, processed)

    def _keep_logprobs(self, raw: Tensor) -> None:
        if self.state.logprob_rows is not None:
            self.state.logprob_rows[: raw.shape[0]].copy_(raw)

    def _note_bad(self, level: int, peak: Tensor, positions: Tensor, valid: Tensor) -> None:
        """Remember the first valid position [R] whose row had NaN, +inf or nothing but -inf."""
        if self.plan.host_control and math.isfinite(float(peak.sum())):
            return
        found = torch.where(valid & ~peak.isfinite(), positions, NO_POSITION).amin(0)
        bad = self.state.bad[level]
        bad.copy_(torch.minimum(bad, found))

    def _count(
        self,
        below: int,
        active: Tensor,
        count: Tensor,
        accepted: Tensor,
        differing: Tensor | None,
        flags: Tensor,
    ) -> None:
        """Add one verify to the counters of the stage above tier `below`.

        `flags` is bool [3]: accepted as a whole, replacement put, active. Columns in the order of `COUNTERS`.
        """
        numbers = torch.stack((count, accepted, self._steps[0] if differing is None else differing))
        made = torch.cat((numbers, flags)) * active
        counters = self.state.counters
        counters[below, : made.shape[0]] += made
        counters[below + 1, COLUMN["forwards"]] += active


class _NoiseRows:
    """Own-token noise drawn once per position, in blocks: for host control, where the host knows positions.

    The rows are those of `ops.own_noise`, bit for bit; drawing a block costs little more than a single row.
    """

    BLOCK = 16

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._first = 0

    def take(self, seed: Tensor, first: int, shape: torch.Size) -> Tensor:
        """Noise [R, V] for R positions from `first` on."""
        count, vocab_size = shape
        if self._rows is None or first < self._first:
            self._rows, self._first = seed.new_empty((0, vocab_size), dtype=torch.float32), first
        self._drop_before(first)
        missing = first - self._first + count - self._rows.shape[0]
        if missing > 0:
            begin = self._first + self._rows.shape[0]
            positions = torch.arange(begin, begin + max(missing, self.BLOCK), device=seed.device)
            self._rows = torch.cat((self._rows, ops.own_noise(seed, positions, vocab_size)))
        offset = first - self._first
        return self._rows[offset : offset + count]

    def _drop_before(self, first: int) -> None:
        """Forget what is further back than any rollback reaches."""
        assert self._rows is not None
        spare = first - self._first - MAX_WINDOW
        if spare > MAX_WINDOW:
            self._rows, self._first = self._rows[spare:], self._first + spare


class TorchRounds:
    """Rounds that are computed step by step."""

    steps_class: ClassVar[type[TorchSteps]] = TorchSteps

    def __init__(
        self, tiers: Sequence[Tier], plan: Plan, state: State, vocab_size: int, clock: Clock | None = None
    ) -> None:
        """Arguments as `TorchSteps`."""
        self.moved: Sequence[Tensor] = ()
        self.steps = self.steps_class(tiers, plan, state, vocab_size, clock)
        self.recursion = Recursion(plan, self.steps)

    @property
    def clock(self) -> Clock | None:
        """See `Rounds`."""
        return self.steps.clock

    @clock.setter
    def clock(self, clock: Clock | None) -> None:
        self.steps.clock = clock

    def restart(self, clock: Clock | None) -> None:
        """See `Rounds`."""
        self.steps.restart(clock)

    def park(self, context: int) -> None:
        """See `Rounds`; every round looks at the state anew."""

    def launches(self) -> int | None:
        """See `Rounds`."""
        return None

    def outer_round(self, known_end: int | None = None) -> None:
        """See `Rounds`."""
        self.recursion.outer_round(known_end)

    def sections(self, known_end: int) -> Sequence[Section]:
        """See `Rounds`."""
        script = Script(self.steps, [tier.name for tier in self.steps.tiers])
        Recursion(self.steps.plan, script).outer_round(known_end)
        return script.sections

    def first_token(self, row: Tensor, kv_bound: int, window: Tensor, start: Tensor) -> None:
        """See `Rounds`."""
        self.steps.first_token(row, kv_bound, window, start)
