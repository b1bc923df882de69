"""A call on its way: from the checked request to text, tokens and statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from pyramid_rt.decoding.engine import Engine
from pyramid_rt.decoding.generation import Generation
from pyramid_rt.decoding.observing.assembly import TraceBuilder
from pyramid_rt.decoding.place import inside
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.errors import NonFiniteLogitsError
from pyramid_rt.params import SamplingParams
from pyramid_rt.result import FinishReason, GenerationResult, GenerationTrace, TokenLogprobs
from pyramid_rt.stats import Timing, no_work, summarise
from pyramid_rt.streaming import INTERRUPTIONS, Ending, Work
from pyramid_rt.text.detokenizer import TextAssembler
from pyramid_rt.text.healing import Prefix
from pyramid_rt.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Request:
    """A checked call. It names tiers and holds none: a stream that waits must not keep a closed pyramid's weights.

    Attributes:
        params: its options.
        method: the name of the method, or "chain".
        levels: of its tiers, in the pyramid. names: theirs.
        plan: the shape of its rounds.
        prompt: token ids.
        seed: that is used, drawn where none was given.
        stops: strings that end the text. stop_ids: ids that end the sequence, ascending.
        prefix: what the new text must begin with, where the prompt's last token was taken back.
    """

    params: SamplingParams
    method: str
    levels: tuple[int, ...]
    names: tuple[str, ...]
    plan: RoundPlan
    prompt: list[int]
    seed: int
    stops: tuple[str, ...]
    stop_ids: tuple[int, ...]
    prefix: Prefix | None

    def unstarted(self, reason: FinishReason) -> GenerationResult:
        """The result of a call that ended before anything ran."""
        stats = summarise(
            self.method,
            self.lossless,
            self.names,
            *no_work(len(self.names)),
            prompt_tokens=len(self.prompt),
            reused_tokens=0,
            new_tokens=0,
            timing=Timing(None, 0.0),
        )
        logprobs: list[TokenLogprobs] | None = None if self.params.logprobs is None else []
        trace = GenerationTrace(tiers=self.names) if self.params.trace else None
        return GenerationResult("", [], reason, stats, self.seed, logprobs, trace)

    @property
    def lossless(self) -> bool:
        """True where the target's own rule lets only the target's own tokens stand."""
        return all(rule.lossless for rule in self.plan.rules[-1:])


def work(
    engine: Engine, tokenizer: Tokenizer | None, request: Request, ending: Ending, *, reuse: bool
) -> Work:
    """Decode, yielding text; the generator's return value is the result.

    Args:
        engine: of the request's tiers and plan.
        tokenizer: for text and stop strings; None: there is no text.
        ending: ends it early.
        reuse: take what the tiers' caches hold of the prompt.
    """
    run = Run(engine, tokenizer, request, ending, reuse=reuse)
    reason: FinishReason | None = None
    try:
        while not run.over and reason is None:
            reason = ending.reason()
            piece = "" if reason else run.step()
            if piece:
                yield piece
        if reason != "cancelled":
            # Before the device is waited for: it may be in a round that comes to nothing.
            last = run.flush()
            if last:
                yield last
    except NonFiniteLogitsError as error:
        if run.tokens:
            error.partial = run.result("cancelled")
        raise
    except INTERRUPTIONS:
        ending.partial = run.result("cancelled")
        raise
    finally:
        run.close()
    return run.result(reason)


class Run:
    """Host side of one generation: tokens and text so far, and the time spent."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        request: Request,
        ending: Ending,
        *,
        reuse: bool,
    ) -> None:
        begin = time.perf_counter()
        self.place = engine.place
        self._request = request
        self._tokenizer = tokenizer
        self._generation = Generation(
            engine,
            [rule.threshold for rule in request.plan.rules],
            request.params,
            request.seed,
            request.prompt,
            request.stop_ids,
            reuse=reuse,
            constraint=request.prefix,
            interrupted=lambda: ending.reason() is not None,
        )
        self._text = (
            TextAssembler(
                tokenizer,
                request.stops,
                frozenset(request.stop_ids),
                request.prompt,
                skip=request.prefix.rest if request.prefix is not None else b"",
            )
            if tokenizer is not None
            else None
        )
        self.tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._trace = TraceBuilder(request.names, self._spell) if request.params.trace else None
        self._started = False
        self._first: float | None = None
        self._busy = time.perf_counter() - begin

    @property
    def over(self) -> bool:
        """The sequence is finished, or a stop string is complete."""
        return self._generation.finished or (self._text is not None and self._text.stopped)

    @inside
    def step(self) -> str:
        """The next commit; returns the text it lets show."""
        begin = time.perf_counter()
        commit = self._generation.advance() if self._started else self._generation.start()
        self._started = True
        if self._trace is not None:
            position = len(self._request.prompt) + len(self.tokens)
            self._trace.add(position, commit.tokens, commit.records, commit.how)
        self.tokens += commit.tokens
        self._logprobs += [self._spelt(entry) for entry in commit.logprobs]
        piece = ""
        if self._text is not None:
            piece = self._text.push(commit.tokens)
            if self._text.stopped:
                # The device may have run on past the stop string; those tokens are discarded.
                del self.tokens[self._text.tokens_used :], self._logprobs[self._text.tokens_used :]
                if self._trace is not None:
                    self._trace.cut(len(self.tokens))
        self._busy += time.perf_counter() - begin
        if self._first is None and self.tokens:
            self._first = self._busy
        return piece

    def _spell(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token)

    def _spelt(self, entry: TokenLogprobs) -> TokenLogprobs:
        """The same with the texts of its tokens."""
        if self._tokenizer is None:
            return entry
        texts = tuple(self._tokenizer.token_text(index) for index, _ in entry.top)
        return replace(entry, text=self._tokenizer.token_text(entry.token), top_texts=texts)

    def close(self) -> None:
        """Nothing more is wanted of the device."""
        self._generation.close()

    def flush(self) -> str:
        """The text held back, now that nothing follows."""
        return self._text.flush() if self._text is not None else ""

    @inside
    def result(self, reason: FinishReason | None = None) -> GenerationResult:
        """The result so far; without `reason` the one it ended for."""
        request, generation = self._request, self._generation
        if reason is None:
            stopped = generation.stopped or (self._text is not None and self._text.stopped)
            reason = "stop" if stopped else "length"
        stats = summarise(
            request.method,
            request.lossless,
            request.names,
            generation.counters(),
            generation.survived(),
            generation.seconds(),
            prompt_tokens=len(request.prompt),
            reused_tokens=generation.reused,
            new_tokens=len(self.tokens),
            timing=Timing(self._first, self._busy),
        )
        return GenerationResult(
            text=self._text.text if self._text is not None else "",
            tokens=self.tokens,
            finish_reason=reason,
            stats=stats,
            seed=request.seed,
            logprobs=self._logprobs if request.params.logprobs is not None else None,
            trace=None if self._trace is None else self._trace.trace(),
        )
