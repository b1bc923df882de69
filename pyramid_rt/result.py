"""The result of a generation: text, tokens, statistics, trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pyramid_rt.stats import Stats
from pyramid_rt.trace import TokenTrace, VerifyRecord
from pyramid_rt.trace_view import html_view, stdout_has_colours, terminal_view

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


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


class GenerationTrace(list[TokenTrace]):
    """One entry per committed token; `str` of it is a view for a terminal, and a notebook shows it as HTML.

    Attributes:
        rounds: every verify, in the order in which they happened, with the proposals that fell. After a stop string
            there may be some of tokens that were not kept.
        tiers: names of the chain's tiers, small to large.
    """

    def __init__(
        self,
        tokens: Iterable[TokenTrace] = (),
        rounds: Iterable[VerifyRecord] = (),
        tiers: Sequence[str] = (),
    ) -> None:
        super().__init__(tokens)
        self.rounds, self.tiers = list(rounds), tuple(tiers)

    def to_dict(self) -> dict[str, Any]:
        """Tiers, tokens and rounds as plain dicts, lists, texts and numbers, for JSON."""
        return {
            "tiers": list(self.tiers),
            "tokens": [token.to_dict() for token in self],
            "rounds": [record.to_dict() for record in self.rounds],
        }

    def view(self, *, colour: bool = False, width: int = 80) -> str:
        """Legend, text and a line for each token.

        Args:
            colour: paint each token in its tier's colour, with the codes that terminals know.
            width: columns, at least 40.
        """
        return terminal_view(self, colour=colour, width=width)

    def __str__(self) -> str:
        return self.view(colour=stdout_has_colours())

    def __repr__(self) -> str:
        return f"GenerationTrace({len(self)} tokens, {len(self.rounds)} verifies)"

    def _repr_html_(self) -> str:
        return html_view(self)


_SHOWN = 40  # characters of the text in `repr`


@dataclass(frozen=True, slots=True, repr=False)
class GenerationResult:
    """One finished generation; `str` of it is its text.

    Attributes:
        text: without the end-of-sequence token and without the stop string.
        tokens: the new ids, the end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence, stop token or stop string), "length" (max_new_tokens reached or
            the context full), "timeout" (max_time was over) or "cancelled".
        stats: see `Stats`.
        seed: the seed that was used; the same seed gives the same tokens.
        logprobs: one entry per token, or None when not asked for.
        trace: likewise, of how each token came about; its `rounds` have the proposals that fell.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    seed: int
    logprobs: list[TokenLogprobs] | None = None
    trace: GenerationTrace | None = None

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, new ones, and both, under the names that web interfaces use."""
        prompt, new = self.stats.prompt_tokens, len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, texts and numbers, for JSON; `logprobs` and `trace` where asked for."""
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
        if self.trace is not None:
            content["trace"] = self.trace.to_dict()
        return content

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        return (
            f"GenerationResult({text!r}, {len(self.tokens)} tokens, {self.finish_reason}, seed {self.seed})"
        )
