"""Every op of a forward pass in plain torch: the oracle of the fused kernels, and the `torch` backend.

Shapes name T the window's rows (tokens), N and K a weight matrix's rows and columns, H the query heads,
KV the key and value heads, G = H / KV, D the size of a head, S the rows of a cache, V the vocabulary.
Matrices are stored as [N, K] and applied as y = x W^T. All tensors of a call are on one device; "dtype" is
the model's (float32, bfloat16 or float16) wherever no other is named. Nothing here reads a device value.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

RopeKind = Literal["default", "linear", "dynamic", "llama3"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b.

    x [T, K] dtype, weight [N, K] dtype, bias [N] dtype or None -> [T, N] dtype, contiguous.
    """
    return functional.linear(x, weight, bias)


def embedding(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of the embedding: [V, N] dtype gathered by tokens [T] int64 -> [T, N] dtype."""
    return table.index_select(0, tokens)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = dtype(x / sqrt(mean(x^2) + eps)) * w, mean and quotient in float32: transformers' rounding.

    x [T, N] and weight [N] dtype -> [T, N] dtype.
    """
    if x.dtype in (torch.float32, torch.float64):
        return functional.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype) * weight


def inverse_frequencies(
    kind: RopeKind,
    head_dim: int,
    *,
    theta: float,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 1.0,
    original_context: int = 0,
) -> Tensor:
    """Angle per position of each rotary pair, [D / 2] float32 on the CPU: f_i = theta^(-2i / D), then

    - linear: f / factor
    - llama3: with wavelength w = 2 pi / f and C = original_context: f where w < C / high_freq_factor,
      f / factor where w > C / low_freq_factor, and between the two (1 - s) f / factor + s f with
      s = (C / w - low_freq_factor) / (high_freq_factor - low_freq_factor)
    - default, and dynamic within its original context: f itself
    """
    frequencies = 1.0 / (
        theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    )
    if kind == "linear":
        return frequencies / factor
    if kind != "llama3":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    smooth = (original_context / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    # Clamped, the ramp is 0 in the scaled range and 1 in the kept one: three cases in one formula.
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def rotary_table(
    kind: RopeKind,
    rows: int,
    head_dim: int,
    *,
    theta: float,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 1.0,
    original_context: int = 0,
    prompt: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosines and signed sines of positions 0 .. rows-1, computed in float32 and rounded to dtype.

    With `dynamic`, a position has the base of a length n: theta_n = theta (factor n / C - (factor - 1))^(D / (D - 2))
    where n > C = original_context, theta elsewhere. For positions of the prompt n is the prompt's length; for
    position p after it n is p + 1, so that its angles never depend on how long the text became later, which is what
    lets cached keys stand.

    Returns:
        [rows, 2, D] dtype on the CPU: [:, 0] = (cos, cos), [:, 1] = (-sin, sin), each half D / 2 wide.
    """
    frequencies = inverse_frequencies(
        kind,
        head_dim,
        theta=theta,
        factor=factor,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_context=original_context,
    )
    positions = torch.arange(rows, dtype=torch.float32, device="cpu").unsqueeze(1)
    if kind == "dynamic" and rows > original_context:
        # The base in float64: as a float32 power it would cost the angle of a far position several digits.
        length = positions.double() + 1
        length = length.masked_fill(length <= prompt, prompt).clamp(min=original_context)
        growth = factor * length / original_context - (factor - 1)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
        bases = theta * growth ** (head_dim / (head_dim - 2))
        grown = (positions.double() * bases**-exponents).float()
        angles = torch.where(length == original_context, positions * frequencies, grown)
    else:
        angles = positions * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of every head: y = (x_1, x_2) * (cos, cos) + (x_2, x_1) * (-sin, sin).

    x [T, heads, D] dtype; cos and sin [T, 1, D] dtype, rows of `rotary_table` -> [T, heads, D] dtype.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def write_cache(cache: Tensor, values: Tensor, positions: Tensor) -> None:
    """Overwrite rows `positions` [T] int64 of cache [KV, S, D] with values [T, KV, D]; the rest stays."""
    cache.index_copy_(1, positions, values.transpose(0, 1))


def causal_mask(positions: Tensor, kv_bound: int, group: int, dtype: torch.dtype) -> Tensor:
    """The rows that row t may see: cache rows 0 .. positions[t].

    positions [T] int64 -> [T * G, kv_bound] dtype, 0 where seen and -inf elsewhere, row t * G + g being query
    head g of its group at window row t.
    """
    last = positions.unsqueeze(1).expand(-1, group).reshape(-1, 1)
    hidden = torch.arange(kv_bound, dtype=torch.int64, device=positions.device) > last
    return torch.where(hidden, -math.inf, 0.0).to(dtype)


def tree_mask(
    start: Tensor, ancestors: Tensor, kv_bound: int, group: int, dtype: torch.dtype, *, length: int
) -> Tensor:
    """The rows a tree's row t sees: cache rows below start, and window rows start + j with bit j of ancestors[t].

    start one int64, ancestors [>= T] int64 -> [T * G, kv_bound] dtype as `causal_mask`.
    """
    node = torch.arange(kv_bound, dtype=torch.int64, device=start.device) - start
    bits = (ancestors[:length].unsqueeze(1) >> node.clamp(0, 63)) & 1
    hidden = ((node >= 0) & ((bits == 0) | (node >= length))).repeat_interleave(group, 0)
    return torch.zeros(hidden.shape, dtype=dtype, device=start.device).masked_fill_(hidden, -math.inf)


def compact(cache: Tensor, start: Tensor, path: Tensor, count: Tensor) -> None:
    """Move a tree's accepted rows together: row start + i becomes what row start + path[i] was, i < count.

    Args:
        cache: [..., S, D] of any dtype; a token buffer [S] int64 goes in as its view [S, 1].
        start: one int64, absolute position of window row 0; start + 64 <= S.
        path: [64] int64 window row indices; those from count on may hold anything within 0 .. 63.
        count: one int64, 0 .. 64.
    """
    index = torch.arange(path.shape[0], dtype=torch.int64, device=path.device)
    source = start + torch.where(index < count, path, index)
    cache.index_copy_(-2, start + index, cache.index_select(-2, source))


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v over the first rows of a cache, query heads sharing K and V.

    The G query heads of one key head become rows of one product, so K and V are read once and never repeated;
    scores and softmax are float32. A masked row must hold finite numbers: 0 * NaN is NaN.

    Args:
        q: [T, H, D] dtype.
        k_cache, v_cache: [KV, S, D] dtype; head h of q reads head h // G.
        mask: [T * G, kv_bound] dtype, as `causal_mask`; kv_bound <= S rows are read.

    Returns:
        [T, H * D] dtype.
    """
    length, heads, head_dim = q.shape
    kv_heads, bound = k_cache.shape[0], mask.shape[1]
    grouped = q.view(length, kv_heads, -1).transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
    keys, values = k_cache.narrow(1, 0, bound).unsqueeze(0), v_cache.narrow(1, 0, bound).unsqueeze(0)
    out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.view(kv_heads, length, -1, head_dim).transpose(0, 1).reshape(length, heads * head_dim)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)): gate_up [T, 2 N] dtype, gate first -> [T, N] dtype."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)


def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """Logits x W^T as float32: x [R, K] dtype, weight [V, K] dtype -> [R, V] float32.

    In 16-bit types the product is rounded to dtype first, as transformers does.
    """
    return linear(x, weight).float()
