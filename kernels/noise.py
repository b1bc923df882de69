"""Random words of any stream, bit-equal to `sampling_reference.random_words`, and what is made of them.

Philox4x32-10 with the seed's two words as key and the counter (v // 4, position, purpose | stage << 8, 0); word
v % 4 belongs to vocabulary index v. A word makes u = min((word + 0.5) 2^-32, 1 - 2^-24) and, from it, the
Gumbel noise of `head.gumbel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyramid_rt.kernels.head import gumbel


@triton.jit
def stream_words(
    seed_ptr: tl.tensor, block: tl.tensor, position: tl.tensor, stream: tl.tensor
) -> tuple[tl.tensor, ...]:
    """The four words (uint32) of the counters (block, position, stream, 0); uint32 all, of one shape."""
    key0 = tl.load(seed_ptr).to(tl.uint32)
    key1 = tl.load(seed_ptr + 1).to(tl.uint32)
    c0, c1, c2 = block, position, stream
    c3 = c0 ^ c0
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def chosen_words(seed_ptr: tl.tensor, index: tl.tensor, position: tl.tensor, stream: tl.tensor) -> tl.tensor:
    """The word of each vocabulary index; index [n] int32, position and stream scalars or [n]."""
    zero = (index * 0).to(tl.uint32)
    w0, w1, w2, w3 = stream_words(
        seed_ptr, (index // 4).to(tl.uint32), zero + position.to(tl.uint32), zero + stream
    )
    lane = index % 4
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def consecutive_words(
    seed_ptr: tl.tensor, first: tl.tensor, position: tl.tensor, stream: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """The words of SIZE vocabulary indices from `first` on, a multiple of 4."""
    block = (first // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)
    zero = block ^ block
    w0, w1, w2, w3 = stream_words(seed_ptr, block, zero + position.to(tl.uint32), zero + stream)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (SIZE,))


@triton.jit
def uniform(word: tl.tensor) -> tl.tensor:
    """u of a random word, as `sampling_reference.uniform`."""
    return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)


@triton.jit
def gumbel_at(seed_ptr: tl.tensor, index: tl.tensor, position: tl.tensor, stream: tl.tensor) -> tl.tensor:
    """Gumbel noise of each vocabulary index at a position."""
    return gumbel(chosen_words(seed_ptr, index, position, stream))
