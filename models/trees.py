"""Windows whose rows are the nodes of a tree. Without one a window is a chain, which is the trivial tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_rt.kernels.limits import WINDOW


@dataclass(frozen=True, slots=True)
class Tree:
    """The order among a window's T <= 64 rows, of which row t lies in cache row start + t.

    Attributes:
        depths: [T] int64, rows on the way up to the first: the row's position is start + depths[t].
        ancestors: [T] int64, bit j set where row t sees row j, its own bit included. All rows see the cache below
            start.
    """

    depths: Tensor
    ancestors: Tensor

    @classmethod
    def of(cls, parents: Tensor) -> Tree:
        """The tree of a window in which each row follows another. Reads no device value on the host.

        Args:
            parents: [T] int64, for each row the index, below its own, of the row it follows; -1 where that is the
                last one in the cache.

        Raises ValueError: more than 64 rows.
        """
        length = parents.shape[0]
        if length > WINDOW:
            raise ValueError(
                f"parents has {length} rows, expected at most {WINDOW}: a bit of a word for each"
            )
        line = torch.arange(length, dtype=torch.int64, device=parents.device)
        reached = ((line == line.unsqueeze(1)) | (line == parents.unsqueeze(1))).float()
        # Ways up of at most 1, 2, 4, ... steps.
        for _ in range((length - 1).bit_length()):
            reached = (reached @ reached).clamp(max=1.0)
        seen = reached.long()
        return cls(seen.sum(1) - 1, (seen << line).sum(1))


def refuse_tree(tree: Tree | None, backend: str) -> None:
    """Raises ValueError for a tree: the backend of this name knows chains only."""
    if tree is not None:
        raise ValueError(
            f"backend {backend!r} takes chains only, found a tree of {tree.depths.shape[0]} rows"
        )
