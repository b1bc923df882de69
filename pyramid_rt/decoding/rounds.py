"""Which way rounds are run: step by step in torch, or from a list of launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor

from pyramid_rt.decoding.recursion import Clock, Rounds
from pyramid_rt.decoding.state import Plan, State
from pyramid_rt.decoding.tiers import DeviceTier, Tier
from pyramid_rt.decoding.torch_steps import TorchRounds


class WindowRounds(Rounds, Protocol):
    """Rounds that process a prompt by lists of launches too, which always take 64 tokens."""

    def place(self, start: Tensor | int) -> None:
        """Where the next `fill` or `first` begins."""
        ...

    def fill(self, level: int) -> None:
        """The 64 tokens from `place` on into a tier's cache."""
        ...

    def first(self) -> None:
        """`first_token` of the window that begins at `place` and ends with the prompt, up to 64 tokens."""
        ...


def by_kernels(tiers: Sequence[Tier], plan: Plan) -> bool:
    """Whether rounds of these tiers run from a list of launches: under device control, where every tier can."""
    return not plan.host_control and all(getattr(tier, "device_rounds", False) for tier in tiers)


def rounds_for(
    tiers: Sequence[Tier], plan: Plan, state: State, vocab_size: int, clock: Clock | None = None
) -> Rounds:
    """Rounds of `tiers` (small to large) by `plan` on `state`; by kernels iff the state was made for them.

    Then every tier must be a `DeviceTier`.
    """
    if state.board is None:
        return TorchRounds(tiers, plan, state, vocab_size, clock)
    # Triton, which the kernels need, is not everywhere.
    from pyramid_rt.decoding.kernel_steps import KernelRounds

    return KernelRounds(cast(Sequence[DeviceTier], tiers), plan, state, vocab_size, clock)
