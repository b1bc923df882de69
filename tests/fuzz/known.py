"""Failures that are known and being mended: a pattern of the failure's line, and what it waits for."""

from __future__ import annotations

KNOWN: tuple[tuple[str, str], ...] = (
    (r"RecursionError: .*decoding a JSON", "JSON nested too deep is refused by the file's name"),
    (r"Overdue: .*a pipe", "only regular files are read"),
    (r"MemoryError: .*a link to a device", "only regular files are read"),
    (r"died of signal 6 \[.*tokenizer\.json", "ids of a tokenizer are bounded before the library sees them"),
    (r"\[(Pyramid|load|init|Fuzzy)\(", "arguments beside the options are checked in kind"),
    (r"Exceeds the limit .* digits\) .*\[generate\(list", "a prompt's token of many digits is not printed"),
)
