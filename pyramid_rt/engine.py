"""Runs the outer rounds of one plan, on buffers taken once: eager or captured, and what the host learns of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramid_rt.graphs import GraphedRound, Recorder
from pyramid_rt.readback import RoundReader, Snapshot
from pyramid_rt.recursion import Clock
from pyramid_rt.rounds import by_kernels, rounds_for
from pyramid_rt.state import Plan, State
from pyramid_rt.tiers import Tier


class Engine:
    """Kept between calls; a call overwrites everything of the request in `state`.

    Args:
        tiers: those of the method, small to large.
        plan: the static shape of a round.
        vocab_size: columns of the logits that are decoded over.
        max_seq: positions of the caches, slack excluded.
        device: of the buffers.
        recorder: captures rounds; None runs them eagerly.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        plan: Plan,
        vocab_size: int,
        max_seq: int,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        self.tiers, self.plan = tuple(tiers), plan
        make = State.on_board if by_kernels(tiers, plan) else State.allocate
        self.state = make(plan, max_seq, vocab_size, device)
        # Under device control the next round starts before the last one is read. Log-probabilities are read
        # from rows that the next round overwrites.
        self.ahead = 0 if plan.host_control or plan.logprobs is not None else 1
        self._rounds = rounds_for(tiers, plan, self.state, vocab_size)
        self._reader = RoundReader(plan, self.state, self.ahead)
        self._graphed: GraphedRound | None = None
        if recorder is not None:
            names = tuple(tier.name for tier in tiers)
            self._graphed = GraphedRound(
                self._rounds, self._round, self.state, [self._reader.reported], plan, max_seq, names, recorder
            )

    @property
    def unread(self) -> int:
        """Rounds that were launched and not read."""
        return self._reader.posted

    @property
    def captured(self) -> bool:
        """Whether rounds run as graphs, in which no tier can be timed."""
        return self._graphed is not None

    def launches(self) -> int | None:
        """Kernel launches of an outer round; None where torch decides how many."""
        count = self._rounds.launches()
        return None if count is None else count + 1  # and the report

    def prepare(self) -> int:
        """Capture what will be needed, for every length of text; how many graphs were new."""
        return 0 if self._graphed is None else self._graphed.prepare()

    def restart(self, end: int, clock: Clock) -> None:
        """A new text of `end` tokens: forget rounds that nobody read, and time forwards by this clock."""
        self._reader.restart(end)
        self._rounds.restart(clock)

    def first_token(self, row: Tensor, kv_bound: int, window: Tensor, start: Tensor) -> None:
        """`Rounds.first_token`, to be read like a round."""
        self._rounds.first_token(row, kv_bound, window, start)
        self._reader.gather()
        self._reader.post()

    def launch(self, known_end: int) -> None:
        """One outer round; waits for nothing. `known_end` is an upper bound of `state.end`."""
        self.run(known_end)
        self._reader.post()

    def run(self, known_end: int) -> None:
        """`launch` of a round that nobody will read."""
        if self._graphed is not None:
            self._graphed.run(known_end)
        else:
            self._round(known_end)

    def read(self) -> Snapshot:
        """The oldest round that was not read; waits for it."""
        return self._reader.take()

    def _round(self, known_end: int) -> None:
        self._rounds.outer_round(known_end)
        self._reader.gather()
