"""Frozen configurations of the attention kernel, and the fixed split table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

# Query rows (window rows x query heads of one group) of a program, for every T: what makes results the same
# for every T, and the M of one warp group's instruction.
BLOCK_M = 64
# Neighbouring splits whose partial results are folded together first; decides the bits as the split table does.
FAN = 8


@dataclass(frozen=True, slots=True)
class Splits:
    """Cuts of the sequence, by absolute position alone: sizes[0] below edges[0], sizes[1] below edges[1],
    then sizes[2]. Growing sizes bound the partial results of a long context.
    """

    sizes: tuple[int, int, int] = (256, 1024, 2048)
    edges: tuple[int, int] = (8192, 32768)

    def __post_init__(self) -> None:
        first, second = self.edges
        if not 0 < first < second or first % self.sizes[0] or (second - first) % self.sizes[1]:
            raise ValueError(f"splits: edges {self.edges} are not whole numbers of splits {self.sizes}")

    def count(self, rows: int) -> int:
        """Number of splits that cover cache rows 0 .. rows - 1."""
        first, second = self.edges
        small = -(-min(rows, first) // self.sizes[0])
        middle = -(-max(min(rows, second) - first, 0) // self.sizes[1])
        return small + middle + -(-max(rows - second, 0) // self.sizes[2])


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Constants of the compiled kernel. `block_n` and `splits` decide the bits of the result, the rest only speed.

    `dataclasses.replace` gives a neighbour to try.

    Attributes:
        block_n: cache rows of one step; divides every split size.
        num_warps, num_stages: of the loop over the cache.
        fold_rows: query rows folded at a time; FAN times as many are in flight.
        splits: the split table.
    """

    block_n: int
    num_warps: int
    num_stages: int
    fold_rows: int = 16
    splits: Splits = Splits()

    def __post_init__(self) -> None:
        if any(size % self.block_n for size in self.splits.sizes):
            raise ValueError(f"block_n {self.block_n} does not divide the split sizes {self.splits.sizes}")


# Measured choices: (arch, head_dim, dtype) -> configuration, in place of the rule below; what bench.kernel_tuner
# found faster on that architecture. Another block_n or other splits change the bits, for every T alike.
TUNED: Mapping[tuple[int, int, torch.dtype], AttentionConfig] = MappingProxyType({})


def config_for(dtype: torch.dtype, head_dim: int, capability: int) -> AttentionConfig:
    """The shipped configuration: `TUNED`'s, or the rule.

    Args:
        dtype: of q and the cache.
        head_dim: D.
        capability: compute capability, 10 * major + minor; 0 for the interpreter.
    """
    tuned = TUNED.get((capability, head_dim, dtype))
    if tuned is not None:
        return tuned
    if dtype == torch.float32:
        # Products of float32 run on the plain cores and hold their operands in registers: many warps, few rows.
        return AttentionConfig(block_n=16, num_warps=8 if head_dim <= 64 else 16, num_stages=2, fold_rows=8)
    if head_dim <= 64:
        return AttentionConfig(block_n=64, num_warps=4, num_stages=4)
    if capability in (86, 89, 120):
        # Two blocks of 64 rows of K and V would fill a 99 KB machine, and the tree mask of 64 columns its registers.
        return AttentionConfig(block_n=32, num_warps=8, num_stages=3)
    # One warp group issues a whole 64-row instruction on Hopper; elsewhere the accumulator of 64 x 128 is
    # spread over eight warps, or it spills.
    return AttentionConfig(block_n=64, num_warps=4 if capability == 90 else 8, num_stages=3)
