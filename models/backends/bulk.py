"""Long chunks of a prompt on the `triton` backend: the same weights and caches, by cuBLAS and SDPA.

The kernels are made for windows that a memory bus can feed: at 64 rows they are near the end of that, and a prompt of
thousands of tokens in windows of 64 reads all weights dozens of times. The products of a layer of the 8B take 303 us
for 512 rows by cuBLAS on an H200, and 145 us for 64 rows by the kernels.

Its bits are not the kernels'. So which positions of a prompt are processed this way follows from the prompt's length
alone (`whole_chunks`), and a prefix is taken from a cache only where the same way made it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from pyramid_rt.models.backends.torch import TorchBackend, Window
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.trees import Tree, refuse_tree

# Tokens of a chunk. On an H200 a layer of the 8B takes 0.71 us a token at 256 rows and 0.59 at 512, and the host
# needs as long to start either: at 256 it is what a prompt waits for. What is left over at the end of a prompt, up to
# a chunk, goes through the kernels in captured windows of 64, at 2.8 us a token and layer.
CHUNK = 512


def whole_chunks(prompt: int) -> int:
    """Tokens from the first on that are processed in chunks: all whole ones before the prompt's last token."""
    return (prompt - 1) // CHUNK * CHUNK


@dataclass(frozen=True, slots=True)
class BulkWindow(Window):
    """A chunk's rows; the mask is empty, for the last row sees `end` cache rows, and each before it one fewer."""

    end: int


@dataclass(frozen=True, slots=True)
class BulkBackend(TorchBackend):
    """The reference ops, with attention that needs no mask in memory."""

    def window(
        self,
        rotary: Tensor,
        start: Tensor,
        length: int,
        kv_bound: int,
        group: int,
        tree: Tree | None = None,
    ) -> BulkWindow:
        """See `Backend`; kv_bound must be start + length."""
        refuse_tree(tree, "bulk")
        slots = torch.arange(length, dtype=torch.int64, device=start.device).add_(start)
        cos, sin = rotary.index_select(0, slots).chunk(2, 1)
        return BulkWindow(slots, slots, None, cos, sin, rotary[:0], kv_bound)

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Window) -> Tensor:
        """See `Backend`."""
        assert isinstance(window, BulkWindow)
        length, end = q.shape[0], window.end
        attended = functional.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k_cache[:, :end].unsqueeze(0),
            v_cache[:, :end].unsqueeze(0),
            attn_mask=causal_lower_right(length, end),
            enable_gqa=True,
        )
        return attended.squeeze(0).transpose(0, 1).reshape(length, -1)


def bulk_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes that a chunk's activations take at most, all at once: those of the MLP, and the residual stream."""
    return CHUNK * (4 * config.intermediate_size + 4 * config.hidden_size) * dtype.itemsize
