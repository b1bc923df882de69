"""Boards of two or more tiers in the middle of a verify, poisoned where nothing may be read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helpers.device_tables import leave_rows
from helpers.oracle import DEVICE
from pyramid_rt.kernels.decide.decode_state import DecodeState, active_at, bad_at, base_at, cached_at

BASE = 10  # where the outer round and the proposal begin, unless a test says otherwise
SEED = 0xFEDC_BA98_7654_3210


def make_decode_state(
    vocab: int,
    count: int,
    *,
    tiers: int = 2,
    capacity: int = 100,
    temperature: float = 0.7,
    lists: bool = True,
) -> DecodeState:
    """A decode state with `count` rows to spare, every result poisoned and an outer round open at `BASE`."""
    state = DecodeState.allocate(tiers, 2 * count + 2, capacity, vocab, lists=lists, device=DEVICE)
    for result in (state.rows, state.normaliser, state.cut, state.distance, state.partials, state.values,
                   state.winners, state.statistics.peak, state.statistics.total, state.statistics.best):  # fmt: skip
        result.fill_(math.nan)
    for numbers in (
        state.own,
        state.source,
        state.found,
        state.picked,
        state.winning,
        state.amounts,
    ):
        numbers.fill_(-(10**6))
    state.temperature.fill_(temperature)
    state.seed.copy_(torch.tensor([SEED & 0xFFFFFFFF, SEED >> 32]))
    return state


def open_verify(
    state: DecodeState, tokens: list[int], *, level: int = 1, base: int = BASE, limit: int = 90
) -> None:
    """A proposal of `tokens` of the tier below `level` from `base` on, all drawn by that tier."""
    end, tiers = base + len(tokens), state.tiers_count
    state.tokens[base:end] = torch.tensor(tokens, device=DEVICE)
    state.origin[base:end] = level - 1
    state.control[0], state.control[1] = end, limit
    for tier in range(tiers):
        state.control[base_at(tiers, tier)] = BASE if tier >= level else base
        state.control[active_at(tiers, tier)] = 1
        state.control[cached_at(tier)] = end - 1 if tier < level else base - 1
    state.source[base - BASE : end - BASE] = level - 1


def put_rows(state: DecodeState, level: int, logits: Tensor, base: int = BASE) -> None:
    """The rows [R, V] of a tier from position `base` on, as the head leaves them."""
    positions = torch.arange(logits.shape[0], device=DEVICE) + base
    leave_rows(
        logits.to(DEVICE), base - BASE, positions, state.seed, state.temperature, state.rows[level],
        state.statistics_of(level),
    )  # fmt: skip


def random_rows(count: int, vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    """[count, vocab] float32 on the CPU."""
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def control_of(state: DecodeState) -> dict[str, object]:
    """The words of `control` by name, on the host."""
    n, words = state.tiers_count, state.control.tolist()
    return {
        "end": words[0],
        "ended": bool(state.ended),
        "cached": words[cached_at(0) : cached_at(n)],
        "base": words[base_at(n, 0) : base_at(n, 0) + n],
        "active": words[active_at(n, 0) : active_at(n, 0) + n],
        "bad": words[bad_at(n) :],
    }
