"""Failures that are known and being mended: a pattern of the failure's line, and what it waits for."""

from __future__ import annotations

KNOWN: tuple[tuple[str, str], ...] = (
    (r"died of signal 6 \[.*tokenizer\.json", "ids of a tokenizer are bounded before the library sees them"),
    (r"TypeError: '.*' object is not iterable \[generate\(", "a member of an enum is no sequence"),
)
