"""Rounds of kernels watched from outside: the decode state before and after the launch that decides a verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyramid_rt.decoding.counters import COLUMN
from pyramid_rt.decoding.observing.observer import Observer, Verify
from pyramid_rt.decoding.rules import Measured
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.kernels.reference import sampling as ops

if TYPE_CHECKING:
    from pyramid_rt.kernels.decide.decode_state import DecodeState


@dataclass(frozen=True, slots=True)
class Before:
    """A verify that is about to be decided.

    Attributes:
        level: of the tier that judges.
        position, count: of the proposal. row: its first, among the rows of the round.
        proposed, origin, source: [count], its tokens, the tiers that put them, and those they were drawn from.
        counters: of the tier below.
    """

    level: int
    position: int
    count: int
    row: int
    proposed: Tensor
    origin: Tensor
    source: Tensor
    counters: Tensor


class KernelObserver:
    """Tells an observer what the decisions of kernels did; the host waits for each.

    Tokens, counts, own tokens and divergences are the kernels' own. The probabilities of a rejection are computed
    again from the rows, and may differ from the kernel's in the last bits; what stood is what the kernel said.

    Args:
        observer: of the chain. plan: of its rounds. decode_state: that the kernels work on.
    """

    def __init__(self, observer: Observer, plan: RoundPlan, decode_state: DecodeState) -> None:
        self._observer, self._plan, self._state = observer, plan, decode_state

    def before(self, level: int) -> Before | None:
        """The verify that the next launch decides; None where it is inactive."""
        # Triton, which the decode state brings in, is not everywhere.
        from pyramid_rt.kernels.decide.decode_state import END, active_at, base_at

        s, tiers = self._state, self._plan.tiers
        words = s.control.tolist()
        if not words[active_at(tiers, level)]:
            return None
        position, end = words[base_at(tiers, level - 1)], words[END]
        row = position - words[base_at(tiers, tiers - 1)]
        count = end - position
        return Before(
            level=level,
            position=position,
            count=count,
            row=row,
            proposed=s.tokens[position:end].clone(),
            origin=s.origin[position:end].clone(),
            source=s.source[row : row + count].clone(),
            counters=s.counters[level - 1].clone(),
        )

    def after(self, seen: Before) -> None:
        """The launch has decided it."""
        s, rule = self._state, self._plan.rules[seen.level - 1]
        counted = (s.counters[seen.level - 1] - seen.counters).tolist()
        accepted = counted[COLUMN["accepted"]]
        rows = slice(seen.row, seen.row + seen.count)
        if rule.divergence_kind is not None:
            measured = Measured(divergence=s.distance[: seen.count].clone())
        elif rule.needs_effective:
            measured = self._probabilities(seen)
        else:
            measured = Measured()
        at = seen.position + accepted
        self._observer.saw(
            Verify(
                level=seen.level,
                active=True,
                position=seen.position,
                count=seen.count,
                accepted=accepted,
                replaced=bool(counted[COLUMN["replacements"]]),
                replacement=s.tokens[at : at + 1].clone(),
                proposed=seen.proposed,
                own=s.own[seen.level, rows].clone(),
                origin=seen.origin,
                threshold=s.thresholds[seen.level - 1].clone(),
                measured=measured,
            )
        )

    def _probabilities(self, seen: Before) -> Measured:
        """Of a rejection's proposed tokens: p, q of the tier they were drawn from, and the acceptance uniforms."""
        s, device = self._state, self._state.rows.device
        rows = torch.arange(seen.row, seen.row + seen.count, dtype=torch.int64, device=device)
        places = torch.arange(seen.position, seen.position + seen.count, dtype=torch.int64, device=device)
        words = ops.random_words(s.seed, places, ops.PURPOSE_ACCEPT, seen.level - 1, 1)
        verifying = torch.full_like(seen.source, seen.level)
        return Measured(
            p=self._probability(verifying, rows, seen.proposed),
            q=self._probability(seen.source, rows, seen.proposed),
            uniform=ops.uniform(words.squeeze(-1)),
        )

    def _probability(self, levels: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Processed probabilities [m] of tokens [m] in rows [m] of these tiers."""
        s = self._state
        raw = s.rows[levels.long(), rows, : s.vocab_size]
        if float(s.temperature) > 0:
            scaled = ops.process_logits(
                raw, s.temperature, s.top_k, s.top_p, s.min_p, filters=self._plan.filters
            )
            logs = torch.log_softmax(scaled, -1)
        else:
            logs = ops.one_hot_logprobs(raw)
        return logs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()
