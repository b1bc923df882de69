"""The result of a generation: text, tokens, statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyramid_rt.stats import Stats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The target's raw distribution (temperature 1, no filters) where one token was committed.

    Attributes:
        token: the committed id.
        logprob: its natural-log probability.
        top: the most likely ids with their log-probabilities, most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One finished generation.

    Attributes:
        text: without the end-of-sequence token and without the stop string.
        tokens: the new ids, the end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence, stop token or stop string), "length" (max_new_tokens reached or
            the context full), or "cancelled".
        stats: see `Stats`.
        seed: the seed that was used; the same seed gives the same tokens.
        logprobs: one entry per token, or None when not asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    seed: int
    logprobs: list[TokenLogprobs] | None = None
