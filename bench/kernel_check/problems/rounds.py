"""Whole rounds of a small random pyramid in the triton backend: eager, in graph replay, and decided by torch.

Three tiers of one random Llama, the lower ones its first layers, so that some of what they propose stands. All
three ways see the same logits, bit for bit: the kernels' own. Tokens and counters must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import cast

import torch

from bench.kernel_check.problems.base import Case, Place, Source
from bench.kernel_check.problems.model import llama_config, parts, random_llama
from pyramid_rt.decoding.graphs import CudaRecorder, Graphs, Recorder
from pyramid_rt.decoding.place import Callback, CudaPlace
from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner, Stage, processed_tiers
from pyramid_rt.decoding.rounds.recursion import RoundRunner
from pyramid_rt.decoding.rounds.torch_steps import TorchRoundRunner
from pyramid_rt.decoding.rules import Fuzzy, Match, Rejection, Rule
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.llama import KVCache, Llama
from pyramid_rt.models.shapes import Shape

# The chains of rules that a case names by number.
CHAINS: tuple[tuple[Rule, Rule], ...] = (
    (Match(), Match()),
    (Fuzzy(0.1), Rejection()),
    (Fuzzy(0.1, "topk_js", "processed", or_match=True), Match()),
    (Fuzzy(0.2, or_match=True), Fuzzy(0.1, "js_fsd")),
)
PROMPT = 9
# What later layers add, beside the first ones: a draft of fewer layers should be worth its while.
DAMPED = 0.35


class Again:
    """Stands for a recorder where there are no graphs: warms up as one does, and repeats the work itself."""

    def capture(self, work: Callback) -> Callback:
        """See `graphs.Recorder`."""
        work()
        return work


@dataclass(frozen=True)
class Decoded:
    """The outcome of a way of decoding, on the host.

    Attributes:
        tokens: prompt included. rounds: outer ones. launches: of one, None where torch decides.
    """

    tokens: list[int]
    ended: bool
    counters: list[list[int]]
    cached: list[int]
    bad: list[int]
    rounds: int
    launches: int | None

    def differences(self, other: Decoded) -> list[str]:
        """Names of what differs, launches left aside."""
        return [
            field.name
            for field in fields(self)
            if field.name != "launches" and getattr(self, field.name) != getattr(other, field.name)
        ]


def damped_llama(shape: Shape, layers: int, whole: Llama | None, source: Source, max_seq: int) -> Llama:
    """A Llama of `layers` layers: a new one, or the first layers of `whole`."""
    sized = Shape(shape.name, shape.hidden, shape.intermediate, layers, shape.heads, shape.kv_heads, shape.head_dim,
                  shape.vocab)  # fmt: skip
    config = llama_config(sized, tied=True, positions=max_seq)
    model = random_llama(config, source, backend="triton", max_seq=max_seq)
    if whole is None:
        for layer in model.layers[1:]:
            layer.out.operand.mul_(DAMPED)
            layer.down.operand.mul_(DAMPED)
        return model
    model.embedding.copy_(whole.embedding)
    model.norm.copy_(whole.norm)
    for mine, theirs in zip(model.layers, whole.layers, strict=False):
        for tensor, source_tensor in zip(parts(mine), parts(theirs), strict=True):
            tensor.copy_(source_tensor)
    return model


class NativeRound:
    """Sizes: those of a `Shape`, chain (of `CHAINS`), heat, new (tokens); filters, draft, qualify, inner optional.

    Args:
        case: see above. Its layers are the target's; the others have one layer and all but one.
    """

    def __init__(self, case: Case, place: Place) -> None:
        sizes, source = case.sizes, Source(place, case)
        names = ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocab")
        self.shape, self.place = Shape(case.name, **{name: sizes[name] for name in names}), place
        self.new, self.heat, self.max_seq = sizes["new"], sizes["heat"] / 10, PROMPT + sizes["new"] + 64
        self.filters = bool(sizes.get("filters"))
        lengths = (sizes.get("draft", 4), sizes.get("qualify", 10))
        self.plan = RoundPlan(
            CHAINS[sizes["chain"]], lengths, sizes.get("inner"), False, self.heat > 0, self.filters
        )
        self.layers = (1, max(1, self.shape.layers - 1), self.shape.layers)
        whole = damped_llama(self.shape, self.layers[2], None, source, self.max_seq)
        parts = [damped_llama(self.shape, n, whole, source, self.max_seq) for n in self.layers[:2]]
        self.tiers = [
            ModelTier(
                name,
                model,
                KVCache.allocate(model.config, self.max_seq, source.dtype, place.device),
                self.max_seq,
                Path(),
            )
            for name, model in zip(("draft", "qualifier", "target"), (*parts, whole), strict=True)
        ]
        self.prompt = source.integers(PROMPT, high=self.shape.vocab)

    def launches(self) -> list[Launch]:
        """Those of one round, for a compiler."""
        state = State.for_kernels(self.plan, self.max_seq, self.shape.vocab, self.place.device)
        rounds = KernelRoundRunner(self.tiers, self.plan, state, self.shape.vocab)
        return [cast(Launch, launch) for stage in self.stages(rounds) for launch in stage.launches]

    def stages(self, rounds: KernelRoundRunner) -> Sequence[Stage]:
        """Of a round over the whole cache."""
        return rounds.stages(self.max_seq + 64)

    def expected_launches(self) -> int:
        """5 L + 2 a pass, one a decision, one more where processed distributions are wanted."""
        plan = self.plan
        processed = processed_tiers(plan)
        passes = [5 * count + 2 for count in self.layers]
        inner = plan.inner_rounds or plan.lengths[1]
        drawn = plan.burst * (passes[0] + 1 + plan.filters)
        middle = passes[1] + 1 + (plan.filters or processed[0] or processed[1])
        return inner * (drawn + middle) + passes[2] + 1 + (plan.filters or processed[2])

    def decode(self, way: str) -> Decoded:
        """From the prompt to the limit: `torch`, `eager` or `graph`."""
        plan, vocab, device = self.plan, self.shape.vocab, self.place.device
        allocate = State.allocate if way == "torch" else State.for_kernels
        state = allocate(plan, self.max_seq, vocab, device)
        window, zero = state.tokens[:PROMPT], torch.zeros((), dtype=torch.int64, device=device)
        window.copy_(self.prompt)
        state.end.fill_(PROMPT)
        state.limit.fill_(PROMPT + self.new)
        state.seed.copy_(torch.tensor([0x7654_3210, 0xFEDC_BA98]))
        state.temperature.fill_(self.heat)
        if self.filters:
            state.top_k.fill_(40)
            state.top_p.fill_(0.9)
        for tier in self.tiers:
            tier.reset()
        for tier, cached in zip(self.tiers[:-1], state.cached, strict=False):
            tier.forward(window, zero, None, PROMPT)
            cached.fill_(PROMPT)
        rounds: RoundRunner
        if way == "torch":
            rounds = TorchRoundRunner(self.tiers, plan, state, vocab)
        else:
            rounds = KernelRoundRunner(self.tiers, plan, state, vocab)
        rounds.first_token(torch.tensor([PROMPT - 1], device=device), PROMPT, window, zero)
        step: Callable[[int], None] = rounds.outer_round
        if way == "graph":
            recorder: Recorder = CudaRecorder(CudaPlace(device)) if device.type == "cuda" else Again()
            names = tuple(tier.name for tier in self.tiers)
            graphs = Graphs(rounds, state, [], plan, self.max_seq, names, recorder)
            step = partial(self._repeat, graphs, rounds)
        return self._finish(state, rounds, step)

    @staticmethod
    def _repeat(graphs: Graphs, rounds: RoundRunner, known_end: int) -> None:
        graphs.run("round", known_end, rounds.sections)

    def _finish(self, state: State, rounds: RoundRunner, step: Callable[[int], None]) -> Decoded:
        made, limit = 0, PROMPT + self.new
        while not bool(state.ended) and int(state.end) < limit and made < self.new:
            step(int(state.end))
            made += 1
        return Decoded(
            state.tokens[: int(state.end)].tolist(),
            bool(state.ended),
            state.counters.tolist(),
            [int(cached) for cached in state.cached],
            state.bad.tolist(),
            made,
            rounds.launches(),
        )

    def faults(self) -> tuple[list[str], Decoded]:
        """Faults found, and the tokens of the graph."""
        found = {way: self.decode(way) for way in ("eager", "graph", "torch")}
        graph, wrong = found["graph"], []
        for way in ("eager", "torch"):
            names = found[way].differences(graph)
            if names:
                wrong.append(f"{way} and graph differ in {', '.join(names)}")
        if len(graph.tokens) != PROMPT + self.new:
            wrong.append(f"{len(graph.tokens) - PROMPT} tokens, expected {self.new}")
        if graph.launches != self.expected_launches():
            wrong.append(f"{graph.launches} launches a round, expected {self.expected_launches()}")
        return wrong, graph
