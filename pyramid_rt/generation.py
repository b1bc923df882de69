"""One generation on the device: prompt processing, outer rounds, and what the host reads after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pyramid_rt.errors import NonFiniteLogitsError
from pyramid_rt.params import SamplingParams
from pyramid_rt.result import TokenLogprobs
from pyramid_rt.rounds import rounds_for
from pyramid_rt.state import NO_POSITION, Plan, State
from pyramid_rt.stats import ForwardClock
from pyramid_rt.tiers import Tier

PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Commit:
    """The tokens of one outer round (or of the prompt's end), as the host sees them."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Generation:
    """Decodes one prompt. `start` once, then `advance` until `finished`.

    Args:
        tiers: those of the method, small to large.
        plan, state: matching buffers; everything of the request in `state` is overwritten.
        vocab_size: columns of the logits that are decoded over.
        prompt: 1 to max_seq - 1 token ids.
        stop_ids: ids that end the sequence.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        plan: Plan,
        state: State,
        vocab_size: int,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
    ) -> None:
        self._tiers, self._plan, self._state = tiers, plan, state
        self._prompt = list(prompt)
        self._context = min(tier.max_seq for tier in tiers)
        self._end = len(self._prompt)
        self._lower_ready = plan.tiers == 1
        self.clock = ForwardClock(plan.tiers, state.tokens.device)
        self._rounds = rounds_for(tiers, plan, state, vocab_size, self.clock)
        self._limit = min(self._end + params.max_new_tokens, self._context)
        self.finished = params.max_new_tokens == 0
        self.stopped = False
        self._write_request(params, seed, stop_ids)

    @torch.inference_mode()
    def start(self) -> Commit:
        """Process the prompt in the target, which gives the first token; the lower tiers follow later."""
        target = self._plan.tiers - 1
        self._prefill(target, self._end - 1)
        begin = self._last_chunk()
        window = self._state.tokens[begin : self._end]
        row = torch.full((1,), self._end - 1 - begin, device=window.device)
        start = torch.full((), begin, device=window.device)
        self._rounds.first_token(row, self._end, window, start)
        self.clock.restart()
        return self._read(1)

    @torch.inference_mode()
    def advance(self) -> Commit:
        """One outer round."""
        if not self._lower_ready:
            for level in range(self._plan.tiers - 1):
                self._prefill(level, len(self._prompt))
                self._state.cached[level].fill_(len(self._prompt))
            self._lower_ready = True
        self._rounds.outer_round(self._end)
        return self._read(self._plan.longest_commit)

    def counters(self) -> list[list[int]]:
        """`State.counters` on the host."""
        rows: list[list[int]] = self._state.counters.tolist()
        return rows

    def survived(self) -> list[int]:
        """Per tier, the tokens it put there among those committed after the prompt's first."""
        origin = self._state.origin[len(self._prompt) + 1 : self._end]
        return (
            torch.bincount(origin, minlength=self._plan.tiers).tolist()
            if origin.numel()
            else [0] * self._plan.tiers
        )

    def _write_request(self, params: SamplingParams, seed: int, stop_ids: Sequence[int]) -> None:
        state, device = self._state, self._state.tokens.device
        state.tokens[: self._end].copy_(torch.tensor(self._prompt, device=device))
        state.end.fill_(self._end)
        state.limit.fill_(self._limit)
        state.ended.fill_(False)
        for cached in state.cached:
            cached.fill_(0)
        state.stop_mask.zero_()
        if stop_ids:
            state.stop_mask[torch.tensor(sorted(stop_ids), device=device)] = True
        state.seed.copy_(torch.tensor([seed & 0xFFFFFFFF, seed >> 32], device=device))
        state.temperature.fill_(params.temperature)
        state.top_k.fill_(params.top_k)
        state.top_p.fill_(params.top_p)
        state.min_p.fill_(params.min_p)
        for stage, rule in enumerate(self._plan.rules):
            state.thresholds[stage] = getattr(rule, "threshold", 0.0)
        state.counters.zero_()
        state.bad.fill_(NO_POSITION)

    def _last_chunk(self) -> int:
        """Where the prompt's last chunk begins."""
        return (self._end - 1) // PREFILL_CHUNK * PREFILL_CHUNK

    def _prefill(self, level: int, upto: int) -> None:
        """Put the whole chunks before position `upto` into a tier's cache, or all of them for a lower tier."""
        target = level == self._plan.tiers - 1
        stop = self._last_chunk() if target else upto
        for begin in range(0, stop, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, stop)
            start = torch.full((), begin, device=self._state.tokens.device)
            self._tiers[level].forward(self._state.tokens[begin:end], start, None, end)

    def _read(self, most: int) -> Commit:
        """The one look of the host at a round: what was committed, or which tier failed.

        Raises NonFiniteLogitsError; then the round's tokens are not committed and the caches are cleared.
        """
        state = self._state
        window = state.tokens[self._end : self._end + most]
        head = torch.stack((state.end, state.ended.to(torch.int64)))
        end, ended, *rest = torch.cat((head, state.bad, window)).tolist()
        bad, tokens = rest[: self._plan.tiers], rest[self._plan.tiers :]
        first = min(bad)
        if first != NO_POSITION:
            for tier in self._tiers:
                tier.reset()
            raise NonFiniteLogitsError(self._tiers[bad.index(first)].name, first)
        made = end - self._end
        tokens = tokens[:made]
        logprobs = self._logprobs(tokens)
        self._end = end
        self.stopped = bool(ended)
        self.finished = self.stopped or end >= self._limit
        return Commit(tokens, logprobs)

    def _logprobs(self, tokens: list[int]) -> list[TokenLogprobs]:
        rows = self._state.logprob_rows
        if rows is None or self._plan.logprobs is None or not tokens:
            return []
        logs = torch.log_softmax(rows[: len(tokens)], -1)
        index = torch.tensor(tokens, device=logs.device).unsqueeze(-1)
        chosen = logs.gather(-1, index).squeeze(-1).tolist()
        best = logs.topk(min(self._plan.logprobs, logs.shape[-1]), -1)
        ids, values = best.indices.tolist(), best.values.tolist()
        return [
            TokenLogprobs(token, value, tuple(zip(ids[row], values[row], strict=True)))
            for row, (token, value) in enumerate(zip(tokens, chosen, strict=True))
        ]
