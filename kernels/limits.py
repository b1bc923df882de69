"""Sizes that kernels, models and decoding must agree on."""

from __future__ import annotations

# Rows of every window buffer, the widest window of a forward pass, and the rows that a cache and the token buffer
# have beyond the context: a window that begins at the last position must fit.
WINDOW = 64

# Stands for "none" where a word holds a position.
NO_POSITION = 2**62
