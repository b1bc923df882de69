"""Work that is skipped: a kernel whose active flag is 0, and the passes of rounds that are not due."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.oracle import CONFIG, DEVICE, poisoned, random, sums_of_squares, workspace, zeros
from torch import Tensor

from bench.kernel_check.problems.base import Case, Place, Source
from bench.kernel_check.problems.rounds import damped_llama
from pyramid_rt import Fuzzy, Match, Rejection
from pyramid_rt.decoding.counters import COLUMN
from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.kernels.decide.decode_state import active_at
from pyramid_rt.kernels.forward import attention, embed, gate_up, head, project, qkv
from pyramid_rt.kernels.forward.attention_configs import AttentionConfig, Splits
from pyramid_rt.kernels.launch import Launch, always
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.backends.triton import TritonBackend
from pyramid_rt.models.llama import KVCache
from pyramid_rt.models.shapes import Shape

T = 5
SENTINEL = 7.0


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bytes: NaN equals itself, and 0 is not -0."""
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


def word() -> Tensor:
    """A word that is no tensor of its own, and not aligned like one."""
    return torch.zeros(5, dtype=torch.int64, device=DEVICE)[3]


# One kernel alone.


@dataclass
class Prepared:
    """A kernel's launch by its word, what it writes, and counters that it leaves zero."""

    launch: Callable[[Tensor | None], Launch]
    written: list[Tensor]
    counters: list[Tensor]


SPLIT = replace(CONFIG, splits=2)
WIDTH = 96


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A window, its sums of squares, a norm's weight, and weights."""
    x = random(64, WIDTH, dtype=torch.float32)
    weight = random(rows, WIDTH, dtype=torch.float32, scale=0.1, seed=2)
    return x, sums_of_squares(x, 64), random(WIDTH, dtype=torch.float32, seed=1), weight


def scalar(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def prepared_embed() -> Prepared:
    table, tokens = random(9, WIDTH, dtype=torch.float32), torch.arange(64, device=DEVICE) % 9
    out, scaled = poisoned(2, 64, WIDTH, dtype=torch.float32)
    norm, sums = random(WIDTH, dtype=torch.float32, seed=1), poisoned(2, 64, dtype=torch.float32)

    def launch(active: Tensor | None) -> Launch:
        return embed.plan(table, tokens, norm, T, out, scaled, sums, scalar(3), active=active)

    return Prepared(launch, [out, scaled, sums], [])


def prepared_qkv() -> Prepared:
    x, sums, norm, weight = inputs(64)
    q, space = poisoned(64, 2, 16, dtype=torch.float32), workspace(64, SPLIT)
    k, v = poisoned(2, 1, 99, 16, dtype=torch.float32)
    rotary, start = random(99, 2, 16, dtype=torch.float32, seed=3), scalar(11)

    def launch(active: Tensor | None) -> Launch:
        return qkv.plan(
            x * norm, sums, 1e-5, weight, None, rotary, start, T, q, k, v, space, SPLIT, active=active
        )  # fmt: skip

    return Prepared(launch, [q, k, v, space.partials], [space.counters])


def prepared_attention() -> Prepared:
    config = AttentionConfig(block_n=16, num_warps=4, num_stages=2, splits=Splits((16, 32, 64), (32, 96)))
    q, cache = random(64, 2, 64, dtype=torch.float32), random(2, 1, 160, 64, dtype=torch.float32, seed=1)
    space = attention.workspace(
        length=T, heads=2, kv_heads=1, head_dim=64, kv_bound=130, splits=config.splits, device=DEVICE
    )
    space.acc.fill_(torch.nan)
    space.stats.fill_(torch.nan)
    out = poisoned(64, 128, dtype=torch.float32)

    def launch(active: Tensor | None) -> Launch:
        return attention.plan(
            q, cache[0], cache[1], scalar(120), out, space, length=T, kv_bound=130, config=config, active=active
        )  # fmt: skip

    return Prepared(launch, [out, space.acc, space.stats], [space.arrivals])


def prepared_project() -> Prepared:
    x, _, _, weight = inputs(72)
    residual, space = random(64, 72, dtype=torch.float32, seed=3), workspace(72, SPLIT)
    out, scaled = poisoned(2, 64, 72, dtype=torch.float32)
    norm, sums = random(72, dtype=torch.float32, seed=1), poisoned(2, 64, dtype=torch.float32)

    def launch(active: Tensor | None) -> Launch:
        return project.plan(
            x, weight, None, residual, norm, T, out, scaled, sums, space, SPLIT, active=active
        )

    return Prepared(launch, [out, scaled, sums, space.partials], [space.counters])


def prepared_gate_up() -> Prepared:
    x, sums, norm, weight = inputs(80)
    out, space = poisoned(64, 40, dtype=torch.float32), workspace(80, SPLIT)

    def launch(active: Tensor | None) -> Launch:
        return gate_up.plan(x * norm, sums, 1e-5, weight, None, T, out, space, SPLIT, active=active)

    return Prepared(launch, [out, space.partials], [space.counters])


def prepared_head() -> Prepared:
    x, sums, norm, weight = inputs(101)
    out, statistics = poisoned(64, 104, dtype=torch.float32), head.TileStatistics.allocate(2, DEVICE)
    place = head.Placement(scalar(20), scalar(22), scalar(21), T)
    noise = head.Noise(torch.tensor([1, 2], device=DEVICE), None, torch.tensor(0.7, device=DEVICE))

    def launch(active: Tensor | None) -> Launch:
        return head.plan(
            x * norm, sums, 1e-5, weight, place, 101, out, statistics, noise, CONFIG, active=active
        )  # fmt: skip

    found = [statistics.peak, statistics.total, statistics.best, statistics.token]
    return Prepared(launch, [out, *found], [])


KERNELS = {
    "embed": prepared_embed,
    "qkv": prepared_qkv,
    "attention": prepared_attention,
    "project": prepared_project,
    "gate_up": prepared_gate_up,
    "head": prepared_head,
}


def poison(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else -7)


@pytest.mark.parametrize("op", KERNELS)
def test_a_launch_without_work_writes_nothing(op: str) -> None:
    made, active = KERNELS[op](), word()
    poison(made.written)
    made.launch(None).run()
    expected = [bits(tensor) for tensor in made.written]
    poison(made.written)
    before = [bits(tensor) for tensor in made.written]
    # Nothing here is a result that looks like the poison.
    assert not any(torch.equal(a, b) for a, b in zip(expected, before, strict=True))
    launch = made.launch(active)
    launch.run()
    for a, b in zip(before, made.written, strict=True):
        assert_equal_tensors(a, bits(b))
    assert not any(counter.any() for counter in made.counters)
    # The same launch, after the word has changed on the device.
    active.fill_(1)
    launch.run()
    for a, b in zip(expected, made.written, strict=True):
        assert_equal_tensors(a, bits(b))
    assert not any(counter.any() for counter in made.counters)


@pytest.mark.parametrize("op", KERNELS)
def test_one_binary_serves_launches_with_a_word_and_without(op: str) -> None:
    """A word changes one pointer, which the compiler neither specialises on nor knows the alignment of."""
    made, active = KERNELS[op](), word()
    plain, skippable = made.launch(None), made.launch(active)
    assert plain.kwargs == skippable.kwargs
    assert plain.grid == skippable.grid
    pairs = [
        (a, b)
        for a, b in zip(plain.args, skippable.args, strict=True)
        if isinstance(a, Tensor) and a.data_ptr() != b.data_ptr()
    ]
    assert (always(DEVICE), active) in [(a, b) for a, b in pairs if a is always(DEVICE) and b is active]
    assert always(DEVICE).tolist() == [1]


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(
    "active", [zeros(1, dtype=torch.int32), zeros(2, dtype=torch.int64), zeros(1, device="meta")], ids=str
)
def test_refuses_another_word(op: str, active: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^active "):
        KERNELS[op]().launch(active)


def test_the_constant_word_is_made_once_per_device() -> None:
    assert always(DEVICE) is always(DEVICE)
    meta = always(torch.device("meta"))
    assert (meta.device.type, meta.dtype, tuple(meta.shape)) == ("meta", torch.int64, (1,))


# Rounds of small Llamas, the lower tiers being the target's first layer.

PROMPT, MAX_SEQ, VOCAB = 7, 64, 60


@dataclass
class Decoding:
    """A text after its first token."""

    tiers: list[ModelTier]
    state: State
    rounds: KernelRoundRunner

    @classmethod
    def begin(
        cls,
        rules: tuple[Rule, ...],
        lengths: tuple[int, ...],
        inner_rounds: int | None,
        *,
        new: int,
        stop: bool = False,
        filters: bool = False,
    ) -> Decoding:
        """`stop`: every token after the first ends the text."""
        place = Place(DEVICE, 80)
        source = Source(place, Case("active", "float32", "tiny", {}))
        shape = Shape("tiny", 64, 64, 2, 1, 1, 64, VOCAB)
        whole = damped_llama(shape, 2, None, source, MAX_SEQ)
        models = [damped_llama(shape, 1, whole, source, MAX_SEQ) for _ in rules]
        tiers = [
            ModelTier(
                f"t{i}",
                model,
                KVCache.allocate(model.config, MAX_SEQ, torch.float32, DEVICE),
                MAX_SEQ,
                Path(),
            )
            for i, model in enumerate((*models, whole))
        ]
        plan = RoundPlan(rules, lengths, inner_rounds, False, True, filters)
        state = State.for_kernels(plan, MAX_SEQ, VOCAB, DEVICE)
        state.tokens[:PROMPT] = source.integers(PROMPT, high=VOCAB)
        state.end.fill_(PROMPT)
        state.limit.fill_(PROMPT + new)
        state.seed.copy_(torch.tensor([5, 6]))
        state.temperature.fill_(0.7)
        if filters:
            state.top_k.fill_(20)
        zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for tier, cached in zip(tiers[:-1], state.cached, strict=False):
            tier.forward(state.tokens[:PROMPT], zero, None, PROMPT)
            cached.fill_(PROMPT)
        rounds = KernelRoundRunner(tiers, plan, state, VOCAB)
        window = state.tokens[:PROMPT]
        rounds.first_token(torch.tensor([PROMPT - 1], device=DEVICE), PROMPT, window, zero)
        state.stop_mask.fill_(stop)
        return cls(tiers, state, rounds)

    def revive(self) -> None:
        """Words that say of every tier that it has something to do."""
        assert self.state.decode_state is not None
        n = len(self.tiers)
        self.state.decode_state.control[active_at(n, 0) : active_at(n, 0) + n] = 1

    def streams(self, level: int) -> dict[str, Tensor]:
        """Buffers that every pass of a tier writes anew, and that are not read after it."""
        backend = self.tiers[level].model.backend
        assert isinstance(backend, TritonBackend)
        b = backend.buffers
        names = ("stream", "scaled", "squares", "q", "attended", "inner")
        return {name: getattr(b, name) for name in names}

    def touched(self, level: int) -> dict[str, Tensor]:
        """All that a pass of a tier may write to."""
        backend = self.tiers[level].model.backend
        assert isinstance(backend, TritonBackend)
        assert self.state.decode_state is not None
        b, statistics = backend.buffers, self.state.decode_state.statistics_of(level)
        return self.streams(level) | {
            "cache": self.tiers[level].cache.buffer,
            "rows": self.state.decode_state.rows[level],
            "peak": statistics.peak,
            "total": statistics.total,
            "best": statistics.best,
            "token": statistics.token,
            "partials": b.products.partials,
            "counters": b.products.counters,
            "acc": b.splits.acc,
            "stats": b.splits.stats,
            "arrivals": b.splits.arrivals,
        }

    def everything(self) -> Iterator[tuple[str, Tensor]]:
        """That, of all tiers, and the decode_state."""
        decode_state = self.state.decode_state
        assert decode_state is not None
        for level in range(len(self.tiers)):
            for name, tensor in self.touched(level).items():
                yield f"{name} of tier {level}", tensor
        for name in type(decode_state).__dataclass_fields__:
            tensor = getattr(decode_state, name)
            if isinstance(tensor, Tensor):
                yield name, tensor


@pytest.mark.parametrize(
    ("rules", "lengths", "inner_rounds", "new", "stop", "filters"),
    [
        ((), (), None, 2, False, False),
        ((Rejection(),), (2,), None, 30, True, True),
        ((Match(), Match()), (2, 2), 2, 2, False, False),
        ((Fuzzy(0.1), Rejection()), (2, 2), None, 30, True, False),
    ],
    ids=str,
)
def test_a_round_after_the_end_multiplies_nothing(
    rules: tuple[Rule, ...],
    lengths: tuple[int, ...],
    inner_rounds: int | None,
    new: int,
    stop: bool,
    filters: bool,
) -> None:
    text = Decoding.begin(rules, lengths, inner_rounds, new=new, stop=stop, filters=filters)
    text.rounds.outer_round()
    assert int(text.state.end) > PROMPT + 1
    assert bool(text.state.ended) == stop
    assert stop or int(text.state.end) == int(text.state.limit)
    for level in range(len(text.tiers)):
        for name, tensor in text.touched(level).items():
            if name not in ("counters", "arrivals"):
                tensor.fill_(SENTINEL)
    before = {name: bits(tensor) for name, tensor in text.everything()}
    text.rounds.outer_round()
    changed = [name for name, tensor in text.everything() if not torch.equal(before[name], bits(tensor))]
    assert changed == []
    # The same launches do write all of that once their words are not 0.
    for stage in text.rounds.stages(text.rounds.capacity):
        if stage.level is None:
            continue
        text.revive()
        for launch in stage.launches:
            launch.run()
        for name in (*text.streams(stage.level), "cache", "peak", "total", "best", "token"):
            key, tensor = f"{name} of tier {stage.level}", text.touched(stage.level)[name]
            assert not torch.equal(before[key], bits(tensor)), key


def run_watched(text: Decoding) -> tuple[list[int], list[int]]:
    """One outer round: how many passes of each tier ran, and how many were skipped and wrote nothing."""
    ran, skipped = [0] * len(text.tiers), [0] * len(text.tiers)
    for stage in text.rounds.stages(text.rounds.capacity):
        level = stage.level
        if level is None:
            for launch in stage.launches:
                launch.run()
            continue
        for tensor in text.streams(level).values():
            tensor.fill_(SENTINEL)
        before = {name: bits(tensor) for name, tensor in text.touched(level).items()}
        for launch in stage.launches:
            launch.run()
        changed = {n for n, tensor in text.touched(level).items() if not torch.equal(before[n], bits(tensor))}
        # All or nothing.
        assert not changed or changed >= set(text.streams(level)) | {"cache"}
        (ran if changed else skipped)[level] += 1
    assert ran == text.state.counters[:, COLUMN["forwards"]].tolist()
    return ran, skipped


def test_surplus_inner_rounds_leave_the_buffers_of_their_tiers_alone() -> None:
    """Everything stands, so the first of three inner rounds makes the three tokens that the target wants."""
    text = Decoding.begin((Fuzzy(9.0), Match()), (2, 3), None, new=30)
    assert run_watched(text) == ([2, 1, 1], [4, 2, 0])


def test_inner_rounds_of_a_fixed_number_all_run() -> None:
    text = Decoding.begin((Fuzzy(9.0), Match()), (2, 3), 2, new=30)
    assert run_watched(text) == ([4, 2, 1], [0, 0, 0])


def test_what_is_left_of_a_burst_is_skipped_after_a_stop_token() -> None:
    """And so is the second inner round: whatever the qualifier puts is a stop token too."""
    text = Decoding.begin((Match(), Match()), (3, 3), 2, new=30, stop=True)
    assert run_watched(text) == ([1, 1, 1], [2 + 3, 1, 0])


def test_what_is_left_of_a_burst_is_skipped_at_the_limit() -> None:
    text = Decoding.begin((Match(),), (3,), None, new=3)
    assert run_watched(text) == ([2, 1], [1, 0])
