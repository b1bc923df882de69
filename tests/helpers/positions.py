"""Tiers that say the same at a position whatever stands before it, and a clock that only they move.

In such a world the replay of `pyramid_rt.tuning.replay` is exact for every method, and time is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyramid_rt import Pyramid

VOCAB = 5
MAX_SEQ = 96


@dataclass
class FakeClock:
    """Seconds that pass only when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class PositionTier:
    """logits[p] for the token at position p. Counts its passes by width; each takes `cost(width)` seconds."""

    name: str
    logits: Tensor
    cost: Callable[[int], float] = lambda width: 0.0
    clock: FakeClock = field(default_factory=FakeClock)
    max_seq: int = MAX_SEQ
    held: list[int] = field(default_factory=list)
    passes: Counter[int] = field(default_factory=Counter)

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def forward(self, tokens: Tensor, start: Tensor, rows: Tensor | None, kv_bound: int) -> Tensor | None:
        width = tokens.shape[0]
        assert kv_bound >= int(start) + width
        self.clock.now += self.cost(width)
        if rows is None:
            return None
        self.passes[width] += 1
        return self.logits.index_select(0, (start + rows + 1).clamp(max=self.logits.shape[0] - 1))

    def reset(self) -> None:
        self.held = []


def logits_of(tokens: Sequence[int], height: float = 6.0) -> Tensor:
    """Logits [n, VOCAB] with these own tokens; two tiers of different tokens are far apart."""
    return height * torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float()


def related(shares: Sequence[float], seed: int) -> list[list[int]]:
    """Own tokens of tiers, small first, the target last: tier i has the target's in about `shares[i]` of places."""
    generator = torch.Generator().manual_seed(seed)
    length = MAX_SEQ + 65
    target = torch.randint(VOCAB, (length,), generator=generator)
    tiers = []
    for share in shares:
        other = (target + torch.randint(1, VOCAB, (length,), generator=generator)) % VOCAB
        tiers.append(torch.where(torch.rand(length, generator=generator) < share, target, other).tolist())
    return [*tiers, target.tolist()]


def pyramid_of(
    logits: Sequence[Tensor], costs: Sequence[Callable[[int], float]], clock: FakeClock, **options: object
) -> Pyramid:
    """A pyramid of two or three such tiers."""
    names = ("draft", "qualifier", "target") if len(logits) == 3 else ("draft", "target")
    tiers = [
        PositionTier(name, table, cost, clock) for name, table, cost in zip(names, logits, costs, strict=True)
    ]
    return Pyramid(tiers, **options)  # type: ignore[arg-type]
