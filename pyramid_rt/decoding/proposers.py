"""Proposers: what may stand at the bottom of a pyramid instead of a tier and offers tokens without a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import InputError
from pyramid_rt.models.trees import Tree


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens offered to the tier above, and the one that each would follow.

    Attributes:
        tokens: int64 [n] ids.
        count: the first so many are offered: an int, or under device control int64 [].
        parents: int64 [n], for each token the index, below its own, of the one it follows, -1 for the text's last.
            None for a chain, in which each follows the one before it.
    """

    tokens: Tensor
    count: int | Tensor
    parents: Tensor | None = None

    def tree(self, pending: int) -> Tree | None:
        """The rows of a window that verifies it, behind `pending` >= 1 tokens of the text; None for a chain.

        Raises ValueError: more than 64 rows.
        """
        if self.parents is None:
            return None
        text = torch.arange(-1, pending - 1, dtype=torch.int64, device=self.parents.device)
        return Tree.of(torch.cat((text, self.parents + pending)))


@runtime_checkable
class Proposer(Protocol):
    """Offers tokens to the tier above it, from the text alone or from what that tier has said.

    It has no logits, weights or cache. The distribution that an offered token was drawn from is a point mass, so
    `match` and `rejection` above it are exact; a rule that compares distributions is refused. Offering nothing is
    legal: that round the tier above decodes one token.

    Attributes:
        name: unique in the pyramid.
    """

    @property
    def name(self) -> str: ...

    def propose(self, tokens: Tensor, end: int | Tensor, count: int) -> Proposal:
        """Tokens to follow a text.

        Args:
            tokens: int64 [max_seq + 64], the token buffer; the text is tokens[:end], what follows is stale.
            end: an int under host control. Under device control int64 [], not to be read on the host, and neither
                may anything else be.
            count: most tokens that are of use, at least 1.

        Returns: of `count` tokens, on the device of `tokens`, all or some of them offered. Chains only: steps that
            verify trees are not there yet.
        """
        ...

    def heard(self, raw: Tensor, first: int | Tensor) -> None:
        """Raw logits float32 [R, V] of the tier above in a verify, for the positions from `first` on.

        Rows behind a proposal that fell belong to another text than the one that goes on.
        """
        ...

    def reset(self) -> None:
        """Forget the text, after a failed call."""
        ...


class ProposerTier:
    """A proposer in the place of a pyramid's lowest tier. What asks a tier for its size finds no bound here.

    Args:
        proposer: what offers. device: of the pyramid.
    """

    vocab_size = sys.maxsize
    max_seq = sys.maxsize

    def __init__(self, proposer: Proposer, device: torch.device) -> None:
        self.proposer, self.device = proposer, device
        self.held: list[int] = []

    @property
    def name(self) -> str:
        """The proposer's."""
        return self.proposer.name

    def forward(self, tokens: Tensor, start: Tensor, rows: Tensor | None, kv_bound: int) -> Tensor | None:
        """Nothing, for a prompt. Raises TypeError where logits are asked for."""
        if rows is not None:
            raise TypeError(f"{self.name!r} is a proposer: it has no logits")
        return None

    def reset(self) -> None:
        """See `Proposer`."""
        self.held = []
        self.proposer.reset()


def with_proposer(tiers: Sequence[Tier | Proposer]) -> tuple[Tier, ...]:
    """A pyramid's tiers, a proposer at the bottom in its adapter. Raises InputError: one stands elsewhere."""
    lowest, *others = tiers
    for tier in others or [lowest]:
        if isinstance(tier, Proposer):
            raise InputError(f"{tier.name!r} is a proposer: it may only stand below tiers, as the lowest")
    above = cast(Sequence[Tier], others)
    return (ProposerTier(lowest, above[-1].device) if isinstance(lowest, Proposer) else lowest, *above)


def check_proposer(tiers: Sequence[Tier], rules: Sequence[Rule]) -> None:
    """Refuse a rule above a proposer that asks for what it has not. Raises InputError."""
    if isinstance(tiers[0], ProposerTier) and rules and rules[0].needs_own_rows:
        raise InputError(
            f"rule {rules[0].name!r} compares distributions, and {tiers[0].name!r} is a proposer, which has none: "
            "expected match or rejection above it"
        )
