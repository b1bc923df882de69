"""What a tier is to the recursion: anything that gives logits for a window of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Tier(Protocol):
    """A model with its own cache of `max_seq + 64` positions.

    Attributes:
        name: unique in the pyramid; errors and statistics carry it.
        vocab_size: columns that `forward` returns, at least the pyramid's common vocabulary.
        max_seq: positions the cache can hold, without the slack.
        device: where tokens and logits live.
        held: token ids whose keys and values are in the cache, from position 0 on, as far as is known after a
            call; a prompt that begins with them need not be processed again. Whoever else writes to the cache
            must clear it.
    """

    held: list[int]

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_seq(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, tokens: Tensor, start: Tensor, rows: Tensor | None, kv_bound: int) -> Tensor | None:
        """Run tokens (int64 [T]) at positions start..start + T - 1 and put them into the cache.

        Args:
            tokens: int64 [T].
            start: int64 [], device value: the position of the first token; earlier positions are cached.
            rows: int64 [R], the window rows whose logits are wanted; None for none (prefill).
            kv_bound: host integer, at least start + T: no cache row from there on is looked at.

        Returns: float32 [R, vocab_size]; row r holds the raw logits for position start + rows[r] + 1.
        """
        ...

    def reset(self) -> None:
        """Forget the cache's contents, `held` too, so that nothing non-finite in it survives."""
        ...


def shared_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    count = 0
    for ours, wanted in zip(held, prompt, strict=False):
        if ours != wanted:
            break
        count += 1
    return count
