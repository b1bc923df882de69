"""Edits of PTX that make a compiled kernel wrong, each in the way that one line forgotten would."""

from __future__ import annotations

import re
from collections.abc import Callable

Edit = Callable[[str], str]
BARRIER = r"bar\.sync\s+0;"
# Comparisons of integers: what masks and loops are made of.
COMPARISON = r"\bsetp\.(lt|le|gt|ge)\.([su](?:32|64))\b"
NEIGHBOUR = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


def replaced(pattern: str, by: str, *, which: int | None = None) -> Edit:
    """An edit of every match, or of one; one that matches nothing is an error."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx, re.MULTILINE))
        assert found, pattern
        for match in reversed(found if which is None else [found[which]]):
            ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
        return ptx

    return edit


def around_arrivals(change: Callable[[str, str], tuple[str, str]]) -> Edit:
    """An edit of what lies between the last store and each arrival, and of what follows it up to the next."""

    def edit(ptx: str) -> str:
        parts = ptx.split("atom.global")
        assert len(parts) > 1
        for i in range(1, len(parts)):
            # The first arrival may have nothing to announce.
            at = max(parts[i - 1].rfind("st.global"), 0)
            before, parts[i] = change(parts[i - 1][at:], parts[i])
            parts[i - 1] = parts[i - 1][:at] + before
        return "atom.global".join(parts)

    return edit


# Triton 3.9 puts a barrier of its own there, so all of them go.
without_barriers_before_the_arrival = around_arrivals(
    lambda before, after: (re.sub(BARRIER, "", before), after)
)
# The reset is the first store after the arrival.
without_reset = around_arrivals(
    lambda before, after: (before, re.sub(r"^.*st\.global\.b32.*;", "", after, count=1, flags=re.MULTILINE))
)
relaxed_arrivals = replaced(r"gpu\.acq_rel", "gpu.relaxed")
arrivals_that_acquire_alone = replaced(r"gpu\.acq_rel", "gpu.acquire")
arrivals_that_release_alone = replaced(r"gpu\.acq_rel", "gpu.release")
every_block_the_first = replaced(r"mov\.u32\s+(%r\d+), %ctaid\.([xyz]);", r"mov.u32 \1, 0;")


def without_barrier(which: int) -> Edit:
    """One barrier less."""
    return replaced(BARRIER, "", which=which)


def off_by_one(which: int) -> Edit:
    """One comparison takes its border to the other side."""

    def edit(ptx: str) -> str:
        match = list(re.finditer(COMPARISON, ptx))[which]
        by = f"setp.{NEIGHBOUR[match[1]]}.{match[2]}"
        return ptx[: match.start()] + by + ptx[match.end() :]

    return edit
