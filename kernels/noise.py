"""Random words of any stream, bit-equal to `reference.sampling.random_words`, and what is made of them.

Philox4x32-10 with the seed's two words as key and the counter (v // 4, position, purpose | stage << 8, 0); word
v % 4 belongs to vocabulary index v. A word makes u = min((word + 0.5) 2^-32, 1 - 2^-24) and, from it, the
Gumbel noise g = -log(-log1p(-u)).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(
    key0: tl.tensor, key1: tl.tensor, block: tl.tensor, position: tl.tensor, stream: tl.tensor
) -> tuple[tl.tensor, ...]:
    """The four words of Philox4x32-10 at the counter (block, position, stream, 0); all uint32, of one shape."""
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
def stream_words(
    seed_ptr: tl.tensor, block: tl.tensor, position: tl.tensor, stream: tl.tensor
) -> tuple[tl.tensor, ...]:
    """`philox_words` with the seed's words as the key."""
    key0 = tl.load(seed_ptr).to(tl.uint32)
    key1 = tl.load(seed_ptr + 1).to(tl.uint32)
    return philox_words(key0, key1, block, position, stream)  # type: ignore[no-any-return]


@triton.jit
def log_reduced(f: tl.tensor, exponent: tl.tensor, correction: tl.tensor) -> tl.tensor:
    """log((1 + f) 2^exponent) + correction within 1 ulp, for 1 + f in [sqrt(1/2), sqrt(2)] (FreeBSD's logf)."""
    s = tl.div_rn(f, 2.0 + f)
    z = s * s
    w = z * z
    odd = w * (0.40000972152 + w * 0.24279078841)
    even = z * (0.66666662693 + w * 0.28498786688)
    half = 0.5 * f * f
    low = exponent * 9.0580006145e-06 + correction
    return s * (half + (odd + even)) + low - half + f + exponent * 6.9313812256e-01


@triton.jit
def reduce_exponent(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """f and the exponent (float32 both) of a positive normal x = (1 + f) 2^exponent."""
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    return mantissa - 1.0, ((bits >> 23) - 127).to(tl.float32)


@triton.jit
def gumbel(word: tl.tensor) -> tl.tensor:
    """-log(-log1p(-u)) of a random word (uint32). The GPU's own logarithm is too coarse for both ends of u."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    kept = 1.0 - u
    f, exponent = reduce_exponent(kept)
    small = exponent == 0.0
    # 1 - u rounds: near 1 the argument itself serves, elsewhere the lost part comes back as a correction.
    lost = tl.where(small, 0.0, tl.div_rn((1.0 - kept) - u, kept))
    inner = -log_reduced(tl.where(small, -u, f), exponent, lost)
    f, exponent = reduce_exponent(inner)
    return -log_reduced(f, exponent, 0.0)


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
    """u of a random word, as `reference.sampling.uniform`."""
    return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)


@triton.jit
def gumbel_at(seed_ptr: tl.tensor, index: tl.tensor, position: tl.tensor, stream: tl.tensor) -> tl.tensor:
    """Gumbel noise of each vocabulary index at a position."""
    return gumbel(chosen_words(seed_ptr, index, position, stream))
