"""State that the decision kernels of a round read and write: control words, the tiers' logits rows, and scratch.

N tiers, V vocabulary entries, P of them with padding, R rows. Row r of every tier belongs to the r-th position
after the outer round's first: nothing is moved while a round runs, and the distribution that a token was drawn
from is the number of a tier (`source`), not a copy of a row.

All counts of a round are words of one int64 tensor, `control`: the tokens known (proposals included), the
limit, and then for each of N tiers

- `cached`: rows of its cache that hold
- `base`: where its proposal of this round begins; the target's is the outer round's first position
- the active flag: 1 while the tier has work this round: the verify that it takes part in is active and, for the
  lowest of several tiers, its burst goes on
- `bad`: the first position whose logits cannot be decided

A forward pass of a round runs where its tier's active flag is not 0, and is skipped elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.forward.head import PADDING, TileStatistics
from pyramid_rt.kernels.launch import check_tensor, tiles
from pyramid_rt.kernels.limits import NO_POSITION, WINDOW

END, LIMIT, CACHED = 0, 1, 2
# Entries of a tile of the head's statistics, of one program's share of a row, and of a step through it.
TILE = 64
CHUNK = 4096
BLOCK = 1024
# Entries of a program that scans a row with residual noise: the noise, not the memory, is its work.
SCAN = 512
# Columns of the counters, one row per tier; see `pyramid_rt.decoding.state.COUNTERS`.
COUNTERS = 7


def control_size(tiers: int) -> int:
    """Words of `control`."""
    return CACHED + 4 * tiers


def cached_at(level: int) -> int:
    """Word of `control` that holds a tier's cached length."""
    return CACHED + level


def base_at(tiers: int, level: int) -> int:
    """Word of `control` that holds where a tier's proposal begins."""
    return CACHED + tiers + level


def active_at(tiers: int, level: int) -> int:
    """Word of `control` that is a tier's active flag."""
    return CACHED + 2 * tiers + level


def bad_at(tiers: int, level: int = 0) -> int:
    """Word of `control` that holds a tier's first undecidable position."""
    return CACHED + 3 * tiers + level


@triton.jit
def limit_word(control_ptr: tl.tensor) -> tl.tensor:
    """Address of the limit. That of the tokens known is `control_ptr` itself."""
    return control_ptr + 1


@triton.jit
def cached_word(control_ptr: tl.tensor, level: tl.tensor) -> tl.tensor:
    """Address of `cached_at`; `level` may be a block."""
    return control_ptr + 2 + level


@triton.jit
def base_word(control_ptr: tl.tensor, N: tl.constexpr, level: tl.tensor) -> tl.tensor:
    """Address of `base_at`; the outer round's first position is that of level N - 1."""
    return control_ptr + 2 + N + level


@triton.jit
def active_word(control_ptr: tl.tensor, N: tl.constexpr, level: tl.tensor) -> tl.tensor:
    """Address of `active_at`."""
    return control_ptr + 2 + 2 * N + level


@triton.jit
def bad_word(control_ptr: tl.tensor, N: tl.constexpr, level: tl.tensor) -> tl.tensor:
    """Address of `bad_at`; `level` may be a block."""
    return control_ptr + 2 + 3 * N + level


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Buffers of the decision kernels; all contiguous and on one device.

    Attributes:
        tokens, origin: [capacity] int64, the token buffer and the tier that put each token.
        control: [2 + 4 N] int64, see above.
        ended: [] bool, the last token is a stop token. stop_mask: [V] bool.
        seed: [2] int64, low and high word. temperature, top_p, min_p: [] float32. top_k: [] int64.
        thresholds: [max(1, N - 1)] float32, of the fuzzy rules.
        counters: [N, 7] int64.
        rows: [N, R, P] float32, raw logits; -inf from V on.
        statistics: of the same rows, [N, R, tiles of 64].
        own: [N, R] int64, own tokens. normaliser: [N, R] float32, log of the sum of exp(processed logits).
        cut: [N, R] float32, the least scaled logit that the filters let stand.
        non_finite: [N, R] int32, the row cannot be decided.
        source: [R] int32, the tier whose processed distribution the token there was drawn from.
        distance: [R] float32, divergences of the verify in progress.
        partials: [2 R, chunks] float32. amounts: [R, chunks] int32. arrivals: [2 R + 1] int32, zero.
        picked, found: [R, chunks * 4096] int32, entries of a row that filters or `topk_*` look at; values:
            likewise, float32. One entry where no kernel needs them.
        winners: [2, residual chunks] float32. winning: likewise, int32.
    """

    tokens: Tensor
    origin: Tensor
    control: Tensor
    ended: Tensor
    stop_mask: Tensor
    seed: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    thresholds: Tensor
    counters: Tensor
    rows: Tensor
    statistics: TileStatistics
    own: Tensor
    normaliser: Tensor
    cut: Tensor
    non_finite: Tensor
    source: Tensor
    distance: Tensor
    partials: Tensor
    amounts: Tensor
    arrivals: Tensor
    picked: Tensor
    found: Tensor
    values: Tensor
    winners: Tensor
    winning: Tensor

    @classmethod
    def allocate(cls, tiers_count: int, row_count: int, capacity: int, vocab_size: int, *, lists: bool,
                 device: torch.device) -> DecodeState:  # fmt: skip
        """Take every buffer at once.

        Args:
            tiers_count: N. row_count: R. capacity: of the token buffer. vocab_size: V.
            lists: filters or a `topk_*` divergence are wanted.

        Raises:
            ValueError: names the argument that is out of range.
        """
        for name, value in (("tiers_count", tiers_count), ("row_count", row_count), ("capacity", capacity),
                            ("vocab_size", vocab_size)):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        n, r, padded = tiers_count, row_count, tiles(vocab_size, PADDING) * PADDING
        chunks, tile_count = tiles(vocab_size, CHUNK), tiles(padded, TILE)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        control = zeros(control_size(n), dtype=torch.int64)
        control[bad_at(n) : bad_at(n) + n] = NO_POSITION
        shape = (r, chunks * CHUNK) if lists else (1, 1)
        return cls(
            tokens=zeros(capacity, dtype=torch.int64),
            origin=zeros(capacity, dtype=torch.int64),
            control=control,
            ended=zeros(dtype=torch.bool),
            stop_mask=zeros(vocab_size, dtype=torch.bool),
            seed=zeros(2, dtype=torch.int64),
            temperature=zeros(),
            top_k=zeros(dtype=torch.int64),
            top_p=torch.ones((), dtype=torch.float32, device=device),
            min_p=zeros(),
            thresholds=zeros(max(1, n - 1)),
            counters=zeros(n, COUNTERS, dtype=torch.int64),
            rows=zeros(n, r, padded),
            statistics=TileStatistics(
                peak=zeros(n, r, tile_count),
                total=zeros(n, r, tile_count),
                best=zeros(n, r, tile_count),
                token=zeros(n, r, tile_count, dtype=torch.int32),
            ),
            own=zeros(n, r, dtype=torch.int64),
            normaliser=zeros(n, r),
            cut=zeros(n, r),
            non_finite=zeros(n, r, dtype=torch.int32),
            source=zeros(r, dtype=torch.int32),
            distance=zeros(r),
            partials=zeros(2 * r, chunks),
            amounts=zeros(r, chunks, dtype=torch.int32),
            arrivals=zeros(2 * r + 1, dtype=torch.int32),
            picked=zeros(*shape, dtype=torch.int32),
            found=zeros(*shape, dtype=torch.int32),
            values=zeros(*shape),
            winners=zeros(2, tiles(vocab_size, SCAN)),
            winning=zeros(2, tiles(vocab_size, SCAN), dtype=torch.int32),
        )

    @property
    def tiers_count(self) -> int:
        return int(self.rows.shape[0])

    @property
    def vocab_size(self) -> int:
        return int(self.stop_mask.shape[0])

    def statistics_of(self, level: int) -> TileStatistics:
        """Views of one tier's statistics, [R, tiles] each."""
        s = self.statistics
        return TileStatistics(s.peak[level], s.total[level], s.best[level], s.token[level])

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        own = [getattr(self, field.name) for field in fields(self)]
        s = self.statistics
        tensors = [value for value in (*own, s.peak, s.total, s.best, s.token) if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in tensors)

    def sequence(self) -> tuple[Tensor, ...]:
        """Tensors that a commit writes, in the order of the kernels' arguments; flags as the bytes they are."""
        return (
            self.control,
            self.ended.view(torch.uint8),
            self.tokens,
            self.origin,
            self.counters,
            self.stop_mask.view(torch.uint8),
            self.source,
        )

    def word(self, index: int) -> Tensor:
        """A word of `control` as a tensor of shape []."""
        return self.control[index]

    def check(self, level: int, count: int, *, lists: bool = False) -> None:
        """Refuse a decode state whose buffers do not fit each other, a tier or a verify that it has no room for.

        Raises:
            ValueError: names the argument, what was found and what was expected.
        """
        check_tensor(
            "state.rows",
            self.rows,
            (None, None, None),
            torch.float32,
            self.rows.device,
            contiguous=True,
        )
        n, r, padded = self.rows.shape
        vocab, (chunks, tile_count) = self.vocab_size, (tiles(self.vocab_size, CHUNK), tiles(padded, TILE))
        if not vocab <= padded < vocab + PADDING or padded % PADDING:
            raise ValueError(f"state.rows has {padded} columns, expected {vocab} rounded up to {PADDING}")
        for name, shape, dtype in (
            ("tokens", (None,), torch.int64), ("origin", (self.tokens.shape[0],), torch.int64),
            ("control", (control_size(n),), torch.int64), ("ended", (), torch.bool),
            ("stop_mask", (None,), torch.bool), ("seed", (2,), torch.int64), ("temperature", (), torch.float32),
            ("top_k", (), torch.int64), ("top_p", (), torch.float32), ("min_p", (), torch.float32),
            ("thresholds", (max(1, n - 1),), torch.float32), ("counters", (n, COUNTERS), torch.int64),
            ("own", (n, r), torch.int64), ("normaliser", (n, r), torch.float32), ("cut", (n, r), torch.float32),
            ("non_finite", (n, r), torch.int32), ("source", (r,), torch.int32), ("distance", (r,), torch.float32),
            ("partials", (2 * r, chunks), torch.float32), ("amounts", (r, chunks), torch.int32),
            ("arrivals", (2 * r + 1,), torch.int32), ("winners", (2, tiles(vocab, SCAN)), torch.float32),
            ("winning", (2, tiles(vocab, SCAN)), torch.int32),
        ):  # fmt: skip
            check_tensor(
                f"state.{name}", getattr(self, name), shape, dtype, self.rows.device, contiguous=True
            )
        for name in ("peak", "total", "best", "token"):
            kind = torch.int32 if name == "token" else torch.float32
            tensor: Tensor = getattr(self.statistics, name)
            check_tensor(f"state.statistics.{name}", tensor, (n, r, tile_count), kind, self.rows.device,
                         contiguous=True)  # fmt: skip
        if lists:
            for name, kind in (("picked", torch.int32), ("found", torch.int32), ("values", torch.float32)):
                check_tensor(f"state.{name}", getattr(self, name), (r, chunks * CHUNK), kind, self.rows.device,
                             contiguous=True)  # fmt: skip
        if not 0 <= level < n:
            raise ValueError(f"level is {level}, expected 0 to {n - 1}")
        if not 1 <= count <= min(r, WINDOW):
            raise ValueError(f"count is {count}, expected 1 to {min(r, WINDOW)}")


@triton.jit
def mark(
    control_ptr: tl.tensor,
    end: tl.tensor,
    unfinished: tl.tensor,
    until: tl.tensor,
    N: tl.constexpr,
    TOP: tl.constexpr,
    UNTIL: tl.constexpr,
) -> None:
    """Open the next round at tier TOP and, inside it, the first at every tier below.

    With UNTIL the round is active only while fewer than `until` tokens of the tier's proposal stand.
    """
    active = unfinished
    if TOP < N - 1:
        active = active & (tl.load(active_word(control_ptr, N, TOP + 1)) != 0)
    if UNTIL:
        active = active & (end - tl.load(base_word(control_ptr, N, TOP)) < until)
    flag = active.to(tl.int64)
    for level in tl.static_range(N):
        if level <= TOP:
            tl.store(active_word(control_ptr, N, level), flag)
            if level < TOP or TOP == N - 1:
                tl.store(base_word(control_ptr, N, level), end)
