"""Divergence terms of two rows of log-probabilities, and a share's part of their sum.

With p verifying, q proposing, d = log q - log p and h = log((1 + exp(-|d|)) / 2), where m = (p + q) / 2:
log(m / p) = max(d, 0) + h and log(m / q) = max(-d, 0) + h, exactly 0 where p = q. Kinds as in
`reference.sampling.divergence`; 0 log 0 = 0, and a sum of infinite terms is inf.

`topk_*` takes the verifying tier's 50 most likely entries, of equal ones those with the lowest indices, and one
bucket for the rest. (The reference leaves the choice among equal ones at the border to `torch.topk`.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyramid_rt.kernels.decide.rows import least_key, listed_from, order_key, processed_log

KINDS = ("js", "js_fsd", "kl", "kl_reversed", "tv")


@triton.jit
def terms(p_log: tl.tensor, q_log: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Summand of one entry in twice the divergence (`js`, `js_fsd`, `tv`) or in it (`kl`, `kl_reversed`)."""
    p, q = tl.exp(p_log), tl.exp(q_log)
    no_p, no_q = p_log == float("-inf"), q_log == float("-inf")
    # Infinities are put in by hand: neither inf - inf nor 0 inf is ever computed.
    d = tl.where(no_q, 0.0, q_log) - tl.where(no_p, 0.0, p_log)
    if KIND == 4:
        total = tl.abs(p - q)
    elif KIND == 2:
        total = tl.where(no_q, 0.0, tl.where(no_p, float("inf"), q * d))
    elif KIND == 3:
        total = tl.where(no_p, 0.0, tl.where(no_q, float("inf"), -(p * d)))
    elif KIND == 1:
        half = tl.log(0.5 + 0.5 * tl.exp(-tl.abs(d)))
        mean = (p + q) * 0.5
        # log(m / p) + log(m / q), infinite where just one of them has the entry.
        alone = tl.where(mean > 0.0, float("inf"), 0.0)
        total = mean * tl.where(no_p == no_q, tl.abs(d) + 2.0 * half, alone)
    else:
        half = tl.log(0.5 + 0.5 * tl.exp(-tl.abs(d)))
        # Where the other one lacks the entry, m is half of this one.
        over_p = tl.where(no_q, -0.6931471805599453, tl.maximum(d, 0.0) + half)
        over_q = tl.where(no_p, -0.6931471805599453, tl.maximum(-d, 0.0) + half)
        total = -(p * over_p + q * over_q)
    return total


@triton.jit
def finished(total: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The divergence from the sum of its terms; rounding below 0 is 0."""
    halved = total
    if KIND == 0 or KIND == 1 or KIND == 4:
        halved = 0.5 * total
    return tl.where(halved < 0.0, 0.0, halved)


@triton.jit
def log_probabilities(
    x: tl.tensor, index: tl.tensor, temperature: tl.tensor, normaliser: tl.tensor, cut: tl.tensor, own: tl.tensor,
    PROCESSED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Of raw logits, at temperature 1 or processed."""
    log = x - normaliser
    if PROCESSED:
        log = processed_log(x, index, temperature, normaliser, cut, own)
    return log


@triton.jit
def share_of_divergence(
    p_row_ptr: tl.tensor, q_row_ptr: tl.tensor, picked_ptr: tl.tensor, chunk: tl.tensor, vocab: tl.tensor,
    bound: tl.tensor, temperature: tl.tensor, p_normaliser: tl.tensor, p_cut: tl.tensor, p_own: tl.tensor,
    q_normaliser: tl.tensor, q_cut: tl.tensor, q_own: tl.tensor, KIND: tl.constexpr, TOP: tl.constexpr,
    PROCESSED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """A share of two rows: the sum of its terms; with TOP the weights of p and q below `bound`, and how many
    entries from there on were listed. (terms or p's weight, q's weight, listed)"""
    first_sum = tl.zeros((BLOCK,), tl.float32)
    second_sum = tl.zeros((BLOCK,), tl.float32)
    amount = chunk * 0
    for first in tl.range(0, tl.minimum(vocab - chunk * CHUNK, CHUNK), BLOCK):
        index = chunk * CHUNK + first + tl.arange(0, BLOCK)
        inside = index < vocab
        p_x = tl.load(p_row_ptr + index, mask=inside, other=float("-inf"))
        q_x = tl.load(q_row_ptr + index, mask=inside, other=float("-inf"))
        p_log = log_probabilities(p_x, index, temperature, p_normaliser, p_cut, p_own, PROCESSED)
        q_log = log_probabilities(q_x, index, temperature, q_normaliser, q_cut, q_own, PROCESSED)
        if TOP:
            keep = inside & (p_log > float("-inf")) & (p_log >= bound)
            place = tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(picked_ptr + chunk * CHUNK + amount + place, index, mask=keep)
            amount += tl.sum(keep.to(tl.int32), 0)
            first_sum += tl.where(keep, 0.0, tl.exp(p_log))
            second_sum += tl.where(keep, 0.0, tl.exp(q_log))
        else:
            first_sum += terms(p_log, q_log, KIND)
    return tl.sum(first_sum, 0), tl.sum(second_sum, 0), amount


@triton.jit
def listed_logs(
    p_row_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor, length: tl.tensor,
    temperature: tl.tensor, p_normaliser: tl.tensor, p_cut: tl.tensor, p_own: tl.tensor,
    PROCESSED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Log-probabilities of p of the listed entries, into `values`."""
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        index = tl.load(found_ptr + at, mask=at < length, other=0)
        x = tl.load(p_row_ptr + index, mask=at < length, other=0.0)
        log = log_probabilities(x, index, temperature, p_normaliser, p_cut, p_own, PROCESSED)
        tl.store(values_ptr + at, tl.where(log == 0.0, 0.0, log), mask=at < length)
    tl.debug_barrier()


@triton.jit
def bucketed_divergence(
    q_row_ptr: tl.tensor, found_ptr: tl.tensor, values_ptr: tl.tensor, length: tl.tensor, p_tail: tl.tensor,
    q_tail: tl.tensor, bound: tl.tensor, temperature: tl.tensor, q_normaliser: tl.tensor,
    q_cut: tl.tensor, q_own: tl.tensor, KIND: tl.constexpr, TOP: tl.constexpr, PROCESSED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sum of the terms of the TOP most likely listed entries and of one bucket for all the rest.

    `values` holds the log-probabilities of p, all from `bound` on; p_tail and q_tail weigh what is not
    listed.
    """
    most = q_normaliser * 0.0 + 1.0
    border = order_key(bound) - 1
    if length > TOP:
        border = least_key(values_ptr, length, bound, most, most, TOP, False, BLOCK)
    # Of the entries at the border itself, so many are in.
    nearer, _ = listed_from(values_ptr, length, border + 1, most, BLOCK)
    room = TOP - nearer.to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    p_rest = tl.zeros((BLOCK,), tl.float32)
    q_rest = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        listed = at < length
        p_log = tl.load(values_ptr + at, mask=listed, other=float("-inf"))
        index = tl.load(found_ptr + at, mask=listed, other=0)
        x = tl.load(q_row_ptr + index, mask=listed, other=float("-inf"))
        q_log = log_probabilities(x, index, temperature, q_normaliser, q_cut, q_own, PROCESSED)
        q_log = tl.where(listed, q_log, float("-inf"))
        key = order_key(p_log)
        equal = (listed & (key == border)).to(tl.int32)
        inside = listed & ((key > border) | ((equal > 0) & (tl.cumsum(equal, 0) <= room)))
        room -= tl.sum(equal, 0)
        total += tl.where(inside, terms(p_log, q_log, KIND), 0.0)
        p_rest += tl.where(listed & (inside == 0), tl.exp(p_log), 0.0)
        q_rest += tl.where(listed & (inside == 0), tl.exp(q_log), 0.0)
    p_tail += tl.sum(p_rest, 0)
    q_tail += tl.sum(q_rest, 0)
    return tl.sum(total, 0) + terms(log_of(p_tail), log_of(q_tail), KIND)


@triton.jit
def log_of(weight: tl.tensor) -> tl.tensor:
    """log(weight), -inf at 0."""
    return tl.where(weight > 0.0, tl.log(tl.maximum(weight, 1.1754943508222875e-38)), float("-inf"))
