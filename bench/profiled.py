"""Profiles of what `bench.decode` measures, op by op, as rows for a file."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from pyramid_rt.profiling.profile import Profile
from pyramid_rt.profiling.spans import Span
from pyramid_rt.profiling.table import percentile
from pyramid_rt.pyramid import Pyramid

REPEATS = 3


def measure_profile(
    pyramid: Pyramid, prompt: Sequence[int] | str, options: dict[str, Any], say: Any = print
) -> dict[str, Any]:
    """One profile: ops by tier over all rounds, a line for each tier, and what being profiled cost.

    `unprofiled` and `profiled` are decoded tokens per second, without and with the device's profiler at work.
    """
    profile = pyramid.profile(prompt, **options)
    rates = []
    for _ in range(REPEATS):
        stats = pyramid.generate(prompt, **options, seed=profile.result.seed).stats
        rates.append(stats.decode_tokens_per_second or 0.0)
    rounds = [span for span in profile.spans.children if span.kind == "round"]
    say(profile)
    return {
        "machine": profile.machine,
        "method": profile.result.stats.method,
        "copy_gb_s": profile.bandwidth / 1e9,
        "rounds": len(rounds),
        "round_us": median(span.duration for span in rounds),
        "unprofiled": median(rates),
        "profiled": profile.result.stats.decode_tokens_per_second,
        "tiers": [line.to_dict() for line in profile.tier_lines],
        "ops": op_rows(profile, rounds),
        "notes": list(profile.notes),
    }


def op_rows(profile: Profile, rounds: Sequence[Span]) -> list[dict[str, Any]]:
    """Ops of all rounds by tier, name and whether they were skipped; microseconds, and bytes by formula."""
    found: dict[tuple[str | None, str, bool], list[Span]] = {}
    for span in rounds:
        for op in span.walk():
            if op.kind == "op":
                found.setdefault((op.tier, op.name, bool(op.args.get("skipped"))), []).append(op)
    whole = sum(span.duration for span in rounds)
    rows = []
    for (tier, name, skipped), ops in found.items():
        times = [op.duration for op in ops]
        moved = [op.args["bytes"] for op in ops if "bytes" in op.args]
        speed = sum(moved) * 1e6 / sum(times) if moved else None
        rows.append(
            {
                "tier": tier,
                "op": name,
                "skipped": skipped,
                "calls": len(ops),
                "us": median(times),
                "p10": percentile(times, 10),
                "p90": percentile(times, 90),
                "share": sum(times) / whole,
                "mb": median(moved) / 1e6 if moved else None,
                "gb_s": None if speed is None else speed / 1e9,
                "of_copy": None if speed is None else speed / profile.bandwidth,
            }
        )
    return rows
