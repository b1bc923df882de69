"""The cursor: where the text stands while a round goes on, and what the round counts.

Both are a few numbers, of which there is one small op after another on a device. Under host control they are
numbers of the host instead, read once at the start of a round and written back at its end; everything else is the
same. The functions here take either kind.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyramid_rt.decoding.counters import COLUMN, COUNTERS
from pyramid_rt.decoding.state import RoundPlan, State

# A scalar: of the host under host control, else on the device, int64 [] and bool [].
Number = int | Tensor
Flag = bool | Tensor

_FORWARDS = COLUMN["forwards"]


class Cursor:
    """The end of the text, the tiers' cached lengths and the counters of a round on `state`.

    Attributes:
        line: int64 [capacity], 0, 1, 2 and so on, for positions and rows; never written.
        end, limit, ended, cached: as in `State`; under host control valid between `look` and `store`.
    """

    def __init__(self, plan: RoundPlan, state: State) -> None:
        self.state, self._host = state, plan.host_control
        self.line = torch.arange(state.tokens.shape[-1], dtype=torch.int64, device=state.tokens.device)
        self.end: Number = state.end
        self.limit: Number = state.limit
        self.ended: Flag = state.ended
        self.cached: list[Number] = list(state.cached)
        self._counted = [[0] * len(COUNTERS) for _ in range(plan.tiers)]

    def look(self) -> None:
        """At the start of a round: the one reading of the state, under host control."""
        if self._host:
            s = self.state
            self.end, self.limit, self.ended = int(s.end), int(s.limit), bool(s.ended)
            self.cached = [int(cached) for cached in s.cached]
            # Here and not in `store`: a round that was interrupted counts for nothing.
            self._counted = [[0] * len(COUNTERS) for _ in self._counted]

    def store(self) -> None:
        """At the end of a round: under host control the numbers go back into the state."""
        if not self._host:
            return
        state = self.state
        state.end.fill_(self.end)
        state.ended.fill_(self.ended)
        for place, cached in zip(state.cached, self.cached, strict=True):
            place.fill_(cached)
        state.counters += torch.tensor(self._counted, dtype=torch.int64, device=state.counters.device)

    def mark(self) -> Number:
        """The end of the text, which stays that number when the end moves."""
        return self.end.clone() if isinstance(self.end, Tensor) else self.end

    def unfinished(self) -> Flag:
        """True while another token may be put."""
        return but_not(self.end < self.limit, self.ended)

    def number(self, value: Tensor) -> Number:
        """A computed int64 [], read under host control."""
        return int(value) if self._host else value

    def tensor(self, value: Flag) -> Tensor:
        """bool []."""
        if isinstance(value, Tensor):
            return value
        dtype = torch.bool if isinstance(value, bool) else torch.int64
        return torch.full((), value, dtype=dtype, device=self.line.device)

    def places(self, first: Number, count: int) -> Tensor:
        """Positions or rows [count] int64 from `first` on."""
        if isinstance(first, int):
            return self.line[first : first + count]
        return first + self.line[:count]

    def tokens(self, first: Number, count: int) -> Tensor:
        """The tokens [count] int64 at the positions from `first` on."""
        if isinstance(first, int):
            return self.state.tokens[first : first + count]
        return self.state.tokens.gather(0, self.places(first, count))

    def put(self, token: Tensor, active: Flag) -> None:
        """Append token [1] where `active`; on the device another write goes to the buffer's last entry."""
        state = self.state
        if isinstance(active, Tensor):
            slot = torch.where(active, state.end, self.line.shape[0] - 1).reshape(1)
            state.tokens.index_put_((slot,), token)
            state.ended.logical_or_(active & state.stop_mask.gather(0, token).squeeze(0))
            state.end.add_(active)
        elif active:
            self.tokens(self.end, 1).copy_(token)
            self.ended = bool(state.stop_mask[int(token)])
            self.end += 1

    def cache_holds(self, level: int, end: Number, active: Flag) -> None:
        """A tier's cache holds the text up to `end`, where `active`."""
        cached = self.cached[level]
        if isinstance(cached, Tensor):
            cached.copy_(torch.where(self.tensor(active), end, cached))
        elif active:
            self.cached[level] = end

    def roll_back(self, level: int, end: Number, whole: Flag, active: Flag) -> None:
        """The text ends at `end`, and tier `level` has it all in its cache; those below, no more; where `active`.

        A stop token ends it still where the proposal stood as a whole.
        """
        for tier in range(level):
            self.cache_holds(tier, _least(self.cached[tier], end), active)
        self.cache_holds(level, end, active)
        if isinstance(active, Tensor):
            self.state.ended.logical_and_(whole | ~active)
            self.state.end.copy_(torch.where(active, end, self.state.end))
        elif active:
            self.ended, self.end = self.ended & whole, end

    def count_forwards(self, level: int, count: Number) -> None:
        """Add forward passes of a tier."""
        if isinstance(count, int):
            self._counted[level][_FORWARDS] += count
        else:
            self.state.counters[level, _FORWARDS] += count

    def count_verify(
        self, below: int, numbers: tuple[Number, Number, Tensor | None], flags: tuple[Flag, Flag, Flag]
    ) -> None:
        """Add one verify to the counters of the stage above tier `below`, in the order of `COUNTERS`.

        Args:
            numbers: verified, stood, and of these not the own token (None for none of them).
            flags: accepted as a whole, replacement put, active.
        """
        count, accepted, differing = numbers
        if self._host:
            foreign = 0 if differing is None else int(differing)
            counted = self._counted[below]
            for column, value in enumerate((count, accepted, foreign, *flags)):
                counted[column] += int(value)
        else:
            three = (count, accepted, self.line[0] if differing is None else differing)
            # One row of int64: the numbers as they are, the flags as 0 or 1.
            made = torch.cat([torch.stack(cast(list[Tensor], list(part))) for part in (three, flags)])
            self.state.counters[below, : made.shape[0]] += made * flags[2]
        self.count_forwards(below + 1, int(flags[2]) if self._host else flags[2])


def but_not(value: Flag, excluded: Flag) -> Flag:
    """value AND NOT excluded."""
    return value & ~excluded if isinstance(excluded, Tensor) else value and not excluded


def _least(a: Number, b: Number) -> Number:
    return torch.minimum(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else min(a, b)


def entry(values: Tensor, index: Number) -> Tensor:
    """The one entry [1] of values [R] at `index`."""
    return values[index : index + 1] if isinstance(index, int) else values.gather(0, index.reshape(1))
