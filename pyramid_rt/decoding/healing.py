"""The first tokens of a text that must begin with certain characters: drawn by the target alone.

They come before any speculation, so every method of a pyramid has the same ones: the target's own tokens (see
`recursion`) over a vocabulary of which all but the allowed ids are masked. A round then finds them in the token
buffer as if they were the prompt's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyramid_rt.decoding.state import State
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import NonFiniteLogitsError
from pyramid_rt.kernels.reference import sampling as ops


class Constraint(Protocol):
    """The tokens of which the next one must be one."""

    def allowed(self) -> Sequence[int]:
        """Ids, at least one."""
        ...

    def after(self, token_id: int) -> Constraint | None:
        """The constraint on the token after this one; None where everything is allowed from there on."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens drawn under a constraint, and the target's raw logits [tokens, V] float32 for each."""

    tokens: list[int]
    rows: Tensor


def draw(
    tier: Tier,
    state: State,
    constraint: Constraint,
    text: Sequence[int],
    begin: int,
    limit: int,
    stop_ids: Collection[int],
    *,
    filters: bool,
) -> Drawn:
    """Draw tokens after `text` until nothing constrains the next one.

    Args:
        tier: the target; its cache is extended by all but the last drawn token.
        state: for the sampling numbers of the request, and for its device.
        constraint: on the first token.
        text: ids before it, at least one.
        begin: how many of them the tier's cache holds, less than all.
        limit: no token is put at or after this position.
        stop_ids: a drawn token that is one of them is the last.
        filters: top-k, top-p or min-p is on.

    Raises:
        NonFiniteLogitsError: the tier failed; its cache is cleared.
    """
    ids, rows = list(text), []
    device, vocab_size = state.tokens.device, state.stop_mask.shape[0]
    left: Constraint | None = constraint
    while left is not None and len(ids) < limit:
        end = len(ids)
        window = torch.tensor(ids[begin:], dtype=torch.int64, device=device)
        start = torch.full((), begin, dtype=torch.int64, device=device)
        row = torch.full((1,), end - 1 - begin, dtype=torch.int64, device=device)
        logits = tier.forward(window, start, row, end)
        assert logits is not None
        raw = logits[:, :vocab_size]
        if not math.isfinite(float(raw.amax())):
            tier.reset()
            raise NonFiniteLogitsError(tier.name, end)
        token = _own_token(state, raw, left.allowed(), end, filters=filters)
        ids.append(token)
        rows.append(raw)
        begin = end
        left = None if token in stop_ids else left.after(token)
    drawn = torch.cat(rows) if rows else torch.empty((0, vocab_size), dtype=torch.float32, device=device)
    return Drawn(ids[len(text) :], drawn)


def _own_token(state: State, raw: Tensor, allowed: Sequence[int], position: int, *, filters: bool) -> int:
    """The own token at a position among those that are allowed."""
    index = torch.tensor(allowed, dtype=torch.int64, device=raw.device)
    masked = torch.full_like(raw, -math.inf)
    masked[:, index] = raw[:, index]
    scaled = ops.process_logits(
        masked, state.temperature, state.top_k, state.top_p, state.min_p, filters=filters
    )
    place = torch.full((1,), position, dtype=torch.int64, device=raw.device)
    noise = ops.own_noise(state.seed, place, raw.shape[-1])
    return int(torch.where(state.temperature > 0, scaled + noise, scaled).argmax())
