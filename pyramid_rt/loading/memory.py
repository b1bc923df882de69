"""The memory plan: what each tier will take, in bytes, before any of it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pyramid_rt.decoding.state import RoundPlan, State
from pyramid_rt.errors import MemoryPlanError
from pyramid_rt.models.backends.bulk import bulk_bytes
from pyramid_rt.models.backends.choice import workspace_bytes
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import cache_bytes, weight_bytes

MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes per tier, and of the round's own buffers (which belong to no single tier).

    Attributes:
        weights, caches, workspaces: bytes by name of tier; a workspace is what the tier's forwards compute in,
            none with the `torch` backend, which allocates as it goes.
        round_buffers: token buffer, the rows that rules compare, and what a chunk of a prompt is computed in.
        available: bytes free on the device when the plan was made; None where that is unknown.
    """

    weights: Mapping[str, int]
    caches: Mapping[str, int]
    workspaces: Mapping[str, int]
    round_buffers: int
    available: int | None

    @property
    def total(self) -> int:
        """Bytes of everything."""
        parts = (self.weights, self.caches, self.workspaces)
        return sum(sum(part.values()) for part in parts) + self.round_buffers

    def rows(self) -> list[tuple[str, int, int, int]]:
        """(tier, weights, cache, buffers) in bytes; the round's buffers stand with the last tier."""
        last = list(self.weights)[-1]
        return [
            (
                name,
                self.weights[name],
                self.caches[name],
                self.workspaces[name] + (self.round_buffers if name == last else 0),
            )
            for name in self.weights
        ]

    def check(self) -> None:
        """Raise MemoryPlanError, with the whole plan in it, where it does not fit."""
        if self.available is not None and self.total > self.available:
            short = f"{(self.total - self.available) / MIB:.0f} MiB short"
            raise self.error(f"{self.available / MIB:.0f} MiB are free, {short}")

    def error(self, found: str) -> MemoryPlanError:
        """An error that says what is needed, `found` (what there is), each tier's part, and what would help."""
        tiers = "; ".join(
            f"{name}: weights {weights / MIB:.0f} MiB, cache {cache / MIB:.0f} MiB, buffers {other / MIB:.0f} MiB"
            for name, weights, cache, other in self.rows()
        )
        return MemoryPlanError(
            f"the pyramid needs {self.total / MIB:.0f} MiB and {found} ({tiers}); "
            "a smaller dtype halves the weights and caches, a smaller max_seq shrinks the caches"
        )


def plan_memory(
    configs: Mapping[str, LlamaConfig],
    plan: RoundPlan,
    vocab_size: int,
    max_seq: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> MemoryPlan:
    """Plan tiers of these configs (by name, small to large) at `max_seq` positions.

    Raises:
        UnsupportedModelError: a shape that the backend does not take.
    """
    kernels = backend == "triton" and not plan.host_control
    buffers = (State.for_kernels if kernels else State.allocate)(
        plan, max_seq, vocab_size, torch.device("meta")
    )
    # One tier at a time processes a chunk of a prompt.
    chunk = max(bulk_bytes(config, dtype) for config in configs.values()) if backend == "triton" else 0
    return MemoryPlan(
        weights={name: weight_bytes(config, dtype) for name, config in configs.items()},
        caches={name: cache_bytes(config, max_seq, dtype) for name, config in configs.items()},
        workspaces={
            name: workspace_bytes(backend, config, max_seq, dtype, device) for name, config in configs.items()
        },
        round_buffers=buffers.nbytes() + chunk,
        available=_available(device),
    )


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        # What torch keeps of freed tensors is free to it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(kibibytes) * 1024 if kibibytes is not None else None
