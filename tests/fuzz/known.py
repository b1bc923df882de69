"""Failures that are known and being mended: a pattern of the failure's line, and what it waits for."""

from __future__ import annotations

KNOWN: tuple[tuple[str, str], ...] = (
    (r"TypeError: '.*' object is not iterable \[generate\(", "a member of an enum is no sequence"),
)
