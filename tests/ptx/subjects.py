"""Launches of every kernel on small inputs, made to be run over and over: what faults are planted in and bytes
are counted of.

The shape is one layer of a Llama of two heads: wide enough for two tiles of channels, three splits along K, two
groups of attention's splits and two shares of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from helpers.decode_states import make_decode_state, open_verify, put_rows, random_rows
from helpers.oracle import CONFIG, poisoned, random, sums_of_squares, window, workspace
from torch import Tensor

from ptx import device
from ptx.machine import Schedule
from pyramid_rt.kernels.decide import decision, filters, readback, sample
from pyramid_rt.kernels.decide.decode_state import COUNTERS, DecodeState
from pyramid_rt.kernels.forward import attention, compact, embed, gate_up, head, project, qkv
from pyramid_rt.kernels.forward.attention_configs import AttentionConfig, Splits
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.reference import forward as reference
from pyramid_rt.models.shapes import Shape

DTYPE = torch.bfloat16
LENGTH, CONTEXT, ROWS = 18, 300, 400
SHAPE = Shape("small", layers=2, hidden=128, intermediate=192, heads=3, kv_heads=1, head_dim=64, vocab=1000)
SPLIT = replace(CONFIG, splits=3)
# 16 splits of the cached rows, hence two groups.
SPLITS = AttentionConfig(block_n=16, num_warps=4, num_stages=2, splits=Splits((16, 32, 32), (128, 256)))
# Two shares of a row of the decision kernels, of which the second is not full.
VOCAB, PROPOSED = 4801, 3


@dataclass
class Subject:
    """A launch that can be repeated: before each run, all tensors that it is given are as they were at first."""

    launch: Launch
    before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = [tensor.clone() for tensor in self.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        return [a for a in self.launch.args if isinstance(a, Tensor)]

    def restore(self) -> None:
        for tensor, kept in zip(self.tensors, self.before, strict=True):
            tensor.copy_(kept)

    def run(self, schedule: Schedule | None = None) -> list[Tensor]:
        """The bits of all tensors afterwards, in the order of the kernel's arguments."""
        self.restore()
        with device.scheduled(schedule or Schedule()):
            self.launch.run()
        return [t.clone().contiguous().flatten().view(torch.uint8) for t in self.tensors]

    def tensor(self, name: str) -> Tensor:
        """An argument by its name in the kernel."""
        found = self.launch.args[self.launch.kernel.arg_names.index(name)]
        assert isinstance(found, Tensor)
        return found

    def ptx(self) -> str:
        return str(self.launch.warmup().asm["ptx"])


def norm_of(width: int) -> Tensor:
    return random(width, dtype=DTYPE, seed=4)


def weight(rows: int, width: int) -> Tensor:
    return random(rows, width, dtype=DTYPE, scale=width**-0.5, seed=2)


def scalar(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def embed_launch(length: int = LENGTH) -> Launch:
    out, scaled = (poisoned(64, SHAPE.hidden, dtype=DTYPE) for _ in range(2))
    tokens = torch.arange(64) * 13 % SHAPE.vocab
    sums = poisoned(SHAPE.hidden // 64, 64, dtype=torch.float32)
    return embed.plan(
        random(SHAPE.vocab, SHAPE.hidden, dtype=DTYPE),
        tokens,
        norm_of(SHAPE.hidden),
        length,
        out,
        scaled,
        sums,
    )


def qkv_launch(length: int = LENGTH) -> Launch:
    rows, width = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim, SHAPE.hidden
    x = window(length, width, dtype=DTYPE)
    k, v = (poisoned(SHAPE.kv_heads, ROWS, SHAPE.head_dim, dtype=DTYPE) for _ in range(2))
    rotary = reference.rotary_table("default", ROWS, SHAPE.head_dim, theta=1e4, dtype=DTYPE)
    return qkv.plan(
        x, sums_of_squares(x, length), 1e-5, weight(rows, width), None, rotary, scalar(CONTEXT), length,
        poisoned(64, SHAPE.heads, SHAPE.head_dim, dtype=DTYPE), k, v, workspace(rows, SPLIT), SPLIT,
    )  # fmt: skip


def attention_launch(length: int = LENGTH, *, tree: bool = False) -> Launch:
    q = poisoned(64, SHAPE.heads, SHAPE.head_dim, dtype=DTYPE)
    q[:length] = random(length, SHAPE.heads, SHAPE.head_dim, dtype=DTYPE)
    k, v = (poisoned(SHAPE.kv_heads, ROWS, SHAPE.head_dim, dtype=DTYPE) for _ in range(2))
    for seed, cache in ((5, k), (6, v)):
        cache[:, : CONTEXT + length] = random(1, CONTEXT + length, SHAPE.head_dim, dtype=DTYPE, seed=seed)
    space = attention.workspace(
        length=length, heads=SHAPE.heads, kv_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, kv_bound=ROWS,
        splits=SPLITS.splits, device=q.device,
    )  # fmt: skip
    space.acc.fill_(torch.nan)
    space.stats.fill_(torch.nan)
    # Each row is its own and every other one's of the rows before it.
    ancestors = torch.tensor([sum(1 << j for j in range(i, -1, -2)) for i in range(32)]) if tree else None
    out = poisoned(64, SHAPE.heads * SHAPE.head_dim, dtype=DTYPE)
    return attention.plan(
        q, k, v, scalar(CONTEXT), out, space, length=length, kv_bound=ROWS, config=SPLITS, ancestors=ancestors
    )


def project_launch(op: str, length: int = LENGTH) -> Launch:
    channels, width = SHAPE.hidden, SHAPE.heads * SHAPE.head_dim if op == "out" else SHAPE.intermediate
    out, scaled = (poisoned(64, channels, dtype=DTYPE) for _ in range(2))
    sums = poisoned(channels // 64, 64, dtype=torch.float32)
    return project.plan(
        window(length, width, dtype=DTYPE), weight(channels, width), None,
        window(length, channels, dtype=DTYPE, seed=1), norm_of(channels), length, out, scaled, sums,
        workspace(channels, SPLIT), SPLIT,
    )  # fmt: skip


def gate_up_launch(length: int = LENGTH) -> Launch:
    rows, width = 2 * SHAPE.intermediate, SHAPE.hidden
    x, out = window(length, width, dtype=DTYPE), poisoned(64, SHAPE.intermediate, dtype=DTYPE)
    return gate_up.plan(
        x,
        sums_of_squares(x, length),
        1e-5,
        weight(rows, width),
        None,
        length,
        out,
        workspace(rows, SPLIT),
        SPLIT,
    )


def head_launch(length: int = LENGTH) -> Launch:
    width, vocab = SHAPE.hidden, SHAPE.vocab
    x, rows = window(length, width, dtype=DTYPE), torch.arange(length)
    found = head.TileStatistics.allocate(-(-vocab // 64), x.device)
    drawn = head.Noise(torch.tensor([1, 2]), rows + CONTEXT, torch.tensor(0.7))
    return head.plan(
        x, sums_of_squares(x, length), 1e-5, weight(vocab, width), rows, vocab,
        poisoned(64, vocab, dtype=torch.float32), found, drawn, CONFIG,
    )  # fmt: skip


def compact_launch(length: int = LENGTH) -> Launch:
    cache = random(SHAPE.layers, 2, SHAPE.kv_heads, ROWS, SHAPE.head_dim, dtype=DTYPE)
    path = torch.zeros(64, dtype=torch.int64)
    path[:length] = torch.arange(length) + 3
    return compact.plan(cache, torch.arange(ROWS), scalar(CONTEXT), path, scalar(length))


def open_state(proposed: int = PROPOSED) -> DecodeState:
    """Two tiers in the middle of a verify whose last proposed token falls under every rule."""
    p = random_rows(proposed + 1, VOCAB, seed=1)
    q = p[:proposed] + random_rows(proposed, VOCAB, seed=2, spread=0.05)
    state = make_decode_state(VOCAB, proposed + 1)
    state.thresholds.fill_(0.1)
    state.top_k.fill_(60)
    state.top_p.fill_(0.97)
    tokens = p[:proposed].argmax(-1).tolist()
    tokens[-1] = int(p[proposed - 1].argmin())
    q[-1, tokens[-1]] = 60.0
    put_rows(state, 1, p)
    put_rows(state, 0, q)
    open_verify(state, tokens)
    for row in range(proposed + 1):
        # What rejection reads, as `filters` leaves it for a plain softmax.
        for level, rows in ((1, p), (0, q)):
            if row < rows.shape[0]:
                state.normaliser[level, row] = (rows[row] / state.temperature).logsumexp(-1)
                state.cut[level, row] = -torch.inf
                state.own[level, row] = rows[row].argmax()
                state.non_finite[level, row] = 0
    return state


def decide_launch(rule: decision.RuleName, kind: str = "js") -> Launch:
    stored = rule == "rejection"
    return decision.plan(
        open_state(), 1, PROPOSED + 1, rule, kind=kind, stored=stored, arch=device.architecture()
    )


def filters_launch(*, cuts: bool = True) -> Launch:
    """With all filters on, or the sums alone, as rejection needs them: then of both tiers' rows."""
    arch = device.architecture()
    return filters.plan(open_state(), 1, PROPOSED + 1, draw=False, filters=cuts, below=not cuts, arch=arch)


def drawing_state() -> DecodeState:
    state = make_decode_state(VOCAB, 2)
    open_verify(state, [])
    put_rows(state, 0, random_rows(1, VOCAB, seed=3))
    return state


def sample_launch() -> Launch:
    return sample.plan(drawing_state(), 0, first=False, stored=False)


def begin_launch() -> Launch:
    return sample.plan_begin(drawing_state())


def readback_launch() -> Launch:
    state, most = open_state(), 8
    size = 3 + (2 + COUNTERS) * state.tiers_count + most
    return readback.plan(state, scalar(10), torch.zeros(size, dtype=torch.int64), most)


LAUNCHES: dict[str, Callable[[], Launch]] = {
    "embed": embed_launch,
    "qkv": qkv_launch,
    "attention": attention_launch,
    "attention, tree": functools.partial(attention_launch, tree=True),
    "out": functools.partial(project_launch, "out"),
    "gate_up": gate_up_launch,
    "down": functools.partial(project_launch, "down"),
    "head": head_launch,
    "compact": compact_launch,
    "match": functools.partial(decide_launch, "match"),
    "fuzzy": functools.partial(decide_launch, "fuzzy"),
    "fuzzy, topk_js": functools.partial(decide_launch, "fuzzy_or_match", "topk_js"),
    "rejection": functools.partial(decide_launch, "rejection"),
    "filters": filters_launch,
    "filters, sums": functools.partial(filters_launch, cuts=False),
    "sample": sample_launch,
    "begin": begin_launch,
    "readback": readback_launch,
}
# Those whose programs meet: the last to arrive reads what the others left.
MEETING = ("qkv", "attention", "attention, tree", "out", "gate_up", "match", "fuzzy", "fuzzy, topk_js", "rejection",
           "filters", "filters, sums")  # fmt: skip


def subject(name: str) -> Subject:
    return Subject(LAUNCHES[name]())
