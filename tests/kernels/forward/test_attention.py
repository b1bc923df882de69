"""Attention against a float64 run: masks, splits, padding, what may not leak, and placement in fixed tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers.equality import assert_equal_tensors, assert_everywhere
from ptx.device import architecture
from torch import Tensor

from pyramid_rt.kernels.forward import attention
from pyramid_rt.kernels.forward.attention_configs import FAN, AttentionConfig, Splits, config_for
from pyramid_rt.kernels.reference import forward as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Not in Triton's interpreter: on a GPU, or on the machine of tests/ptx.
COMPILED = DEVICE.type == "cuda" or architecture() > 0
NAN = float("nan")
# Borders at 16, 32, 64, 96, 160, 224: every region of the table within a few hundred rows.
SMALL = AttentionConfig(block_n=16, num_warps=4, num_stages=2, splits=Splits((16, 32, 64), (32, 96)))
# Rounding units; the interpreter truncates to bfloat16 where a GPU rounds.
BF16_UNIT = 2.0**-8 if COMPILED else 2.0**-7
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: BF16_UNIT}


@dataclass
class Case:
    """One call's buffers; whatever the kernel must not read is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    length: int

    @classmethod
    def make(
        cls,
        length: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        start: int,
        dtype: torch.dtype,
        rows: int = 300,
    ) -> Case:
        torch.manual_seed(1000 * length + start)
        q = torch.randn(64, heads, head_dim)
        k, v = torch.randn(2, kv_heads, rows, head_dim)
        q[length:] = NAN
        k[:, start + length :] = NAN
        v[:, start + length :] = NAN
        device = torch.tensor(start, device=DEVICE)
        return cls(q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype), device, length)

    def run(
        self, *, kv_bound: int = 0, config: AttentionConfig = SMALL, ancestors: Tensor | None = None
    ) -> Tensor:
        """[T, H D]; asserts that the rest of `out` stays and that the arrivals are left at zero."""
        self.space, out = self.launch(kv_bound or int(self.start) + self.length, config, ancestors)
        assert_everywhere(out[self.length :].isnan(), out[self.length :])
        assert not self.space.arrivals.any()
        return out[: self.length]

    def launch(
        self, kv_bound: int, config: AttentionConfig, ancestors: Tensor | None
    ) -> tuple[attention.Workspace, Tensor]:
        heads, head_dim = self.q.shape[1:]
        space = attention.workspace(
            length=self.length,
            heads=heads,
            kv_heads=self.k.shape[0],
            head_dim=head_dim,
            kv_bound=kv_bound,
            splits=config.splits,
            device=DEVICE,
        )
        space.acc.fill_(NAN)
        space.stats.fill_(NAN)
        out = torch.full((64, heads * head_dim), NAN, dtype=self.q.dtype, device=DEVICE)
        attention.run(
            self.q,
            self.k,
            self.v,
            self.start,
            out,
            space,
            length=self.length,
            kv_bound=kv_bound,
            config=config,
            ancestors=ancestors,
        )
        return space, out

    def check(self, out: Tensor, ancestors: Tensor | None = None) -> None:
        """Within the rounding of a float32 softmax and of weights and result in dtype, of a float64 run."""
        end, group = int(self.start) + self.length, self.q.shape[1] // self.k.shape[0]
        if ancestors is None:
            positions = torch.arange(self.length, device=DEVICE) + self.start
            mask = reference.causal_mask(positions, end, group, torch.float64)
        else:
            mask = reference.tree_mask(self.start, ancestors, end, group, torch.float64, length=self.length)
        q, k, v = self.q[: self.length].double(), self.k[:, :end].double(), self.v[:, :end].double()
        want, size = reference.attention(q, k, v, mask), reference.attention(q, k, v.abs(), mask)
        unit = UNIT[self.q.dtype]
        weights = 0.0 if self.q.dtype == torch.float32 else unit
        bound = unit * want.abs() + (weights + 64 * UNIT[torch.float32]) * size
        error = (out.double() - want).abs()
        assert_everywhere(error <= bound, error, about=(error / bound).max())
        assert error.square().mean().sqrt() <= 0.5 * bound.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "start"),
    [
        (1, 2, 2, 64, 0),
        (1, 8, 1, 128, 97),
        (2, 3, 1, 96, 30),
        (7, 8, 2, 128, 88),
        (16, 4, 1, 64, 17),
        (16, 3, 1, 64, 208),
        (64, 1, 1, 128, 0),
        (64, 3, 1, 96, 33),
        (63, 8, 1, 64, 150),
    ],
)
def test_against_float64(
    dtype: torch.dtype, length: int, heads: int, kv_heads: int, head_dim: int, start: int
) -> None:
    case = Case.make(length, heads, kv_heads, head_dim, start, dtype)
    case.check(case.run())


@pytest.mark.parametrize(
    "end", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 95, 96, 97, 160, 161, 223, 224, 225, 800]
)
def test_at_every_border_of_the_split_table(end: int) -> None:
    length = min(2, end)
    case = Case.make(length, 4, 2, 64, end - length, torch.float32, rows=900)
    case.check(case.run())


def test_the_shipped_split_table() -> None:
    case = Case.make(2, 1, 1, 64, 8192 + 1030, torch.bfloat16, rows=9300)
    case.check(case.run(config=config_for(torch.bfloat16, 64, 0)))


def test_kv_bound_changes_nothing() -> None:
    case = Case.make(7, 4, 2, 64, 50, torch.float32)
    tight = case.run()
    for kv_bound in (64, 65, 97, 300):
        assert_equal_tensors(case.run(kv_bound=kv_bound), tight)


def test_a_window_past_kv_bound_sees_the_bound_and_frees_the_counters() -> None:
    case = Case.make(7, 2, 1, 64, 50, torch.float32)
    out = case.run(kv_bound=54)
    short = Case(case.q, case.k, case.v, case.start, 4)
    short.check(out[:4])
    assert_everywhere(out.isfinite(), out)


@pytest.mark.parametrize(("position", "head_dim"), [(40, 64), (97, 128), (159, 96)])
def test_a_row_is_the_same_in_every_window(position: int, head_dim: int) -> None:
    """One row, one cache, windows of several T at several places. The interpreter's matmul may round rows of
    a tile differently, so here it is equality up to that; compiled it is equality of bits."""
    full = Case.make(1, 4, 2, head_dim, position, torch.float32)
    alone = full.run()[0]
    k, v = torch.randn(2, 2, 300, head_dim, device=DEVICE)
    k[:, : position + 1], v[:, : position + 1] = full.k[:, : position + 1], full.v[:, : position + 1]
    for length, place in ((2, 1), (7, 0), (16, 9), (64, 33)):
        q = torch.randn(64, 4, head_dim, device=DEVICE)
        q[place] = full.q[0]
        window = Case(q, k, v, full.start - place, length)
        got = window.run()[place]
        if COMPILED:
            assert_equal_tensors(got, alone)
        torch.testing.assert_close(got, alone, rtol=2e-6, atol=2e-6)


def fold(
    partials: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maxima, sums and accumulators folded one after another."""
    maximum, total, acc = partials[0]
    for next_maximum, next_total, next_acc in partials[1:]:
        new = np.maximum(maximum, next_maximum)
        old_scale, new_scale = np.exp2(maximum - new), np.exp2(next_maximum - new)
        total = total * old_scale + next_total * new_scale
        acc = acc * old_scale[:, None] + next_acc * new_scale[:, None]
        maximum = new
    return maximum, total, acc


@pytest.mark.parametrize("start", [60, 180, 230, 900])
def test_partials_are_folded_in_ascending_order(start: int) -> None:
    """The result is, to the bit, what one program looping over groups and their splits would give."""
    case = Case.make(2, 2, 1, 64, start, torch.float32, rows=1000)
    out = case.run().reshape(4, 64)
    count = SMALL.splits.count(start + 2)
    slots = count + -(-count // FAN)
    stats = case.space.stats.view(slots, 2, 64).cpu().numpy()[:, :, :4]
    acc = case.space.acc.view(slots, 64, 64).cpu().numpy()[:, :4]
    splits = [(stats[i, 0], stats[i, 1], acc[i]) for i in range(count)]
    _, total, result = fold([fold(splits[i : i + FAN]) for i in range(0, count, FAN)])
    folded = torch.from_numpy(result / total[:, None])
    if not COMPILED:
        assert_equal_tensors(out, folded)
    else:
        torch.testing.assert_close(out.cpu(), folded, rtol=1e-6, atol=1e-6)


def test_tree_mask_written_out() -> None:
    """Two rows of history, a root with two children; row 2's bit 5 lies past the window."""
    mask = reference.tree_mask(
        torch.tensor(2), torch.tensor([1, 3, 5 | 1 << 5]), 6, 1, torch.float32, length=3
    )
    assert (mask == 0).int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]]
    assert_equal_tensors(mask.isinf(), mask != 0)


def random_tree(length: int) -> Tensor:
    """Ancestor bits, each row's own included, every parent before its children; bits past T set at random."""
    bits = [1]
    for row in range(1, length):
        bits.append(bits[int(torch.randint(0, row, ()))] | 1 << row)
    noise = [int(torch.randint(0, 2, ())) << 63 if length < 64 else 0 for _ in bits]
    signed = [(b | n) - (1 << 64) if (b | n) >> 63 else b | n for b, n in zip(bits, noise, strict=True)]
    return torch.tensor(signed + [-1] * (64 - length), device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "start"),
    [(1, 4, 1, 64, 40), (7, 3, 1, 96, 91), (16, 8, 2, 64, 0), (64, 4, 1, 128, 70)],
)
def test_tree_mask(
    dtype: torch.dtype, length: int, heads: int, kv_heads: int, head_dim: int, start: int
) -> None:
    case = Case.make(length, heads, kv_heads, head_dim, start, dtype)
    ancestors = random_tree(length)
    case.check(case.run(ancestors=ancestors), ancestors)


def test_a_chain_drawn_as_a_tree_gives_the_chain() -> None:
    case = Case.make(64, 2, 2, 64, 60, torch.float32)
    bits = [(2 << row) - 1 for row in range(64)]
    ancestors = torch.tensor([b - (1 << 64) if b >> 63 else b for b in bits], device=DEVICE)
    assert_equal_tensors(case.run(ancestors=ancestors), case.run())


def test_a_row_that_sees_nothing_is_zero() -> None:
    case = Case.make(3, 2, 1, 64, 0, torch.float32)
    out = case.run(ancestors=torch.tensor([1, 0, 5] + [0] * 61, device=DEVICE))
    assert_equal_tensors(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out[0].view(2, 64), case.v[:, 0].expand(2, 64))


@triton.jit
def count_kernel(rows_ptr: tl.tensor, out_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    lane = tl.arange(0, BLOCK)
    rows = tl.load(rows_ptr + lane)
    tl.store(out_ptr + lane, attention._split_count(rows, 256, 1024, 2048, 8192, 32768))


def test_host_and_device_count_the_same_splits() -> None:
    borders = torch.tensor([1, 256, 8192, 9216, 32768, 34816, 131072, 131136])
    rows = (borders.unsqueeze(1) + torch.tensor([-1, 0, 1, 2])).flatten().int().to(DEVICE)
    out = torch.zeros_like(rows)
    count_kernel[(1,)](rows, out, BLOCK=32)
    splits = Splits()
    assert out.tolist() == [splits.count(int(n)) for n in rows]
    assert splits.count(131072) == 104


def test_splits_and_configs_refuse_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="whole numbers of splits"):
        Splits((256, 1000, 2048))
    with pytest.raises(ValueError, match="block_n 48"):
        AttentionConfig(block_n=48, num_warps=4, num_stages=2)


def test_a_workspace_serves_every_smaller_call() -> None:
    def sizes(length: int, kv_bound: int) -> tuple[int, int, int]:
        return attention.workspace_sizes(
            length=length, heads=32, kv_heads=8, head_dim=128, kv_bound=kv_bound, splits=Splits()
        )

    largest = sizes(64, 131072)
    assert largest == (8 * 4 * 117 * 64 * 128, 8 * 4 * 117 * 128, 8 * 4 * 14)
    for length, kv_bound in ((1, 1), (16, 131072), (17, 9000), (64, 500)):
        assert [(a, b) for a, b in zip(sizes(length, kv_bound), largest, strict=True) if not (a <= b)] == []


def test_scale_and_softmax_stand_large_scores() -> None:
    case = Case.make(2, 2, 1, 64, 60, torch.float32)
    case.q *= 300
    out = case.run()
    assert_everywhere(out.isfinite(), out)
    best = (case.q[1, 0] @ case.k[0, :62].T).argmax()
    torch.testing.assert_close(out[1, :64], case.v[0, best], rtol=1e-3, atol=1e-3)
    assert math.isfinite(float(out.sum()))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("q is torch.float64", {"q": torch.zeros(64, 4, 64, dtype=torch.float64)}),
        (r"q has shape \(64, 256\)", {"q": torch.zeros(64, 256)}),
        ("q has heads of 80 channels", {"q": torch.zeros(64, 4, 80)}),
        ("q has strides", {"q": torch.zeros(64, 64, 4).transpose(1, 2)}),
        ("length is 0", {"length": 0}),
        ("length is 65", {"length": 65}),
        (r"k has shape \(2, 40, 128\)", {"k": torch.zeros(2, 40, 128)}),
        ("k has 3 heads", {"k": torch.zeros(3, 40, 64)}),
        ("k is torch.float16", {"k": torch.zeros(2, 40, 64, dtype=torch.float16)}),
        (r"v has shape \(2, 41, 64\)", {"v": torch.zeros(2, 41, 64)}),
        ("v has strides", {"v": torch.zeros(40, 2, 64).transpose(0, 1)}),
        ("q has 6 rows", {"q": torch.zeros(6, 4, 64), "out": torch.zeros(6, 256)}),
        ("start is torch.int32", {"start": torch.tensor(0, dtype=torch.int32)}),
        ("start has shape", {"start": torch.zeros(2, dtype=torch.int64)}),
        ("out has shape", {"out": torch.zeros(64, 4, 64)}),
        ("out is torch.bfloat16", {"out": torch.zeros(64, 256, dtype=torch.bfloat16)}),
        ("out is on meta", {"out": torch.zeros(64, 256, device="meta")}),
        ("ancestors has 5 entries", {"ancestors": torch.zeros(5, dtype=torch.int64)}),
        ("ancestors is torch.float32", {"ancestors": torch.zeros(64)}),
        ("kv_bound is 41", {"kv_bound": 41}),
        ("kv_bound is 0", {"kv_bound": 0}),
        (
            "space.acc holds 9 elements",
            {"space": attention.Workspace(torch.zeros(9), torch.zeros(9), torch.zeros(9, dtype=torch.int32))},
        ),
    ],
)
def test_refuses_by_name(message: str, change: dict[str, object]) -> None:
    space = attention.workspace(
        length=64,
        heads=4,
        kv_heads=2,
        head_dim=64,
        kv_bound=40,
        splits=SMALL.splits,
        device=torch.device("cpu"),
    )
    arguments: dict[str, object] = {
        "q": torch.zeros(64, 4, 64),
        "k": torch.zeros(2, 40, 64),
        "v": torch.zeros(2, 40, 64),
        "start": torch.tensor(0),
        "out": torch.zeros(64, 256),
        "space": space,
        "length": 7,
        "kv_bound": 40,
        "config": SMALL,
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        attention.plan(**(arguments | change))  # type: ignore[arg-type]
