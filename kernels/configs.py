"""Frozen launch configurations of the projection kernels, per architecture.

Nothing is tuned while decoding: an autotuner inside a graph capture breaks the capture, and two machines would
add in different orders. BLOCK_K and the splits fix the order of additions along K, so they depend on the op,
the matrix shape, the type and the architecture, never on the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

Op = Literal["qkv", "project", "gate_up", "head"]
ARCHITECTURES = (80, 89, 90, 100, 120)


@dataclass(frozen=True, slots=True)
class ProjectionConfig:
    """Cut and compilation of one product; `dataclasses.replace` gives a neighbour to try.

    Attributes:
        block_n: weight rows of a program, a power of two; at least 64 where sums of squares are made.
        block_k: step along K, a power of two.
        splits: programs that share one tile's K.
        sub_tiles: 16-column tiles a program takes together for a window of more than 16 rows: 4, or 1 where
            64 columns do not fit the registers; the rest of the window is then other programs' work.
        num_warps, narrow_stages, wide_stages: warps, and pipeline depth up to 16 rows and above.
    """

    block_n: int
    block_k: int
    splits: int
    sub_tiles: int
    num_warps: int
    narrow_stages: int
    wide_stages: int

    def __post_init__(self) -> None:
        for name in ("block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} is {value}, expected a power of two")
        for name in ("splits", "narrow_stages", "wide_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.block_n < 16 or self.block_k < 16:
            raise ValueError(f"block_n, block_k are {self.block_n}, {self.block_k}, expected at least 16")
        if self.sub_tiles not in (1, 4):
            raise ValueError(f"sub_tiles is {self.sub_tiles}, expected 1 or 4")


@dataclass(frozen=True, slots=True)
class _Machine:
    """Facts of an architecture that the choice of its configurations rests on.

    Attributes:
        programs: programs that should be in flight together, one per multiprocessor: a pipeline of four steps of 16
            KB keeps it busy, and on an H200 more splits than that cost more in partial sums than they gain.
        sub_tiles: see `ProjectionConfig`.
        step: bytes of a weight row per step.
        narrow_stages, wide_stages: see `ProjectionConfig`.
    """

    programs: int
    sub_tiles: int
    step: int
    narrow_stages: int
    wide_stages: int


# Fixed per architecture and not per device: two cards of one architecture give the same bits.
_MACHINES = {
    80: _Machine(108, 4, 128, 5, 4),
    89: _Machine(128, 4, 128, 4, 3),
    90: _Machine(132, 4, 256, 4, 3),
    100: _Machine(148, 4, 256, 4, 3),
    120: _Machine(170, 4, 128, 4, 3),
}
# Op, N, K; block_k, splits, narrow and wide stages.
_TUNED_ON_H200: tuple[tuple[Op, int, int, int, int, int, int], ...] = (
    ("project", 4096, 14336, 128, 4, 4, 3),
    ("project", 4096, 4096, 128, 2, 5, 4),
    ("project", 3072, 3072, 128, 2, 6, 6),
    ("qkv", 3072, 2048, 64, 2, 10, 8),
)
# Measured choices: (op, arch, N, K, dtype) of one matrix product -> its configuration, in place of the rule below.
# What belongs here is what bench.kernel_tuner found faster than the rule on that architecture. An entry with
# another block_k or other splits changes the order of additions, so it changes the bits, for every T alike.
# These were found on an H200: down of the 8B gains 8% at T = 64 from more splits than the rule gives, out of the 3B
# and qkv of the 1B 10% from fewer, at no cost at T = 1; deeper pipelines then give out of the 8B 2% (T = 64: 8%), out
# of the 3B 5% (10%) and qkv of the 1B, in steps of 64, 5%.
TUNED: Mapping[tuple[Op, int, int, int, torch.dtype], ProjectionConfig] = MappingProxyType(
    {
        (op, 90, rows, width, dtype): ProjectionConfig(64, step, splits, 4, 4, narrow, wide)
        for dtype in (torch.bfloat16, torch.float16)
        for op, rows, width, step, splits, narrow, wide in _TUNED_ON_H200
    }
)
# No split leaves a program with fewer bytes of each weight row than this: its pipeline would never fill.
_LEAST_BYTES = 1024
_MOST_SPLITS = 8


def architecture(device: torch.device) -> int:
    """The architecture whose configurations a device uses: its own, or the nearest below it.

    Without a GPU, that of sm_80; the interpreter does not care.

    Raises:
        ValueError: the device is older than sm_80.
    """
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in ARCHITECTURES if arch <= major * 10 + minor]
    if not known:
        raise ValueError(f"device {device} is sm_{major}{minor}, expected sm_80 or newer")
    return known[-1]


def projection_config(op: Op, arch: int, rows: int, width: int, dtype: torch.dtype) -> ProjectionConfig:
    """The configuration of a product with a weight matrix [rows, width]: `TUNED`'s, or the architecture's rule.

    Args:
        op: which kernel.
        arch: one of `ARCHITECTURES`.
        rows: N. width: K.
        dtype: of the weights.

    Raises:
        ValueError: an architecture without configurations.
    """
    if arch not in _MACHINES:
        raise ValueError(f"arch is {arch}, expected one of {', '.join(map(str, ARCHITECTURES))}")
    tuned = TUNED.get((op, arch, rows, width, dtype))
    if tuned is not None:
        return tuned
    machine = _MACHINES[arch]
    block_n, block_k = 64, machine.step // dtype.itemsize
    steps, programs = -(-width // block_k), -(-rows // block_n)
    splits = 1
    # A grid of three quarters of the wanted programs is left as it is: doubling it would cost more in partial
    # sums than the idle quarter does.
    while (
        op != "head"
        and splits < _MOST_SPLITS
        and 4 * programs * splits < 3 * machine.programs
        and steps * machine.step >= 2 * splits * _LEAST_BYTES
    ):
        splits *= 2
    # Without tensor cores a product keeps its operands in registers too, where 64 columns do not fit.
    sub_tiles = 1 if dtype == torch.float32 else machine.sub_tiles
    narrow_stages, wide_stages = machine.narrow_stages, machine.wide_stages
    if op == "head" and arch in (100, 120):
        # The noise of its epilogue takes the registers that more columns and another stage's addresses would need.
        sub_tiles, narrow_stages, wide_stages = 1, 2, 2
    # Four warps spill where a residual is added too: on sm_100, where qkv needs eight as well, and of float32 with
    # steps of 64 entries.
    residual = op == "project" and (arch == 100 or (dtype == torch.float32 and block_k > 32))
    num_warps = 8 if residual or (op == "qkv" and arch == 100) else 4
    return ProjectionConfig(block_n, block_k, splits, sub_tiles, num_warps, narrow_stages, wide_stages)
