"""Launches on the machine: its C core, the buffers that a launch may touch, faults in words, counters."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from ptx import isa
from ptx.parser import INSTRUCTION, SHARED_BASE, Program

CORE = Path(__file__).parent / "core"
FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-std=gnu11", "-Wall")
COMPILER = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)
MISSING = "no C compiler: the PTX machine cannot be built"

AT_ONCE, LATE, BY_SEED = 0, 1, 2


@dataclass(frozen=True)
class Schedule:
    """One way for a launch to go, all of it decided by the seed.

    Attributes:
        seed: of all choices; 0 runs blocks and warps in order.
        copies: when data of cp.async arrives: `AT_ONCE`, `LATE` (when waited for) or `BY_SEED`.
        products: likewise for results of wgmma.
        late_stores: other blocks see global stores only after a release, or when the launch has ended.
        detect: look for races.
        resident: blocks that run at a time.
        quantum: most instructions of a warp before another takes its turn; 0 lets it run up to a barrier.
        budget: instructions before a launch counts as endless.
    """

    seed: int = 0
    copies: int = LATE
    products: int = LATE
    late_stores: bool = True
    detect: bool = True
    resident: int = 4
    quantum: int = 0
    budget: int = 2_000_000_000

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        """Adversarial: everything differs from seed to seed, and a third of them deliver late."""
        return cls(
            seed=seed,
            copies=LATE if seed % 3 == 1 else BY_SEED,
            products=LATE if seed % 3 == 1 else BY_SEED,
            late_stores=seed % 4 != 3,
            resident=1 + seed % 7,
            quantum=(1, 7, 50, 400, 0)[seed % 5],
        )


@dataclass
class Counts:
    """Counts of a launch.

    Attributes:
        instructions, thread_instructions: of warps and of their lanes at work.
        barriers: times a warp came to one.
        loaded, stored: bytes of global memory, by the bytes of an access.
        load_sectors, store_sectors: of 32 bytes, per instruction of a warp.
        conflicts: turns that accesses to shared memory took beyond one per 128 bytes.
        traffic: bytes (loaded from, stored to) each buffer; where different ones overlap, the first has them.
    """

    instructions: int = 0
    thread_instructions: int = 0
    barriers: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    conflicts: int = 0
    loaded: dict[int, int] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)


class Fault(AssertionError):
    """An act that a kernel may not commit, with its instruction, block, warp, lane and address.

    Attributes:
        kind: one of `isa.FAULTS`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("region", ctypes.c_int32),
        ("pad", ctypes.c_int32),
    ]


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Launch(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "code lists constants params buffers regions"),
        *_fields(ctypes.c_int32, "ncode nunits npreds nconstants nbuffers nregions warps shared"),
        ("grid", ctypes.c_int32 * 3),
        ("seed", ctypes.c_uint32),
        *_fields(ctypes.c_int32, "copies products late_stores detect resident quantum"),
        ("budget", ctypes.c_int64),
        *_fields(ctypes.c_int32, "fault pc other_pc warp other_warp lane other_lane"),
        ("block", ctypes.c_int32 * 3),
        ("other_block", ctypes.c_int32 * 3),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_int64),
        *_fields(
            ctypes.c_uint64, "instructions thread_instructions barriers load_sectors store_sectors conflicts"
        ),
        ("loaded", ctypes.c_uint64 * 17),
        ("stored", ctypes.c_uint64 * 17),
        ("traffic", ctypes.c_void_p),
    ]


def _processor() -> str:
    """Words that tell processors apart whose instructions differ: the core is built for the one at hand."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


@cache
def core() -> ctypes.CDLL:
    """The C core, built once for its source and the processor, and kept among the temporary files."""
    if COMPILER is None:
        raise RuntimeError(MISSING)
    header = isa.header()
    sources = sorted(CORE.iterdir())
    text = "".join(
        [_processor(), header, *FLAGS, *(source.read_text(encoding="utf-8") for source in sources)]
    )
    folder = Path(tempfile.gettempdir(), f"pyramid-ptx-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    library = folder / "machine.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:
            Path(build, "ops.h").write_text(header, encoding="utf-8")
            built = Path(build, "machine.so")
            arguments = [COMPILER, *FLAGS, f"-I{build}", str(CORE / "machine.c"), "-o", str(built), "-lm"]
            subprocess.run(arguments, check=True)
            built.replace(library)
    loaded = ctypes.CDLL(str(library))
    for which, (name, expected) in enumerate(
        [("Ins", INSTRUCTION.itemsize), ("Launch", ctypes.sizeof(_Launch))]
    ):
        if (found := loaded.sizes(which)) != expected:
            raise RuntimeError(f"{name} has {found} bytes in C, expected {expected}")
    return loaded


@dataclass(frozen=True)
class Memory:
    """A range of host memory that a launch may touch."""

    name: str
    start: int
    size: int


def run(
    program: Program,
    grid: Sequence[int],
    warps: int,
    shared: int,
    arguments: Sequence[int | bytes],
    memory: Sequence[Memory],
    schedule: Schedule | None = None,
) -> Counts:
    """Execute a launch.

    Args:
        program: the kernel.
        grid: blocks per axis.
        warps: of a block.
        shared: bytes of shared memory of a block.
        arguments: of the kernel, integers or the bytes of a number.
        memory: all it may touch.
        schedule: how it goes.

    Raises:
        Fault: the kernel did what it must not do.
    """
    schedule = schedule or Schedule()
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{program.name} takes {len(program.parameters)} arguments, found {len(arguments)}")
    if not 1 <= warps <= 16:
        raise ValueError(f"{program.name} has blocks of {warps} warps, expected 1 to 16")
    block = bytearray(sum(program.parameters[-1]) if program.parameters else 1)
    for argument, (offset, size) in zip(arguments, program.parameters, strict=True):
        bits = (
            argument
            if isinstance(argument, bytes)
            else (argument & (1 << 8 * size) - 1).to_bytes(size, "little")
        )
        block[offset : offset + size] = bits
    params = (ctypes.c_char * len(block)).from_buffer(block)
    # A tensor may be passed under several names: the last of them stands for its range.
    used = sorted({(m.start, m.size): m for m in memory if m.size}.values(), key=lambda m: m.start)
    buffers, regions = _tables(used)
    launch = _Launch(
        program.code.ctypes.data, program.lists.ctypes.data, program.constants.ctypes.data,
        ctypes.addressof(params), ctypes.addressof(buffers), regions.ctypes.data,
        len(program.code), program.units, program.predicates, len(program.constants), len(used), len(regions) // 2,
        warps, shared, (ctypes.c_int32 * 3)(*grid), schedule.seed, schedule.copies, schedule.products,
        schedule.late_stores, schedule.detect, schedule.resident, schedule.quantum, schedule.budget,
    )  # fmt: skip
    traffic = np.zeros((max(len(used), 1), 2), np.uint64)
    launch.traffic = traffic.ctypes.data
    if core().run_launch(ctypes.byref(launch)):
        raise _fault(program, launch, used)
    return Counts(
        **{name: getattr(launch, name) for name in list(Counts.__dataclass_fields__)[:6]},
        loaded={width: n for width, n in enumerate(launch.loaded) if n},
        stored={width: n for width, n in enumerate(launch.stored) if n},
        traffic={
            m.name: (int(row[0]), int(row[1]))
            for place, row in zip(used, traffic, strict=False)
            for m in memory
            if (m.start, m.size) == (place.start, place.size)
        },
    )


def _tables(memory: Sequence[Memory]) -> tuple[ctypes.Array[_Buffer], np.ndarray]:
    """Ranges for bounds, and what they merge to where they overlap: there one shadow serves them all."""
    regions: list[list[int]] = []
    buffers = (_Buffer * max(len(memory), 1))()
    for i, m in enumerate(memory):
        # Words of 4 bytes have one shadow each: ranges that share a word share it.
        if not regions or m.start // 4 * 4 >= -(-regions[-1][1] // 4) * 4:
            regions.append([m.start, m.start + m.size])
        regions[-1][1] = max(regions[-1][1], m.start + m.size)
        buffers[i] = _Buffer(m.start, m.start + m.size, len(regions) - 1)
    return buffers, np.array(regions or [[0, 0]], np.uint64).flatten()


_WORDS = {
    "unknown": "no such operation in the core",
    "bounds": "global access outside every buffer",
    "shared_bounds": "access outside shared memory",
    "alignment": "misaligned access",
    "uninitialised": "use of an uninitialised value",
    "in_flight": "access to a copy in flight",
    "shared_race": "race in shared memory",
    "global_race": "race in global memory",
    "lanes": "lanes missing where all must meet",
    "descriptor": "descriptor of an unknown layout",
    "endless": "no end within the budget",
}


def _fault(program: Program, launch: _Launch, memory: Sequence[Memory]) -> Fault:
    """The fault in words: both instructions of a race, lanes, addresses."""
    kind = isa.FAULTS[launch.fault]
    where = f"block {tuple(launch.block)} warp {launch.warp} lane {launch.lane}"
    lines = [f"{program.name}: {_WORDS[kind]}", f"  {where}: [{launch.pc}] {program.text[launch.pc]}"]
    if kind in ("in_flight", "shared_race", "global_race"):
        other = f"block {tuple(launch.other_block)} warp {launch.other_warp} lane {launch.other_lane}"
        lines.append(f"  {other}: [{launch.other_pc}] {program.text[launch.other_pc]}")
    if launch.address:
        shared = kind in ("in_flight", "shared_race", "shared_bounds")
        lines.append(f"  at {_place(launch.address, memory, shared=shared)}, {launch.size or 1} bytes")
    return Fault(kind, "\n".join(lines))


def _place(address: int, memory: Sequence[Memory], *, shared: bool) -> str:
    if shared:
        return f"shared memory + {address - SHARED_BASE}"
    for m in memory:
        if m.start <= address < m.start + m.size:
            return f"{m.name} + {address - m.start}"
    near = min(
        memory, key=lambda m: min(abs(address - m.start), abs(address - m.start - m.size)), default=None
    )
    return (
        f"{address:#x}"
        if near is None
        else f"{address:#x} ({near.name} {address - near.start:+} of {near.size})"
    )
