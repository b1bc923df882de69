"""Trace files as Chrome and Perfetto open them: nested complete events, in microseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyramid_rt.profiling.spans import Span

PROCESS = 1
_DECODING, _FIRST_TIER = 1, 2


def chrome_trace(root: Span, tiers: Sequence[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a trace file.

    One track has everything, nested; below it each tier has one with its bursts, verifies and prefills.

    Args:
        root: of the call.
        tiers: names, small to large.
        about: what was measured on what, shown as the trace's metadata.
    """
    tracks = {tier: _FIRST_TIER + place for place, tier in enumerate(reversed(tiers))}
    events = [
        _named("process_name", 0, f"pyramid_rt on {about.get('machine', 'this machine')}"),
        _named("thread_name", _DECODING, "everything"),
        *(_named("thread_name", track, tier) for tier, track in tracks.items()),
    ]
    events += _events(root, tracks)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(about)}


def _named(what: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": track, "args": {"name": name}}


def _events(root: Span, tracks: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    number = 0
    for span in root.walk():
        name = span.name
        if span.kind == "round":
            number += 1
            name = f"round {number}"
        elif span.kind == "forward":
            name = f"forward of {span.tier!r}"
        yield _event(span, name, _DECODING)
        track = tracks.get(span.tier or "")
        if span.kind in ("burst", "verify", "prefill") and track is not None:
            yield _event(span, name, track)


def _event(span: Span, name: str, track: int) -> dict[str, Any]:
    args = dict(span.args) if span.tier is None else {"tier": span.tier, **span.args}
    return {
        "ph": "X",
        "name": name,
        "cat": span.kind,
        "pid": PROCESS,
        "tid": track,
        "ts": span.begin,
        "dur": span.duration,
        "args": args,
    }
