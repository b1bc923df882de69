"""Columns of `State.counters`: what a round counts for each tier."""

from __future__ import annotations

# One row per tier. All but the last belong to the stage above the tier: tokens
# verified, those that stood, those of them that are not the verifying tier's own; verifies that let a whole
# proposal stand, that put a correction or bonus, and all of them. The last counts the tier's own forwards.
COUNTERS = ("proposed", "accepted", "differs", "whole", "replacements", "verifies", "forwards")
COLUMN = {name: index for index, name in enumerate(COUNTERS)}
