"""The host's one look at a round: a small vector of numbers, copied while the device may already run the next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_rt.decoding.counters import COUNTERS
from pyramid_rt.decoding.place import Mark, Place, inside
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.decoding.tiers import Runnable


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A round's outcome, as of its end.

    Attributes:
        tokens: committed by it.
        end: positions known. ended: the last token is a stop token.
        bad: per tier, the first position with non-finite logits, or NO_POSITION.
        cached: per tier, positions its cache holds.
        counters: `State.counters`.
    """

    tokens: list[int]
    end: int
    ended: bool
    bad: list[int]
    cached: list[int]
    counters: list[list[int]]


class RoundReader:
    """Copies what the host wants to know of each round, in the order of the rounds.

    `gather` ends a round and may be captured with it: a round's tokens are those since the last `gather`.
    `post` starts the copy to the host and waits for nothing; `take` waits until the oldest posted round is done.
    On CUDA the copy goes to pinned memory, and a mark of the place says when it is there.

    Args:
        plan, state: of the rounds.
        ahead: most rounds that are posted and not taken.
        place: of the state; all this happens inside it.
    """

    def __init__(self, plan: RoundPlan, state: State, ahead: int, place: Place) -> None:
        self._plan, self._state, self.place = plan, state, place
        with place.allocation():
            self._allocate(ahead)

    def _allocate(self, ahead: int) -> None:
        plan, state = self._plan, self._state
        device = state.tokens.device
        self._steps = torch.arange(plan.longest_commit, dtype=torch.int64, device=device)
        self.reported = torch.zeros((), dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        size = 3 + plan.tiers * (2 + len(COUNTERS)) + plan.longest_commit
        self._numbers = torch.zeros(size, dtype=torch.int64, device=device)
        self._free = [
            torch.zeros(size, dtype=torch.int64, device="cpu", pin_memory=pinned) for _ in range(ahead + 1)
        ]
        self._posted: deque[tuple[Tensor, Mark | None]] = deque()
        self._launch: Runnable | None = None
        if state.decode_state is not None:
            # Triton, which the kernels need, is not everywhere.
            from pyramid_rt.kernels.decide import readback

            self._launch = readback.plan(
                state.decode_state, self.reported, self._numbers, plan.longest_commit
            )

    @property
    def posted(self) -> int:
        """Rounds posted and not yet taken."""
        return len(self._posted)

    @inside
    def restart(self, end: int) -> None:
        """A new text of `end` tokens: forget the rounds that were not taken."""
        self._free += [place for place, _ in self._posted]
        self._posted.clear()
        self.reported.fill_(end)

    @inside
    def gather(self) -> None:
        """After a round, on the device: what the host will want to know of it."""
        if self._launch is not None:
            self._launch.run()
            return
        s = self._state
        head = torch.stack((self.reported, s.end, s.ended.to(torch.int64), *s.cached))
        positions = (self.reported + self._steps).clamp(max=s.tokens.shape[0] - 1)
        numbers = (head, s.bad, s.counters.flatten(), s.tokens.gather(0, positions))
        torch.cat(numbers, out=self._numbers)
        self.reported.copy_(s.end)

    @inside
    def post(self) -> None:
        """After `gather`: send it to the host."""
        place = self._free.pop()
        place.copy_(self._numbers, non_blocking=True)
        self._posted.append((place, self.place.mark()))

    @inside
    def take(self) -> Snapshot:
        """The oldest posted round."""
        place, mark = self._posted.popleft()
        if mark is not None:
            mark.synchronize()
        begin, end, ended, *rest = place.tolist()
        self._free.append(place)
        tiers, columns = self._plan.tiers, len(COUNTERS)
        cached, bad, flat = rest[:tiers], rest[tiers : 2 * tiers], rest[2 * tiers :]
        counters = [flat[row * columns : (row + 1) * columns] for row in range(tiers)]
        tokens = flat[tiers * columns :]
        return Snapshot(tokens[: end - begin], end, bool(ended), bad, cached, counters)
