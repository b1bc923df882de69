"""Noise, sampling and divergence in plain torch: the oracle of the sampling kernels, and the `torch` backend.

Every function takes fixed shapes, reads no device value on the host and uses no boolean indexing, so that the
same code runs eagerly, inside a CUDA graph, and under `torch.vmap` over many seeds (the distribution tests).

Notation: R rows (one per position), V vocabulary entries. Logits, log-probabilities and noise are float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

PURPOSE_OWN = 0
PURPOSE_ACCEPT = 1
PURPOSE_RESIDUAL = 2

DIVERGENCES = (
    "js",
    "js_fsd",
    "kl",
    "kl_reversed",
    "tv",
    "topk_js",
    "topk_js_fsd",
    "topk_kl",
    "topk_kl_reversed",
    "topk_tv",
)
DIVERGENCE_TOP_K = 50

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_UNIT = 2.0**-32
_LARGEST_UNIFORM = 1.0 - 2.0**-24


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Counter and key words are int64 tensors holding values in [0, 2^32), broadcast against each other.
    Returns the four output words likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32 x 32 bit product wraps in int64, but its bits are the right ones; the mask undoes the sign.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: Tensor, positions: Tensor, purpose: int, stage: int, count: int) -> Tensor:
    """The first `count` random words of each position's stream.

    Word v of a position is word v % 4 of the Philox block whose counter is
    (v // 4, position, purpose | stage << 8, 0) and whose key is `seed`.

    Args:
        seed: int64 [2], the low and high 32-bit word of the seed.
        positions: int64 [R], absolute positions in the sequence.
        purpose: one of the PURPOSE_* constants.
        stage: index of the rule that draws; 0 for own-token noise.

    Returns: int64 [R, count], values in [0, 2^32).
    """
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=positions.device)
    rows = positions.reshape(-1, 1)
    stream = torch.full_like(rows, purpose | stage << 8)
    words = philox_4x32_10((blocks, rows, stream, torch.zeros_like(rows)), (seed[0], seed[1]))
    return torch.stack(words, dim=-1).flatten(-2)[:, :count]


def uniform(words: Tensor) -> Tensor:
    """min((word + 0.5) * 2^-32, 1 - 2^-24) in float32: never 0, and never the 1 that float32 rounds up to."""
    return ((words.to(torch.float32) + 0.5) * _UNIT).clamp(max=_LARGEST_UNIFORM)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log1p(-u)) of random words; exact at both ends of u."""
    return -torch.log(-torch.log1p(-uniform(words)))


def own_noise(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise [R, V] of the own tokens: the same for every tier at a position."""
    return gumbel(random_words(seed, positions, PURPOSE_OWN, 0, vocab_size))


def filter_logits(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Top-k, then top-p on the renormalised top-k set, then min-p; what falls becomes -inf, ties stand.

    Args:
        scaled: float32 [R, V], logits already divided by the temperature.
        top_k: int64 [], 0 for off. top_p: float32 [], 1 for off. min_p: float32 [], 0 for off.
    """
    vocab_size = scaled.shape[-1]
    ordered = torch.sort(scaled, dim=-1, descending=True).values
    rank = torch.arange(vocab_size, dtype=torch.int64, device=scaled.device)
    k = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)
    kth = ordered.gather(-1, (k - 1).expand(ordered.shape[0]).unsqueeze(-1))
    in_top_k = (rank < k) | (ordered >= kth)
    probabilities = torch.softmax(ordered.masked_fill(~in_top_k, -math.inf), dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    # Rounding may bring the sum before a tail entry to 1, so an inactive top_p must not compare at all.
    in_top_p = (before < top_p) | (top_p >= 1.0)
    in_min_p = probabilities >= min_p * probabilities[..., :1]
    kept = (in_top_k & in_top_p & in_min_p).sum(-1, keepdim=True).clamp(min=1)
    threshold = ordered.gather(-1, kept - 1)
    return scaled.masked_fill(scaled < threshold, -math.inf)


def process_logits(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, filters: bool
) -> Tensor:
    """Raw logits [R, V] / temperature, then the filters. A temperature of 0 divides by 1 (the argmax stays)."""
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)
    return filter_logits(scaled, top_k, top_p, min_p) if filters else scaled


def one_hot_logprobs(logits: Tensor) -> Tensor:
    """The processed distribution at temperature 0: log-probability 0 at the argmax, -inf elsewhere. [R, V]"""
    best = logits.argmax(-1, keepdim=True)
    columns = torch.arange(logits.shape[-1], dtype=torch.int64, device=logits.device)
    return torch.where(columns == best, 0.0, -math.inf)


def residual_token(p_log: Tensor, q_log: Tensor, noise: Tensor) -> Tensor:
    """A token from max(p - q, 0) normalised, by Gumbel noise; from p where that is all zero.

    Args: log-probabilities p_log, q_log and noise, float32 [R, V]. Returns int64 [R].
    Source: arXiv:2211.17192, section 2.3; arXiv:2302.01318, algorithm 2.
    """
    p = p_log.exp()
    residual = (p - q_log.exp()).clamp(min=0.0)
    empty = residual.sum(-1, keepdim=True) == 0
    return (torch.where(empty, p, residual).log() + noise).argmax(-1)


def divergence(kind: str, p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Divergence [R] in nats between softmax(p_logits) (verifying tier) and softmax(q_logits) (proposing tier).

    Kinds, with m = (p + q) / 2: `js` = KL(p|m)/2 + KL(q|m)/2, at most ln 2; `js_fsd` = KL(m|p)/2 + KL(m|q)/2,
    what the reference code of arXiv:2502.20704 computes under the name js_div, unbounded; `kl` = KL(q|p);
    `kl_reversed` = KL(p|q); `tv` = sum |p - q| / 2. `topk_*` is the same over the verifying tier's 50 most
    likely tokens and one bucket for the rest. 0 log 0 = 0, rounding below 0 is 0, disjoint support is +inf.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}; expected one of {', '.join(DIVERGENCES)}")
    p_log, q_log = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    if kind.startswith("topk_"):
        p_log, q_log = _bucketed(p_log, q_log)
        kind = kind.removeprefix("topk_")
    if kind == "tv":
        return 0.5 * (p_log.exp() - q_log.exp()).abs().sum(-1)
    if kind == "kl":
        return _kl(q_log, p_log)
    if kind == "kl_reversed":
        return _kl(p_log, q_log)
    return _jensen_shannon(p_log, q_log, reference_fsd=kind == "js_fsd")


def _kl(a_log: Tensor, b_log: Tensor) -> Tensor:
    """KL(a|b) [R] of log-probabilities [R, V]."""
    terms = torch.where(a_log == -math.inf, 0.0, a_log.exp() * (a_log - b_log))
    return terms.sum(-1).clamp(min=0.0)


def _jensen_shannon(p_log: Tensor, q_log: Tensor, *, reference_fsd: bool) -> Tensor:
    """`js` or `js_fsd` [R], by log(m / p) = softplus(log q - log p) - ln 2: exactly 0 where p = q."""
    p, q = p_log.exp(), q_log.exp()
    difference = q_log - p_log
    m_over_p = softplus(difference) - math.log(2.0)
    m_over_q = softplus(-difference) - math.log(2.0)
    if reference_fsd:
        mean = (p + q) / 2
        terms = torch.where(mean == 0, 0.0, mean * (m_over_p + m_over_q))
    else:
        terms = -torch.where(p == 0, 0.0, p * m_over_p) - torch.where(q == 0, 0.0, q * m_over_q)
    return 0.5 * terms.sum(-1).clamp(min=0.0)


def _bucketed(p_log: Tensor, q_log: Tensor) -> tuple[Tensor, Tensor]:
    """Both rows on p's most likely tokens and one tail bucket: [R, k + 1]."""
    k = min(DIVERGENCE_TOP_K, p_log.shape[-1])
    top = p_log.topk(k, dim=-1).indices
    inside = torch.zeros_like(p_log).scatter(-1, top, 1.0) > 0
    parts = []
    for log in (p_log, q_log):
        tail = log.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True)
        parts.append(torch.cat((log.gather(-1, top), tail), dim=-1))
    return parts[0], parts[1]
