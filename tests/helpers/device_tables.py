"""Table tiers for rounds of kernels: what the LM head kernel leaves, made in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.tables import TableTier
from pyramid_rt.decoding.tiers import DeviceForward, Runnable
from pyramid_rt.kernels.forward.head import TileStatistics
from pyramid_rt.kernels.reference import sampling as ops

TILE = 64


def leave_rows(
    logits: Tensor,
    first: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    rows: Tensor,
    statistics: TileStatistics,
) -> None:
    """Write raw logits [R, V] of `positions` [R] to rows first.. of a tier's buffers as `kernels.head` does."""
    count, vocab = logits.shape
    padded = rows.shape[1]
    wide = torch.full((count, padded), -math.inf, device=logits.device)
    wide[:, :vocab] = logits
    score = wide
    if float(temperature) > 0:
        score = wide / temperature + ops.own_noise(seed, positions, padded)
    part = slice(first, first + count)
    rows[part] = wide
    for tile in range(statistics.peak.shape[1]):
        at = slice(tile * TILE, (tile + 1) * TILE)
        # Like the kernel's, a maximum may pass over a NaN; the sum may not.
        peak = wide[:, at].nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(-1)
        shift = torch.where(peak == -math.inf, 0.0, peak)
        statistics.peak[part, tile] = peak
        statistics.total[part, tile] = (wide[:, at] - shift.unsqueeze(1)).exp().sum(-1)
        best = score[:, at].nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).max(-1)
        statistics.best[part, tile] = best.values
        statistics.token[part, tile] = (best.indices + tile * TILE).to(torch.int32)


@dataclass(frozen=True)
class TableForward:
    """A forward pass of a table, run when it is told to."""

    tier: DeviceTableTier
    request: DeviceForward

    def run(self) -> None:
        r = self.request
        if r.active is not None and int(r.active) == 0:
            return
        self.tier.passes += 1
        window = r.tokens[int(r.start) : int(r.start) + r.width]
        window = torch.nn.functional.pad(window, (0, r.width - window.shape[0]))
        assert int(r.start) + r.width <= max(r.kv_bound, int(r.start) + r.width)
        positions = r.decided + torch.arange(r.count)
        wanted = (positions - 1 - r.start).clamp(0, r.width - 1)
        logits = self.tier.forward(window, r.start, wanted, r.kv_bound)
        assert logits is not None
        first = int(r.decided) - int(r.first)
        leave_rows(logits[:, : r.vocab_size], first, positions, r.seed, r.temperature, r.rows, r.statistics)


class DeviceTableTier(TableTier):
    """A table tier that takes part in rounds of kernels.

    It has no other way to process a prompt than by windows of launches.

    Attributes:
        passes: how many were not skipped.
    """

    passes = 0
    device_rounds = True
    bulk = 0

    def whole_chunks(self, prompt: int) -> int:
        return 0

    def device_forward(self, request: DeviceForward) -> Sequence[Runnable]:
        return [TableForward(self, request)]
