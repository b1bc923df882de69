"""Streams of places that were closed are the next ones'."""

from __future__ import annotations

from pyramid_rt.decoding.place.streams import StreamPool


def test_a_stream_that_was_given_back_is_the_next_places() -> None:
    made: list[tuple[int, int]] = []

    def make(device: int) -> tuple[int, int]:
        made.append((device, len(made)))
        return made[-1]

    pool: StreamPool[tuple[int, int]] = StreamPool(make)
    first, second, other = pool.take(0), pool.take(0), pool.take(1)
    assert len({first, second, other}) == 3, "two places never share one"
    pool.give(0, first)
    pool.give(1, other)
    assert pool.take(0) == first
    assert pool.take(0) not in (first, second)
    assert pool.take(1) == other
    assert len(made) == 4
