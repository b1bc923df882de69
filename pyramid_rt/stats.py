"""Statistics of one generation, and the clock behind their seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyramid_rt.decoding.counters import COLUMN, COUNTERS


def ratio(part: float, whole: float) -> float | None:
    """part / whole; 0/0, which says nothing, is None."""
    return part / whole if whole else None


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier over one generation. Of the target, which proposes to no tier, only the first four are set.

    Attributes:
        name: of the tier.
        forwards: forward passes, without prefill and without inactive rounds.
        seconds: spent in those forwards; None where rounds ran as CUDA graphs, which hide it.
        survived: tokens this tier put there that were committed.
        proposed: its tokens that were verified, after cuts at stop tokens and limits.
        accepted: of those, the ones that stood.
        acceptance_rate: accepted / proposed.
        position_acceptance: accepted / (accepted + rejections), the per-token alpha of throughput models.
        block_efficiency: (accepted + corrections + bonuses) / (proposed + verifies), the paper's beta.
        mean_accepted: accepted / verifies; the bonus is not counted.
    """

    name: str
    forwards: int
    seconds: float | None
    survived: int
    proposed: int | None = None
    accepted: int | None = None
    acceptance_rate: float | None = None
    position_acceptance: float | None = None
    block_efficiency: float | None = None
    mean_accepted: float | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """One generation.

    Attributes:
        method: name of the method, or "chain" for rules of the caller's own.
        tiers: small to large.
        prompt_tokens, new_tokens: counts.
        reused_tokens: of the prompt, those whose keys and values the target still had from an earlier call.
        tokens_per_target_forward: committed tokens per target pass, without the one that prefill gave.
        differs: for a lossy method, the share of verified and committed tokens that are not the target's own
            token in that verify; None for a lossless one.
        time_to_first_token: seconds from the start of the work to the first committed token on the host.
        seconds: spent working, prompt included; pauses of a stream's reader are not.
        tokens_per_second: new_tokens / seconds.
        decode_tokens_per_second: the tokens after the first, per second after it.
    """

    method: str
    tiers: tuple[TierStats, ...]
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    tokens_per_target_forward: float | None
    differs: float | None
    time_to_first_token: float | None
    seconds: float
    tokens_per_second: float | None
    decode_tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, for JSON."""
        return {**asdict(self), "tiers": [asdict(tier) for tier in self.tiers]}


class ForwardClock:
    """Seconds per tier: host time on a CPU, CUDA events on a GPU (read once, at the end)."""

    def __init__(self, tiers: int, device: torch.device) -> None:
        self._seconds = [0.0] * tiers
        self._device = device
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, level: int) -> Iterator[None]:
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((level, begin, end))
        else:
            begin_seconds = time.perf_counter()
            yield
            self._seconds[level] += time.perf_counter() - begin_seconds

    def restart(self) -> None:
        """Forget what was measured."""
        self._seconds = [0.0] * len(self._seconds)
        self._events.clear()

    def seconds(self) -> list[float]:
        """Per tier; waits for the device."""
        for level, begin, end in self._events:
            end.synchronize()
            self._seconds[level] += begin.elapsed_time(end) / 1000.0
        self._events.clear()
        return list(self._seconds)


@dataclass(frozen=True, slots=True)
class Timing:
    """Host seconds of a generation: until the first token (None before it), and in all."""

    first_token: float | None
    total: float


def no_work(tiers: int) -> tuple[list[list[int]], list[int], list[float | None]]:
    """Counters, survived tokens and seconds of a call that ended before anything ran, for `summarise`."""
    return [[0] * len(COUNTERS) for _ in range(tiers)], [0] * tiers, [None] * tiers


def summarise(
    method: str,
    lossless: bool,
    names: Sequence[str],
    counters: Sequence[Sequence[int]],
    survived: Sequence[int],
    seconds: Sequence[float | None],
    prompt_tokens: int,
    reused_tokens: int,
    new_tokens: int,
    timing: Timing,
) -> Stats:
    """Statistics from the device counters (`State.counters`, one row per tier), origins and clocks."""
    rows = zip(names, counters, survived, seconds, strict=True)
    tiers = tuple(_tier_stats(*row, proposing=level < len(names) - 1) for level, row in enumerate(rows))
    forwards = counters[-1][COLUMN["forwards"]]
    if len(names) > 1:
        top = counters[-2]
        committed = top[COLUMN["accepted"]] + top[COLUMN["replacements"]]
        differs = None if lossless else ratio(top[COLUMN["differs"]], committed)
    else:
        committed, differs = survived[0], None
    after_first = None if timing.first_token is None else timing.total - timing.first_token
    return Stats(
        method=method,
        tiers=tiers,
        prompt_tokens=prompt_tokens,
        reused_tokens=reused_tokens,
        new_tokens=new_tokens,
        tokens_per_target_forward=ratio(committed, forwards),
        differs=differs,
        time_to_first_token=timing.first_token,
        seconds=timing.total,
        tokens_per_second=ratio(new_tokens, timing.total),
        decode_tokens_per_second=ratio(new_tokens - 1, after_first)
        if after_first and new_tokens > 1
        else None,
    )


def _tier_stats(
    name: str, row: Sequence[int], survived: int, seconds: float | None, *, proposing: bool
) -> TierStats:
    count = {column: row[index] for column, index in COLUMN.items()}
    own = TierStats(name, count["forwards"], seconds, survived)
    if not proposing:
        return own
    accepted, proposed, verifies = count["accepted"], count["proposed"], count["verifies"]
    return TierStats(
        name=name,
        forwards=own.forwards,
        seconds=seconds,
        survived=survived,
        proposed=proposed,
        accepted=accepted,
        acceptance_rate=ratio(accepted, proposed),
        position_acceptance=ratio(accepted, accepted + verifies - count["whole"]),
        block_efficiency=ratio(accepted + count["replacements"], proposed + verifies),
        mean_accepted=ratio(accepted, verifies),
    )
