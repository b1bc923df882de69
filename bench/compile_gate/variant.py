"""One variant of a kernel, as the gate compiles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.compile_gate.gate import Needs

if TYPE_CHECKING:
    from pyramid_rt.kernels.launch import Launch

# Positions of a cache.
MAX_SEQ = 8192


@dataclass(frozen=True, slots=True)
class Variant:
    """One binary of an op: its name within the op, the launch, and what the gate asks of it."""

    name: str
    launch: Launch
    needs: Needs
