"""Spans: nested stretches of time of one call, written down as marks of a clock and resolved when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Kind = Literal["call", "prefill", "round", "burst", "verify", "forward", "layer", "op", "rest"]


@dataclass(slots=True)
class Span:
    """A stretch of time.

    Attributes:
        kind: the level of the tree it belongs to; "rest" is what its parent did besides its other children.
        name: of this stretch, e.g. "verify of 'target'" or "gate_up".
        tier: the name of the tier it belongs to; None where that is none.
        begin, end: microseconds since the call's begin.
        args: sizes: tokens T, cache rows, bytes; `skipped` of a launch that returned at once.
        children: in time, none overlapping another, all inside it.
    """

    kind: Kind
    name: str
    tier: str | None
    begin: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)
    children: list[Span] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Microseconds."""
        return self.end - self.begin

    def walk(self) -> Iterator[Span]:
        """Itself and everything inside, parents first, in time."""
        yield self
        for child in self.children:
            yield from child.walk()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers."""
        content: dict[str, Any] = {"kind": self.kind, "name": self.name, "tier": self.tier}
        content |= {"begin": self.begin, "end": self.end, "args": dict(self.args)}
        return content | {"children": [child.to_dict() for child in self.children]}


class Clock(Protocol):
    """A source of marks in time, which become microseconds later."""

    def mark(self) -> Any:
        """Now, in the order of the work."""
        ...

    def microseconds(self, marks: Sequence[Any]) -> list[float]:
        """Marks as microseconds since the first of them; waits for the device."""
        ...


class HostClock:
    """Marks of the host's own clock: on a CPU an op is over when it returns."""

    def mark(self) -> int:
        """See `Clock`; nanoseconds."""
        return time.perf_counter_ns()

    def microseconds(self, marks: Sequence[int]) -> list[float]:
        """See `Clock`."""
        return [(mark - marks[0]) / 1000 for mark in marks]


class CudaClock:
    """CUDA events on the current stream: marks in the order of the device's own work.

    A mark lies where the device gets to it, so time that it waits for the host shows as a gap.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def microseconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """See `Clock`."""
        marks[-1].synchronize()
        return [1000.0 * marks[0].elapsed_time(mark) for mark in marks]


def clock_for(device: torch.device) -> Clock:
    """The clock of a device's work."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Ranges(Protocol):
    """Named ranges that another profiler shows: those of NVTX."""

    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...


class NvtxRanges:
    """NVTX ranges, for Nsight Systems; without CUDA in torch they cannot be made."""

    def push(self, name: str) -> None:
        """See `Ranges`."""
        torch.cuda.nvtx.range_push(name)

    def pop(self) -> None:
        """See `Ranges`."""
        torch.cuda.nvtx.range_pop()


@dataclass(slots=True)
class _Open:
    """A span on its way: marks instead of times."""

    kind: Kind
    name: str
    tier: str | None
    begin: int
    end: int
    args: dict[str, Any]
    children: list[_Open] = field(default_factory=list)
    layer: int | None = None


class Recorder:
    """Writes spans down while a call runs.

    Args:
        clock: of the marks.
        ranges: told of each span too, where given.
    """

    def __init__(self, clock: Clock, ranges: Ranges | None = None) -> None:
        self._clock, self._ranges = clock, ranges
        self._marks: list[Any] = []
        self._stack: list[_Open] = []
        self._root: _Open | None = None

    def open(self, kind: Kind, name: str, tier: str | None = None, **args: Any) -> None:
        """A span begins inside the one that is open."""
        if self.innermost == "forward":  # a pass holds ops alone: one that nobody ended is over
            self.close()
        if self._ranges is not None:
            self._ranges.push(name)
        span = _Open(kind, name, tier, self._mark(), -1, args)
        if self._stack:
            self._stack[-1].children.append(span)
        else:
            self._root = span
        self._stack.append(span)

    def close(self) -> None:
        """The innermost open span ends."""
        self._stack.pop().end = self._mark()
        if self._ranges is not None:
            self._ranges.pop()

    @contextmanager
    def span(self, kind: Kind, name: str, tier: str | None = None, **args: Any) -> Iterator[None]:
        """A span around what runs inside; what is still open there ends with it."""
        self.open(kind, name, tier, **args)
        depth = len(self._stack)
        try:
            yield
        finally:
            while len(self._stack) >= depth:
                self.close()

    def op(self, name: str, layer: int | None, args: dict[str, Any], work: Callable[[], R]) -> R:
        """Run an op of the open forward pass; `layer` is None for those outside of the layers."""
        if self._ranges is not None:
            self._ranges.push(name)
        tier = self._stack[-1].tier if self._stack else None
        begin = self._mark()
        result = work()
        span = _Open("op", name, tier, begin, self._mark(), args, layer=layer)
        if self._ranges is not None:
            self._ranges.pop()
        self._stack[-1].children.append(span)
        return result

    @property
    def innermost(self) -> Kind | None:
        """The kind of the span that is open."""
        return self._stack[-1].kind if self._stack else None

    def note(self, **args: Any) -> None:
        """Sizes of the span that is open, those it has not yet; a tensor is read when the call is over."""
        self._stack[-1].args = {**args, **self._stack[-1].args}

    def _mark(self) -> int:
        self._marks.append(self._clock.mark())
        return len(self._marks) - 1

    def finish(self) -> Span:
        """The tree of everything recorded, the rest of each parent's time labelled.

        Raises RuntimeError where nothing was recorded, or something is open still.
        """
        if self._root is None or self._stack:
            raise RuntimeError(f"{len(self._stack)} spans are open, expected a recording that is over")
        return _resolved(self._root, self._clock.microseconds(self._marks))


def _resolved(open_span: _Open, at: Sequence[float]) -> Span:
    """A span with times for marks, layers around their ops, and rests between children."""
    args = {name: _number(value) for name, value in open_span.args.items()}
    span = Span(open_span.kind, open_span.name, open_span.tier, at[open_span.begin], at[open_span.end], args)
    layer: Span | None = None
    for child in open_span.children:
        made = _resolved(child, at)
        if child.layer is None:
            layer = None
            span.children.append(made)
            continue
        if layer is None or layer.args["layer"] != child.layer:
            layer = Span(
                "layer", f"layer {child.layer}", span.tier, made.begin, made.end, {"layer": child.layer}
            )
            span.children.append(layer)
        layer.children.append(made)
        layer.end = made.end
    return with_rests(span) if span.kind in REST_NAMES else span


# What a span of each kind does besides its children. Forward passes and layers do nothing: there the time between
# ops is the recording's own, and the interpreter's, and a table sums it up.
REST_NAMES: dict[str, str] = {
    "call": "host",
    "prefill": "bookkeeping",
    "round": "bookkeeping",
    "burst": "draw",
    "verify": "decide",
}


BETWEEN_OPS = "between ops"


def with_rests(span: Span) -> Span:
    """A span of a kind that does something itself, with a rest among its children wherever there is none."""
    # Where a rule or a draw is an op like any other, what is left is the time between them.
    name = BETWEEN_OPS if any(child.kind == "op" for child in span.children) else REST_NAMES[span.kind]
    filled, at = [], span.begin
    for child in span.children:
        if child.begin > at:
            filled.append(Span("rest", name, span.tier, at, child.begin))
        filled.append(child)
        at = child.end
    if span.end > at:
        filled.append(Span("rest", name, span.tier, at, span.end))
    span.children = filled
    return span


def _number(value: Any) -> Any:
    """A tensor of one element as the number in it."""
    return value.item() if isinstance(value, Tensor) else value
