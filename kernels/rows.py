"""What the decision kernels do with one logits row: its winner, its log-sum-exp, and the few entries that matter.

Entries that a filter or a `topk_*` divergence looks at are found without a sort. The largest logits of the head's
tiles bound the wanted value from below; every program lists its share's entries from that bound on, in the order
of their indices, and the program that arrives last puts the lists together and bisects over the order of
float32, so a threshold is an entry's value, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    flawed = (wrong > 0) | (top == float("-inf")) | (top == float("inf"))
    shift = tl.where(flawed, 0.0, top)
    mass = tl.sum(tl.where(peak > float("-inf"), total * tl.exp(peak - shift), 0.0), 0)
    return shift + tl.log(tl.where(flawed, 1.0, mass)), flawed.to(tl.int32)


@triton.jit
def divisor(temperature: tl.tensor) -> tl.tensor:
    """What logits are divided by: the temperature, or 1 at 0."""
    return tl.where(temperature > 0.0, temperature, 1.0)


@triton.jit
def scaled_logits(x: tl.tensor, divide: tl.tensor) -> tl.tensor:
    """x / divide as IEEE rounds it, -0 as 0, so that the order of bits is the order of values."""
    s = tl.div_rn(x, tl.zeros_like(x) + divide)
    return tl.where(s == 0.0, 0.0, s)


@triton.jit
def processed_log(
    x: tl.tensor, index: tl.tensor, temperature: tl.tensor, normaliser: tl.tensor, cut: tl.tensor, own: tl.tensor
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
def lower_bound(
    top: tl.tensor, gaps: tl.tensor, wanted: tl.tensor, spare: tl.tensor, TILES: tl.constexpr
) -> tl.tensor:
    """A value at or below the `wanted`-th largest scaled logit, or, with wanted = 0, below the top-p threshold.

    At least as many entries as tiles with a peak above v lie above v; so the wanted-th largest peak is a bound.
    The entries up to v of a tile of 64 weigh at most 64 min(exp(peak), exp(v)); while the sum of that over
    the tiles is at most `spare` = 1 - top_p times the sum of the peaks' own weights, more than top_p of
    all weight lies above v. The gap to the row's largest logit is bisected in [0, 64]; beyond, nothing is left out.
    """
    weight = tl.exp(-gaps)
    allowed = spare * tl.sum(weight, 0) * 0.999
    near = top * 0.0
    far = near + 64.0
    bound = tl.where(_holds(gaps, weight, far, wanted, allowed), far, float("inf"))
    for _ in tl.range(0, 16):
        middle = 0.5 * (near + far)
        holds = _holds(gaps, weight, middle, wanted, allowed)
        near = tl.where(holds, near, middle)
        far = tl.where(holds, middle, far)
    # The gaps are rounded; so is the way back from a gap to a value.
    slack = 1e-3 + 1e-5 * tl.abs(top)
    return tl.where(bound < float("inf"), top - far - slack, float("-inf"))


@triton.jit
def _holds(
    gaps: tl.tensor, weight: tl.tensor, gap: tl.tensor, wanted: tl.tensor, allowed: tl.tensor
) -> tl.tensor:
    """Whether `top - gap` is such a bound."""
    enough = tl.sum((gaps <= gap).to(tl.int32), 0) >= wanted
    light = 64.0 * tl.sum(tl.minimum(weight, tl.exp(-gap)), 0) <= allowed
    return tl.where(wanted > 0, enough, light)


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
def count_above(values_ptr: tl.tensor, length: tl.tensor, key: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """How many listed values lie above a key (int32)."""
    many = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        s = tl.load(values_ptr + at, mask=at < length, other=float("-inf"))
        many += ((at < length) & (order_key(s) > key)).to(tl.int32)
    return tl.sum(many, 0)


@triton.jit
def weight_above(
    values_ptr: tl.tensor, length: tl.tensor, key: tl.tensor, top: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Sum of exp(s - top) over the listed values above a key."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        s = tl.load(values_ptr + at, mask=at < length, other=float("-inf"))
        mass += tl.where((at < length) & (order_key(s) > key), tl.exp(s - top), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def kth_largest(
    values_ptr: tl.tensor, length: tl.tensor, low: tl.tensor, high: tl.tensor, k: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Key of the k-th largest listed value; low's key is below every one of the k, high's not below any."""
    under, over = order_key(low) - 1, order_key(high)
    for _ in tl.range(0, 33):
        middle = (under + over) >> 1
        few = count_above(values_ptr, length, middle, BLOCK) < k
        # At a distance of 1 the middle is `under` itself, which is known not to hold.
        over = tl.where(few & (middle > under), middle, over)
        under = tl.where(few, under, middle)
    return over


@triton.jit
def mass_threshold(
    values_ptr: tl.tensor, length: tl.tensor, low: tl.tensor, high: tl.tensor, top: tl.tensor,
    wanted: tl.tensor, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Key of the least listed value above which less than `wanted` weighs."""
    under, over = order_key(low) - 1, order_key(high)
    for _ in tl.range(0, 33):
        middle = (under + over) >> 1
        light = weight_above(values_ptr, length, middle, top, BLOCK) < wanted
        over = tl.where(light & (middle > under), middle, over)
        under = tl.where(light, under, middle)
    return over
