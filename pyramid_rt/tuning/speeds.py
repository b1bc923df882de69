"""Prefill and decode speed of the methods of a pyramid at chosen lengths of prompt and output: ``bench``."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from pyramid_rt import checks
from pyramid_rt.decoding.methods import tiers_of
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import InputError
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.llama import weight_bytes
from pyramid_rt.tuning.compare import BASELINE, WARM_UP_TOKENS
from pyramid_rt.tuning.turns import Turns, take_turns

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid
    from pyramid_rt.result import GenerationResult


@dataclass(frozen=True, slots=True)
class Case:
    """The lengths of a generation: tokens of the prompt, and new ones."""

    prompt: int
    new: int


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Speed:
    """One method at one pair of lengths.

    Attributes:
        method, case: what was run.
        first_token: seconds until the first token.
        prefill: tokens of the prompt per second until then.
        decode: the tokens after the first, per second after it; the lower tiers' prompt is processed in that time.
        ratio: `decode` over that of `ar` in the same repeat; None where `ar` was not run.
        bandwidth: bytes of weights that decoding's passes read, per second of it; None where a tier is no model.
        tokens_per_target_forward: committed tokens for each pass of the target.
    """

    method: str
    case: Case
    first_token: Spread
    prefill: Spread
    decode: Spread
    ratio: Spread | None
    bandwidth: Spread | None
    tokens_per_target_forward: float | None


def measure_speeds(
    pyramid: Pyramid,
    methods: Sequence[str],
    prompt_tokens: Sequence[int] = (128, 512),
    new_tokens: Sequence[int] = (128,),
    *,
    repeats: int = 3,
    on_step: Callable[[str], None] | None = None,
) -> list[Speed]:
    """Time every method at every pair of lengths, greedily and past any end-of-sequence.

    Methods take turns within a pair (A B C, A B C, ...). Prompts are processed as a whole each time.

    Args:
        pyramid: nobody else may use it meanwhile.
        methods: names, each once.
        prompt_tokens: lengths of prompts, >= 1. new_tokens: lengths of outputs, >= 2.
        repeats: how often everything is measured, >= 1.
        on_step: called with what is being done.

    Returns: by pair of lengths, then by method, in the order given.

    Raises:
        InputError: a method that the pyramid cannot run, or lengths that its context does not hold.
    """
    cases = _checked(pyramid, methods, prompt_tokens, new_tokens, repeats)
    prompts = {case: random_prompt(pyramid, case.prompt) for case in cases}

    def run(case: Case, method: str, tokens: int | None = None) -> GenerationResult:
        return pyramid.generate(
            prompts[case], method=method, max_new_tokens=tokens or case.new, temperature=0.0, ignore_eos=True
        )

    def before(repeat: int, place: int, case: Case) -> None:
        if on_step is not None:
            on_step(f"{methods[place]}, {case.prompt} + {case.new} tokens, repeat {repeat + 1}")

    kept, pyramid.prefix_reuse = pyramid.prefix_reuse, False
    try:
        for case, method in product(cases, methods):
            if on_step is not None:
                on_step(f"{method} warming up")
            run(case, method, min(WARM_UP_TOKENS, case.new))
        turns = take_turns(
            [partial(run, method=method) for method in methods],
            cases,
            repeats,
            tokens=lambda result: len(result.tokens),
            before=before,
        )
    finally:
        pyramid.prefix_reuse = kept
    return [
        _speed(pyramid, turns, methods, place, index, case)
        for index, case in enumerate(cases)
        for place in range(len(methods))
    ]


def default_lengths(max_seq: int, new_tokens: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Lengths of prompts and outputs where none are given: 128 and 512, and 128, as far as the context holds them."""
    new = list(new_tokens) if new_tokens else [min(128, max_seq // 2)]
    prompts = [length for length in (128, 512) if length + max(new) <= max_seq]
    return prompts or [max(1, max_seq // 4)], new


def random_prompt(pyramid: Pyramid, length: int) -> list[int]:
    """Ordinary tokens of a pyramid's vocabulary: the same ones for the same length."""
    special = set() if pyramid.tokenizer is None else set(pyramid.tokenizer.special_ids)
    ids = [
        index
        for index in range(pyramid.vocab_size)
        if index not in special and index not in pyramid.eos_token_ids
    ]
    dice = random.Random(length)
    return [(ids or [0])[int(dice.random() * len(ids or [0]))] for _ in range(length)]


def pass_bytes(tier: Tier) -> int | None:
    """Bytes of weights that a pass of a tier reads: all but an embedding table that is no head as well."""
    if not isinstance(tier, ModelTier):
        return None
    config, dtype = tier.config, tier.cache.k[0].dtype
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
    return weight_bytes(config, dtype) - looked_up


def _checked(
    pyramid: Pyramid,
    methods: Sequence[str],
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[int],
    repeats: int,
) -> list[Case]:
    methods = checks.sequence("methods", methods, "names of methods")
    if not methods or len(set(methods)) < len(methods):
        raise InputError(f"methods must be names, each once, found {checks.shown(methods)}")
    for method in methods:
        tiers_of(checks.text("methods", method), len(pyramid.tiers))
    checks.whole("repeats", repeats, 1)
    lengths = []
    for name, values, least in (("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 2)):
        found = checks.sequence(name, values, "lengths")
        if not found:
            raise InputError(f"{name} must be one length or more, found none")
        lengths.append([checks.whole(name, value, least) for value in found])
    cases = [Case(prompt, new) for prompt, new in product(*lengths)]
    for case in cases:
        if case.prompt + case.new > pyramid.max_seq:
            raise InputError(
                f"a prompt of {case.prompt} tokens and {case.new} new ones need {case.prompt + case.new} positions, "
                f"and the context has {pyramid.max_seq} (max_seq)"
            )
    return cases


def _speed(
    pyramid: Pyramid,
    turns: Turns[GenerationResult],
    methods: Sequence[str],
    place: int,
    index: int,
    case: Case,
) -> Speed:
    """The numbers of one method at one pair of lengths, over the repeats."""
    results = [repeat[index][place].outcome for repeat in turns.repeats]
    firsts = [_first(result) for result in results]
    decode = [_decode(result) for result in results]
    ratio = None
    if BASELINE in methods:
        plain = [_decode(repeat[index][methods.index(BASELINE)].outcome) for repeat in turns.repeats]
        ratio = Spread.of([mine / theirs for mine, theirs in zip(decode, plain, strict=True)])
    sizes = [pass_bytes(pyramid.tiers[level]) for level in tiers_of(methods[place], len(pyramid.tiers))]
    read = [_bytes_read(result, sizes) for result in results]
    return Speed(
        method=methods[place],
        case=case,
        first_token=Spread.of(firsts),
        prefill=Spread.of([case.prompt / seconds for seconds in firsts]),
        decode=Spread.of(decode),
        ratio=ratio,
        bandwidth=None
        if None in read
        else Spread.of(
            [
                (count or 0) / (result.stats.seconds - first)
                for count, result, first in zip(read, results, firsts, strict=True)
            ]
        ),
        tokens_per_target_forward=results[-1].stats.tokens_per_target_forward,
    )


def _first(result: GenerationResult) -> float:
    assert result.stats.time_to_first_token is not None  # nothing ends these early
    return result.stats.time_to_first_token


def _decode(result: GenerationResult) -> float:
    assert result.stats.decode_tokens_per_second is not None  # there are two tokens at least
    return result.stats.decode_tokens_per_second


def _bytes_read(result: GenerationResult, sizes: Sequence[int | None]) -> int | None:
    """Bytes of weights that the passes of decoding read; those over prompts are not counted."""
    total = 0
    for tier, size in zip(result.stats.tiers, sizes, strict=True):
        if size is None:
            return None
        total += tier.forwards * size
    return total
