"""Tiers as the recursion knows them: anything that gives logits for a window of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyramid_rt.kernels.forward.head import TileStatistics


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


@runtime_checkable
class PromptTier(Protocol):
    """A tier that wants to know how long a text's prompt is; keys may depend on it."""

    def begin(self, prompt: int) -> None:
        """A text begins whose prompt has so many tokens. `held` gives up what holds no longer."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceForward:
    """A forward pass of a round of kernels. Every scalar is read on the device, when it runs.

    Row r of the results is the logits for position decided + r, which come from window row
    decided - 1 + r - start, clamped to the window. It belongs at row decided - first + r of `rows` and
    `statistics`; r < count.

    Attributes:
        tokens: int64 [max_seq + 64], the token buffer; the window is tokens[start : start + width].
        start: int64 []: the tier's cached length.
        decided: int64 []: the position that the first wanted row decides.
        first: int64 []: the position that row 0 belongs to.
        width: of the window, up to 64; of a prompt's last chunk, more.
        count: rows wanted, up to 64; 0 for none (prefill), and then nothing but the cache is written.
        vocab_size: columns that count; the rest of a row is -inf.
        rows: float32 [R, P]: raw logits. statistics: [R, tiles of 64], as the LM head kernel leaves them.
        seed: int64 [2]. temperature: float32 []: of the noise in `statistics.best`; 0 turns it off.
        kv_bound: host integer: no cache row from there on is looked at.
        active: int64 []: 1 while the tier has work this round; where it is 0, the pass changes nothing and costs no
            more than its launches. None: it always runs.
    """

    tokens: Tensor
    start: Tensor
    decided: Tensor
    first: Tensor
    width: int
    count: int
    vocab_size: int
    rows: Tensor
    statistics: TileStatistics
    seed: Tensor
    temperature: Tensor
    kv_bound: int
    active: Tensor | None = None


class Runnable(Protocol):
    """A launch, or what stands for one."""

    def run(self) -> None:
        """Start it on the current stream; reads no device value on the host."""
        ...


class DeviceTier(Tier, Protocol):
    """A tier that takes part in rounds of kernels.

    Attributes:
        device_rounds: whether it can, as it was loaded.
        bulk: positions from the first on that `fill_chunk` put into the cache, whose bits are not those that
            `device_forward` would leave. A multiple of a chunk.
    """

    bulk: int

    @property
    def device_rounds(self) -> bool: ...

    def whole_chunks(self, prompt: int) -> int:
        """The count of a prompt's first tokens that `fill_chunk` processes; the prompt's length alone decides it."""
        ...

    def fill_chunk(self, tokens: Tensor, begin: int) -> int:
        """Process a chunk of the token buffer [max_seq + 64] from `begin` on, a multiple of chunks; where it ends."""
        ...

    def device_forward(self, request: DeviceForward) -> Sequence[Runnable]:
        """The launches of a forward pass, in order. They may be run any number of times."""
        ...


def shared_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    count = 0
    for ours, wanted in zip(held, prompt, strict=False):
        if ours != wanted:
            break
        count += 1
    return count
