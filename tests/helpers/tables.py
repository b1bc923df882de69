"""Table tiers: second-order Markov models over a tiny vocabulary, exact to compute and cheap to run by the 10^5.

A table tier keeps its own copy of the tokens it was shown, as a network keeps keys and values, so that a wrong
cached length shows as a wrong distribution.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyramid_rt.decoding.rounds.torch_steps import TorchRoundRunner
from pyramid_rt.decoding.state import RoundPlan, State

VOCAB = 4
MAX_SEQ = 16


class TableTier:
    """logits[a, b] for the token after (.., a, b)."""

    def __init__(
        self, name: str, logits: Tensor, cache: Tensor | None = None, max_seq: int = MAX_SEQ
    ) -> None:
        self.name = name
        self.logits = logits
        self.vocab_size = logits.shape[-1]
        self.max_seq = max_seq
        self.device = logits.device
        self.cache = torch.zeros(max_seq + 64, dtype=torch.int64) if cache is None else cache
        self.held: list[int] = []

    def forward(self, tokens: Tensor, start: Tensor, rows: Tensor | None, kv_bound: int) -> Tensor | None:
        places = start + torch.arange(tokens.shape[0])
        self.cache.index_put_((places,), tokens)
        if rows is None:
            return None
        last = start + rows
        newest, before = self.cache.gather(0, last), self.cache.gather(0, (last - 1).clamp(min=0))
        size = self.vocab_size
        index = (before * size + newest).unsqueeze(-1).expand(-1, size)
        return self.logits.reshape(size * size, size).gather(0, index)

    def reset(self) -> None:
        self.held = []
        self.cache.zero_()


def random_tables(count: int, seed: int, spread: float = 1.5, drift: float = 0.8) -> list[Tensor]:
    """`count` related tables, small tier first: each is the target's plus independent drift."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(VOCAB, VOCAB, VOCAB, generator=generator) * spread
    return [
        target + torch.randn(VOCAB, VOCAB, VOCAB, generator=generator) * drift * (count - 1 - tier) ** 0.5
        for tier in range(count)
    ]


def exact_joint(table: Tensor, prompt: Sequence[int], first: int, length: int) -> Tensor:
    """Exact probabilities [VOCAB ** length] of tokens first..first + length - 1 (1-based) after `prompt`."""
    transition = torch.softmax(table.double(), -1)
    state = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    state[prompt[-2], prompt[-1]] = 1.0
    for _ in range(first - 1):
        state = torch.einsum("ab,abc->bc", state, transition)
    joint = []
    for word in itertools.product(range(VOCAB), repeat=length):
        current = state
        for token in word:
            keep = torch.zeros(VOCAB, dtype=torch.float64)
            keep[token] = 1.0
            current = torch.einsum("ab,abc->bc", current, transition) * keep
        joint.append(current.sum())
    return torch.stack(joint)


def empirical_joint(tokens: Tensor) -> Tensor:
    """Frequencies [VOCAB ** L] of rows of tokens [runs, L]."""
    weights = VOCAB ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return torch.bincount((tokens * weights).sum(-1), minlength=VOCAB ** tokens.shape[1]) / tokens.shape[0]


def total_variation(a: Tensor, b: Tensor) -> float:
    return 0.5 * (a - b).abs().sum().item()


def decode_many(
    tables: Sequence[Tensor],
    plan: RoundPlan,
    seeds: Tensor,
    *,
    prompt: Sequence[int] = (1, 2),
    new_tokens: int = 6,
    temperature: float = 1.0,
    make: Callable[..., TorchRoundRunner] = TorchRoundRunner,
) -> Tensor:
    """Run the recursion, device control, once per seed (int64 [runs]) in one `vmap`. Tokens [runs, new_tokens]."""
    template = State.allocate(plan, MAX_SEQ, VOCAB, torch.device("cpu"))
    n = len(prompt)

    def one(seed: Tensor) -> Tensor:
        zero = seed * 0

        def own(value: object) -> object:
            # Buffers written in place must belong to the run, so each is made from its seed.
            if isinstance(value, Tensor):
                return value + (zero.to(value.dtype) if value.dtype != torch.bool else zero.bool())
            return [own(item) for item in value] if isinstance(value, list) else value

        state = State(**{name: own(value) for name, value in vars(template).items()})  # type: ignore[arg-type]
        tiers = [
            TableTier(str(i), table, torch.zeros(MAX_SEQ + 64, dtype=torch.int64) + zero)
            for i, table in enumerate(tables)
        ]
        state.seed.copy_(torch.stack((seed & 0xFFFFFFFF, seed >> 32)))
        state.temperature.add_(temperature)
        state.limit.add_(n + new_tokens)
        run = make(tiers, plan, state, VOCAB)
        window = torch.tensor(prompt)
        state.tokens[:n].copy_(window)
        state.end.add_(n)
        for level, tier in enumerate(tiers[:-1]):
            tier.forward(window, zero, None, MAX_SEQ)
            state.cached[level].add_(n)
        run.first_token(torch.tensor([n - 1]), MAX_SEQ, window, zero)
        for _ in range(new_tokens - 1):
            run.outer_round()
        return state.tokens[n : n + new_tokens]

    return torch.vmap(one)(seeds)


def noise_floor(exact: Tensor, runs: int) -> float:
    """Total variation that `runs` exact samples show on average: half the sum of E|frequency - probability|."""
    return 0.5 * (2 * exact * (1 - exact) / (torch.pi * runs)).sqrt().sum().item()
