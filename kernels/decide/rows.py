"""Functions of one logits row: its winner, its log-sum-exp, and the few entries that matter to a decision.

Entries that a filter or a `topk_*` divergence looks at are found without a sort. The largest logits of the head's
tiles bound the wanted value from below; every program lists its share's entries from that bound on, in the order
of their indices, and the program that arrives last puts the lists together and bisects over the order of
float32, so a threshold is an entry's value, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


def power_of_two(size: int) -> int:
    """The least power of two not below `size`."""
    return 1 << (size - 1).bit_length()


@triton.jit
def row_winner(
    best_ptr: tl.tensor, token_ptr: tl.tensor, offset: tl.tensor, count: tl.tensor, vocab: tl.tensor,
    TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Token (int64) of the largest score over the `count` tiles at `offset`, ties to the lowest index.

    A row that cannot be decided gives some token of the vocabulary.
    """
    tile = tl.arange(0, TILES)
    best = tl.load(best_ptr + offset + tile, mask=tile < count, other=float("-inf"))
    best = tl.where(best == best, best, float("-inf"))
    top = tl.max(best, 0)
    at = tl.min(tl.where((best == top) & (tile < count), tile, TILES - 1), 0)
    token = tl.load(token_ptr + offset + tl.minimum(at, count - 1)).to(tl.int64)
    return tl.minimum(tl.maximum(token, 0), vocab - 1)


@triton.jit
def row_normaliser(
    peak_ptr: tl.tensor, total_ptr: tl.tensor, offset: tl.tensor, count: tl.tensor, TILES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Log of the sum of exp(logit) over the tiles, and 1 where the row cannot be decided (int32)."""
    tile = tl.arange(0, TILES)
    peak = tl.load(peak_ptr + offset + tile, mask=tile < count, other=float("-inf"))
    total = tl.load(total_ptr + offset + tile, mask=tile < count, other=0.0)
    wrong = tl.sum((total != total).to(tl.int32), 0) + tl.sum((peak != peak).to(tl.int32), 0)
    top = tl.max(tl.where(peak == peak, peak, float("-inf")), 0)
    non_finite = (wrong > 0) | (top == float("-inf")) | (top == float("inf"))
    shift = tl.where(non_finite, 0.0, top)
    mass = tl.sum(tl.where(peak > float("-inf"), total * tl.exp(peak - shift), 0.0), 0)
    return shift + tl.log(tl.where(non_finite, 1.0, mass)), non_finite.to(tl.int32)


@triton.jit
def divisor(temperature: tl.tensor) -> tl.tensor:
    """Divisor of logits: the temperature, or 1 at 0."""
    return tl.where(temperature > 0.0, temperature, 1.0)


@triton.jit
def scaled_logits(x: tl.tensor, divide: tl.tensor) -> tl.tensor:
    """x / divide as IEEE rounds it, -0 as 0, so that the order of bits is the order of values."""
    s = tl.div_rn(x, tl.zeros_like(x) + divide)
    return tl.where(s == 0.0, 0.0, s)


@triton.jit
def processed_log(
    x: tl.tensor,
    index: tl.tensor,
    temperature: tl.tensor,
    normaliser: tl.tensor,
    cut: tl.tensor,
    own: tl.tensor,
) -> tl.tensor:
    """Processed log-probabilities of raw logits x at vocabulary indices; one-hot at temperature 0."""
    s = scaled_logits(x, divisor(temperature))
    kept = tl.where(s >= cut, s - normaliser, float("-inf"))
    return tl.where(temperature > 0.0, kept, tl.where(index == own, 0.0, float("-inf")))


@triton.jit
def order_key(s: tl.tensor) -> tl.tensor:
    """int64 keys in the order of float32 values."""
    bits = s.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def key_value(key: tl.tensor) -> tl.tensor:
    """The float32 value of an `order_key`."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def tile_gaps(
    peak_ptr: tl.tensor, offset: tl.tensor, count: tl.tensor, divide: tl.tensor, TILES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The row's largest scaled logit, and how far below it each tile's largest is (inf for an empty one)."""
    tile = tl.arange(0, TILES)
    peak = tl.load(peak_ptr + offset + tile, mask=tile < count, other=float("-inf"))
    peak = scaled_logits(tl.where(peak == peak, peak, float("-inf")), divide)
    top = tl.max(peak, 0)
    top = tl.where((top > float("-inf")) & (top < float("inf")), top, 0.0)
    return top, tl.where(peak > float("-inf"), top - peak, float("inf"))


@triton.jit
def near_bound(gaps: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """A gap within which at least `wanted` tiles have their largest logit, so as many entries lie; else inf.

    Gaps up to 64 are looked at, to a hundredth.
    """
    near = tl.sum((gaps != gaps).to(tl.float32), 0)
    width = near + 64.0
    part = (tl.arange(0, 4) + 1) * 0.25
    enough = tl.sum((gaps <= 64.0).to(tl.int32), 0) >= wanted
    for _ in tl.range(0, 7):
        many = tl.sum((gaps[:, None] <= (near + width * part)[None, :]).to(tl.int32), 0)
        near += width * 0.25 * tl.minimum(tl.sum((many < wanted).to(tl.int32), 0), 3)
        width = width * 0.25
    return tl.where(enough, near + width, float("inf"))


@triton.jit
def light_bound(gaps: tl.tensor, spare: tl.tensor) -> tl.tensor:
    """A gap beyond which a row surely has less than its share `spare` of the weight; inf if none within 64.

    The entries beyond a gap, in a tile of 64, weigh at most 64 min(exp(peak), exp(-gap)). While that, summed
    over the tiles, is at most `spare` times the weight of the peaks alone, more than the rest lies nearer.
    """
    weight = tl.exp(-gaps)
    allowed = spare * tl.sum(weight, 0) * 0.999
    near = allowed * 0.0
    width = near + 64.0
    part = (tl.arange(0, 4) + 1) * 0.25
    enough = 64.0 * tl.sum(tl.minimum(weight, tl.exp(-width)), 0) <= allowed
    for _ in tl.range(0, 7):
        beyond = tl.exp(-(near + width * part))
        heavy = 64.0 * tl.sum(tl.minimum(weight[:, None], beyond[None, :]), 0) > allowed
        near += width * 0.25 * tl.minimum(tl.sum(heavy.to(tl.int32), 0), 3)
        width = width * 0.25
    return tl.where(enough, near + width, float("inf"))


@triton.jit
def slack(top: tl.tensor) -> tl.tensor:
    """Bound of what rounding may add to a gap on the way there and back."""
    return 1e-3 + 1e-5 * tl.abs(top)


@triton.jit
def join_lists(
    amounts_ptr: tl.tensor, picked_ptr: tl.tensor, found_ptr: tl.tensor, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Put the lists of a row's shares (vocabulary indices, ascending) one after the other; their length.

    amounts [CHUNKS] and picked [CHUNKS * CHUNK] are other programs' work; found is this one's.
    """
    chunk = tl.arange(0, SLOTS)
    amount = tl.load(amounts_ptr + chunk, mask=chunk < CHUNKS, other=0, cache_modifier=".cg")
    upto = tl.cumsum(amount, 0)
    length = tl.sum(amount, 0)
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        before = upto[None, :] <= at[:, None]
        share = tl.sum(before.to(tl.int32), 1)
        skipped = tl.sum(tl.where(before, amount[None, :], 0), 1)
        mask = at < length
        index = tl.load(picked_ptr + share * CHUNK + at - skipped, mask=mask, other=0, cache_modifier=".cg")
        tl.store(found_ptr + at, index, mask=mask)
    # Others of this program's threads read what these wrote.
    tl.debug_barrier()
    return length


@triton.jit
def least_key(
    values_ptr: tl.tensor, length: tl.tensor, low: tl.tensor, high: tl.tensor, top: tl.tensor, limit: tl.tensor,
    WEIGH: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least `order_key` above which listed values are fewer than `limit`, or with WEIGH weigh less.

    A value weighs exp(value - top). Nothing listed lies below low or above high, and `limit` can be reached: the
    result is the key of a listed value. Few values are held against each other; of more, sixteen keys are tried
    at a time.
    """
    over = order_key(high)
    if length <= 64:
        at = tl.arange(0, 64)
        s = tl.load(values_ptr + at, mask=at < length, other=float("-inf"))
        key = tl.where(at < length, order_key(s), -(1 << 40))
        amount = tl.exp(s - top) if WEIGH else (at < length).to(tl.float32)
        above = tl.sum(tl.where(key[:, None] > key[None, :], amount[:, None], 0.0), 0)
        over = tl.min(tl.where((at < length) & (above < limit), key, over), 0)
    else:
        under = order_key(low) - 1
        part = tl.arange(0, 16).to(tl.int64) + 1
        while over - under > 1:
            # Rounded up, so that the sixteenth is `over` or past it.
            stride = (over - under + 15) // 16
            tried = tl.minimum(under + stride * part, over)
            # Added up across threads once, not once a block: of a flat row under top-p alone there are dozens.
            sums = tl.zeros((BLOCK, 16), tl.float32)
            for first in tl.range(0, length, BLOCK):
                at = first + tl.arange(0, BLOCK)
                s = tl.load(values_ptr + at, mask=at < length, other=float("-inf"))
                key = tl.where(at < length, order_key(s), -(1 << 40))
                amount = tl.exp(s - top) if WEIGH else (at < length).to(tl.float32)
                sums += tl.where(key[:, None] > tried[None, :], amount[:, None], 0.0)
            above = tl.sum(sums, 0)
            # Those that do not hold come first; `over` is known to hold.
            fails = tl.minimum(tl.sum((above >= limit).to(tl.int64), 0), 15)
            under = tl.minimum(under + stride * fails, over - 1)
            over = tl.minimum(under + stride, over)
    return over


@triton.jit
def listed_from(
    values_ptr: tl.tensor, length: tl.tensor, key: tl.tensor, top: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Number (float32) of listed values at a key or above, and the sum of exp(value - top) over them."""
    many = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        s = tl.load(values_ptr + at, mask=at < length, other=float("-inf"))
        keep = (at < length) & (order_key(s) >= key)
        many += keep.to(tl.float32)
        mass += tl.where(keep, tl.exp(s - top), 0.0)
    return tl.sum(many, 0), tl.sum(mass, 0)


@triton.jit
def sum_of_shares(parts_ptr: tl.tensor, CHUNKS: tl.constexpr, SLOTS: tl.constexpr) -> tl.tensor:
    """Parts that other programs stored, added in one fixed order."""
    share = tl.arange(0, SLOTS)
    return tl.sum(tl.load(parts_ptr + share, mask=share < CHUNKS, other=0.0, cache_modifier=".cg"), 0)
