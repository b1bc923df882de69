"""The gate over a kernel's machine code, and the figures it reads from ptxas, cuobjdump and nvdisasm.

Text in, figures out: nothing here compiles or imports Triton, so the parsers are tested on samples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# Per architecture: shared memory a program may take, that of an SM, warps an SM holds, and SMs of the card meant.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SHARED_SM = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
WARPS_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
# What nvdisasm calls the tensor core instruction of a 16-bit product where that is not HMMA, seen with Triton
# 3.6.0 and 3.9.0.
TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}
MIN_WIDE_SHARE = 0.95
# Bytes per SM that loads must keep on their way: 32 KB where HBM feeds an SM with 19 (A100) to 54 GB/s, half of it
# on the GDDR cards of sm_86, 89 and 120, whose SMs get 8 to 11.
MIN_IN_FLIGHT = {80: 32768, 86: 16384, 89: 16384, 90: 32768, 100: 32768, 120: 16384}

_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L\w+)\)")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)")
_EXIT = re.compile(r"/\*[0-9a-f]{4,}\*/\s+EXIT\b")
_LOADS = ("LDG", "LDGSTS")
_ARRIVALS = ("ATOMG", "ATOM", "RED", "REDG")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of machine code: `LDG` and `.E.128` for `LDG.E.128`."""

    name: str
    suffix: str
    line: int

    def load_bytes(self) -> int:
        """Bytes a thread loads with it."""
        for suffix, size in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
            if self.suffix.endswith(suffix) or f"{suffix}." in self.suffix:
                return size
        return 4


@dataclass(frozen=True, slots=True)
class Needs:
    """Demands of the gate on one kernel, beyond the general ones.

    Attributes:
        tensor_core: products must run on the architecture's widest tensor core instruction.
        arrival: the program announces its partials by an atomic, after a barrier.
        streams: it is meant to fill the memory pipe.
        normalises: it adds up a row's partial sums of squares, each time in one layout. How it finds the rows,
            "window" or "gather": kernels of a model with the same word must agree in the layout. Those with
            different words need not: a gather's addresses are not contiguous, so its blocks lie otherwise, but
            one norm is always one kernel's work, for every T.
    """

    tensor_core: bool = False
    arrival: bool = False
    streams: bool = False
    normalises: Literal["", "window", "gather"] = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """The manifest's entry of a kernel."""

    registers: int
    spill_bytes: int
    stack: int
    shared: int
    local_accesses: int  # LDL and STL
    wide_share: float  # of the bytes loaded inside streaming loops, those by 16-byte loads
    bytes_in_flight: int  # per SM, an estimate for the asynchronous loop with the fewest
    tensor_core: str  # the instruction found, "" without one
    arrivals: int  # atomics on global memory
    barrier_before_arrival: bool
    warnings: int  # C75xx of ptxas
    instructions: int
    row_sums: str  # the layouts in which float32 rows are added up, " | " between unequal ones, "" without


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of `nvdisasm -c` in order."""
    found = []
    for number, line in enumerate(text.splitlines()):
        match = _OPCODE.search(line)
        if match:
            found.append(Instruction(match[1], match[2], number))
    return found


def loops(text: str) -> list[tuple[int, int]]:
    """Line ranges (label, branch back to it) of the loops in `nvdisasm -c`.

    A branch to itself is none, nor is one back over an unconditional EXIT: that leaves a block which the
    assembler put out of the way, the rare part of a wait.
    """
    labels: dict[str, int] = {}
    found: dict[int, int] = {}
    exit_at = -1
    for number, line in enumerate(text.splitlines()):
        label = _LABEL.match(line.strip())
        if label:
            labels[label[1]] = number
            continue
        if _EXIT.search(line):
            exit_at = number
        branch = _BRANCH.search(line)
        if branch and branch[1] in labels:
            target = labels[branch[1]]
            if number - target > 1 and target > exit_at:
                found[target] = number
    return sorted(found.items())


def loop_loads(text: str) -> list[tuple[int, int, bool]]:
    """Per loop that loads: bytes of one thread by 16-byte loads, by all loads, and whether they are async."""
    instructions = [i for i in parse_sass(text) if i.name in _LOADS]
    result = []
    for first, last in loops(text):
        inside = [i for i in instructions if first < i.line < last]
        if inside:
            wide = [i for i in inside if i.load_bytes() == 16]
            total = sum(i.load_bytes() for i in inside)
            result.append((16 * len(wide), total, any(i.name == "LDGSTS" for i in wide)))
    return result


def barrier_before_arrivals(instructions: list[Instruction]) -> bool:
    """True if a BAR.SYNC stands between each global atomic and the last global store before it."""
    barrier = True
    for instruction in instructions:
        if instruction.name == "STG":
            barrier = False
        elif instruction.name == "BAR" and instruction.suffix.startswith(".SYNC"):
            barrier = True
        elif instruction.name in _ARRIVALS and not barrier:
            return False
    return True


def tensor_core_name(instructions: list[Instruction]) -> str:
    """The most frequent matrix instruction with its shape, "" without one."""
    names: dict[str, int] = {}
    for i in instructions:
        if i.name in ("HGMMA", "UTCHMMA", "HMMA", "QGMMA", "IGMMA", "IMMA"):
            shape = i.suffix.split(".")[1] if i.suffix else ""
            key = f"{i.name}.{shape}" if shape else i.name
            names[key] = names.get(key, 0) + 1
    return max(sorted(names), key=lambda name: names[name], default="")


def parse_ptxas(log: str) -> tuple[int, int]:
    """Spilled bytes and C75xx warnings of `ptxas -v`."""
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return spills, len(re.findall(r"\bC75\d\d\b", log))


def parse_resources(text: str) -> tuple[int, int, int]:
    """Registers, stack and static shared memory of `cuobjdump --dump-resource-usage`."""
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if match is None:
        raise ValueError(f"no resource line in {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def programs_per_sm(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """The number of programs that one SM holds at a time."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // (per_warp * num_warps)
    by_shared = SHARED_SM[arch] // (shared + 1024)
    return max(1, min(by_registers, by_shared, WARPS_SM[arch] // num_warps))


def sum_layouts(ttgir: str) -> str:
    """Layouts over threads of the operands of sums along an axis, each different one once, " | " between.

    `16x32 [4,1] [4,8] [1,4] [0,1]` is a block of that shape: sizes per thread, threads per warp, warps and
    order. The layout decides the order of the additions.
    """
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = []
    for block, end in re.findall(r'"tt\.reduce"(.*?)\}\) : \(([^)]*)\)', ttgir, re.DOTALL):
        operand = re.match(r"tensor<(\d+(?:x\d+)*)xf32, (#\w+)>$", end)
        if operand is None or "arith.addf" not in block:
            continue
        layout = aliases[operand[2]]
        lists = re.findall(r"\[[^\]]*\]", layout) if layout.startswith("#ttg.blocked") else [layout]
        found.append(" ".join([operand[1], *(part.replace(" ", "") for part in lists)]))
    return " | ".join(sorted(set(found)))


def figures(
    sass: str,
    resources: str,
    ptxas_log: str,
    ttgir: str,
    *,
    arch: int,
    shared: int,
    num_warps: int,
    stages: tuple[int, ...],
    programs: int,
) -> Figures:
    """All figures of one kernel.

    Args:
        sass, resources, ptxas_log, ttgir: what nvdisasm, cuobjdump, ptxas and Triton wrote.
        arch: 10 * major + minor.
        shared: bytes of dynamic shared memory that the launch asks for.
        num_warps: of a program.
        stages: pipeline depths of its loops, ascending in the bytes that one step loads.
        programs: of the smallest grid it is launched with.
    """
    instructions = parse_sass(sass)
    registers, stack, _ = parse_resources(resources)
    spills, warnings = parse_ptxas(ptxas_log)
    loads = loop_loads(sass)
    # A pipelined kernel streams in its asynchronous loops; a fold of partials beside them reads row scalars.
    streams = sorted(load for load in loads if load[2]) or loads
    # Nested loops count their inner part twice, in numerator and denominator alike.
    total = sum(every for _, every, _ in streams)
    resident = min(programs_per_sm(arch, registers, shared, num_warps), programs / SMS[arch])
    # A loop per depth, or it is not known which is which: then the least counts.
    depths = stages if len(stages) == len(streams) else (min(stages),) * len(streams)
    flight = [
        wide * (max(depth - 1, 1) if is_async else 1)
        for (wide, _, is_async), depth in zip(streams, depths, strict=True)
    ]
    return Figures(
        registers=registers,
        spill_bytes=spills,
        stack=stack,
        shared=shared,
        local_accesses=sum(i.name in ("LDL", "STL") for i in instructions),
        wide_share=round(sum(wide for wide, _, _ in streams) / total, 3) if total else 1.0,
        bytes_in_flight=int(min(flight, default=0) * num_warps * 32 * resident),
        tensor_core=tensor_core_name(instructions),
        arrivals=sum(i.name in _ARRIVALS for i in instructions),
        barrier_before_arrival=barrier_before_arrivals(instructions),
        warnings=warnings,
        instructions=len(instructions),
        row_sums=sum_layouts(ttgir),
    )


def gate(found: Figures, needs: Needs, arch: int) -> list[str]:
    """Faults of a kernel, in words; nothing if it passes."""
    wrong = []
    if found.spill_bytes:
        wrong.append(f"{found.spill_bytes} bytes spilled")
    if found.stack:
        wrong.append(f"a stack frame of {found.stack} bytes")
    if found.local_accesses:
        wrong.append(f"{found.local_accesses} LDL/STL")
    if found.shared > SHARED_LIMIT[arch]:
        wrong.append(f"{found.shared} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
    if found.warnings:
        wrong.append(f"{found.warnings} C75xx warnings of ptxas")
    if needs.streams and found.wide_share < MIN_WIDE_SHARE:
        wrong.append(f"{found.wide_share:.1%} of loop bytes by 16-byte loads, at least {MIN_WIDE_SHARE:.0%}")
    if needs.streams and found.bytes_in_flight < MIN_IN_FLIGHT[arch]:
        wrong.append(f"{found.bytes_in_flight} bytes in flight per SM, at least {MIN_IN_FLIGHT[arch]}")
    expected = TENSOR_CORE.get(arch, "HMMA")
    if needs.tensor_core and not found.tensor_core.startswith(expected):
        wrong.append(f"tensor core instruction {found.tensor_core or 'none'}, expected {expected}")
    if needs.arrival and not found.arrivals:
        wrong.append("no arrival atomic found")
    if needs.arrival and not found.barrier_before_arrival:
        wrong.append("no BAR.SYNC between the last partial store and the arrival atomic")
    if needs.normalises and (not found.row_sums or "|" in found.row_sums):
        wrong.append(f"sums of squares are added in the layouts {found.row_sums or 'none'}, expected one")
    return wrong
