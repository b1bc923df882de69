"""The result of a generation: text, tokens, statistics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pyramid_rt.stats import Stats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The target's raw distribution (temperature 1, no filters) where one token was committed.

    Attributes:
        token: the committed id.
        logprob: its natural-log probability.
        top: the most likely ids with their log-probabilities, most likely first.
        text: what the token stands for, parts of characters as U+FFFD; empty without a tokenizer.
        top_texts: the same for each of `top`.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text: str = ""
    top_texts: tuple[str, ...] = ()


_SHOWN = 40  # characters of the text in `repr`


@dataclass(frozen=True, slots=True, repr=False)
class GenerationResult:
    """One finished generation; `str` of it is its text.

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

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, new ones, and both, under the names that web interfaces use."""
        prompt, new = self.stats.prompt_tokens, len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, texts and numbers, for JSON; `logprobs` only where asked for."""
        content = {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "usage": self.usage,
            "stats": self.stats.to_dict(),
        }
        if self.logprobs is not None:
            content["logprobs"] = [asdict(entry) for entry in self.logprobs]
        return content

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        return (
            f"GenerationResult({text!r}, {len(self.tokens)} tokens, {self.finish_reason}, seed {self.seed})"
        )
