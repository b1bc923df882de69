"""A call as it runs without a profile, graphs and all, and its tree of spans with the device's own times in it.

The tree comes from the same call run launch by launch, which has the same launches in the same order, and tells which
passes were skipped; the times come from the device's records of the call itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyramid_rt.decoding.engine import Engine
from pyramid_rt.decoding.place import inside
from pyramid_rt.profiling.records import Attributed, Expected, KernelRecord, MatchError, match
from pyramid_rt.profiling.spans import REST_NAMES, Span, with_rests


class MarkedEngine(Engine):
    """An engine that runs as ever, graphs and all, and puts a mark before each of its works."""

    def _allocate(self, *arguments: Any) -> None:
        super()._allocate(*arguments)
        # Triton, which the kernels need, is not everywhere.
        from pyramid_rt.kernels import marks

        self._mark = marks.plan(torch.zeros(1, dtype=torch.int64, device=self.place.device))

    @inside
    def fill(self, level: int, begin: int, end: int) -> None:
        """See `Engine`."""
        self._mark.run()
        super().fill(level, begin, end)

    @inside
    def fill_chunk(self, level: int, begin: int) -> int:
        """See `Engine`."""
        self._mark.run()
        return super().fill_chunk(level, begin)

    @inside
    def first_token(self, begin: int, end: int) -> None:
        """See `Engine`."""
        self._mark.run()
        super().first_token(begin, end)

    @inside
    def launch(self, known_end: int) -> None:
        """See `Engine`."""
        self._mark.run()
        super().launch(known_end)


def retimed(root: Span, recorded: Sequence[Sequence[KernelRecord]]) -> Span:
    """The tree of a call with the times that a device recorded of the same call.

    Args:
        root: the call, its ops with the name of their `kernel`.
        recorded: for each part of the prompt and each round, its records.

    Raises:
        MatchError: the records are not those of the tree's launches.
    """
    parts = [child for child in root.children if child.kind in ("prefill", "round")]
    if len(parts) != len(recorded):
        raise MatchError(
            f"{len(recorded)} works were recorded and the call has {len(parts)}: they cannot be told apart"
        )
    zero = min((record.begin for records in recorded for record in records), default=0.0)
    moved = [
        [replace(record, begin=record.begin - zero, end=record.end - zero) for record in records]
        for records in recorded
    ]
    children = [_part(part, records) for part, records in zip(parts, moved, strict=True)]
    end = max((child.end for child in children), default=0.0)
    made = with_rests(Span(root.kind, root.name, root.tier, 0.0, end, dict(root.args), children))
    for child in made.children:
        if child.kind == "rest":
            child.name = "idle"  # on the device, whatever the host does
    return made


def _part(part: Span, records: Sequence[KernelRecord]) -> Span:
    ops = [span for span in part.walk() if span.kind == "op"]
    if not ops:
        return _unlisted(part, records)
    expected = [Expected(part.name, op.tier, 0, None, op.name, op.args["kernel"]) for op in ops]
    kernels = {launch.kernel for launch in expected}
    # What else is on the stream: copies of a number to the device, and of the report to the host.
    own = [record for record in records if any(kernel in record.name for kernel in kernels)]
    found = iter(match(expected, own, [not op.args.get("skipped") for op in ops]))
    return _placed(part, found)


def _placed(span: Span, found: Iterator[Attributed]) -> Span:
    """A span and everything in it, its ops where their records are, in order."""
    made = Span(span.kind, span.name, span.tier, 0.0, 0.0, dict(span.args))
    if span.kind == "op":
        record = next(found).record
        made.begin, made.end = record.begin, record.end
        return made
    made.children = [_placed(child, found) for child in span.children if child.kind != "rest"]
    _enclose(made)
    return with_rests(made) if made.kind in REST_NAMES else made


def _enclose(span: Span) -> None:
    """A span from its first child's begin to the last one's end; a child begins no earlier than another ends."""
    for before, child in zip(span.children, span.children[1:], strict=False):
        child.begin = max(child.begin, before.end)
        child.end = max(child.end, child.begin)
    span.begin, span.end = span.children[0].begin, span.children[-1].end


def _unlisted(part: Span, records: Sequence[KernelRecord]) -> Span:
    """A part of the prompt that goes through a library, whose kernels no list has: they are the ops of its pass."""
    if not records:
        raise MatchError(f"no kernel was recorded in the {part.name}")
    forward = next(span for span in part.walk() if span.kind == "forward")
    made = replace(forward, args=dict(forward.args), children=[])
    for record in sorted(records, key=lambda record: (record.begin, record.end)):
        op = Span(
            "op", library_kernel(record.name), part.tier, record.begin, record.end, {"kernel": record.name}
        )
        made.children.append(op)
    _enclose(made)
    return replace(part, begin=made.begin, end=made.end, args=dict(part.args), children=[made])


def library_kernel(name: str) -> str:
    """A library's kernel in a word: without its return type, namespaces, template arguments and parameters.

    >>> library_kernel("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>(int, float*)")
    'vectorized_elementwise_kernel'
    """
    bare = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    plain = re.split(r"[<(]", bare, maxsplit=1)[0]
    return plain.rsplit("::", maxsplit=1)[-1].strip() or name
