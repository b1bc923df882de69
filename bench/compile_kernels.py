"""Compile every kernel ahead of time, for GPUs that need not be there, and hold its machine code to a gate.

    python -m bench.compile_kernels --arch sm_90 [--arch sm_89 ...] [--op attention] [--update]

Every kernel goes through its real `plan` and Triton's own warmup, in every shipped configuration, at the shapes
of the three Llamas: what is looked at is what a launch would run. Printed per kernel: the gate's figures. They
are compared with bench/results/kernels_manifest.json; exit status 1 where the gate fails or a figure differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compile_gate import Figures, Needs, compare, figures, gate

if TYPE_CHECKING:
    import torch

    from pyramid_rt.kernels.common import Launch

MANIFEST = Path(__file__).parent / "results" / "kernels_manifest.json"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
DTYPES = ("bfloat16", "float16", "float32")
# One binary must serve them all.
LENGTHS = (1, 2, 7, 16, 64)
MAX_SEQ = 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama that kernels depend on."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = (
    Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256),
    Shape("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128, 128256),
    Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One binary of an op: its name within the op, the launch, and what the gate asks of it."""

    name: str
    launch: Launch
    needs: Needs


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory: warmup looks at type and alignment only."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


def attention_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """Chain and tree mask."""
    import torch

    from pyramid_rt.kernels import attention
    from pyramid_rt.kernels.attention_configs import config_for

    config = config_for(dtype, shape.head_dim, arch)
    space = attention.workspace(
        length=64,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        kv_bound=MAX_SEQ,
        splits=config.splits,
        device=torch.device("meta"),
    )
    cache = _empty(shape.kv_heads, MAX_SEQ + 64, shape.head_dim, dtype=dtype)
    wide = dtype != torch.float32
    for name, ancestors in (("chain", None), ("tree", _empty(64, dtype=torch.int64))):
        launch = attention.plan(
            _empty(64, shape.heads, shape.head_dim, dtype=dtype),
            cache,
            cache,
            _empty(1, dtype=torch.int64),
            _empty(64, shape.heads * shape.head_dim, dtype=dtype),
            space,
            length=length,
            kv_bound=MAX_SEQ,
            config=config,
            ancestors=ancestors,
        )
        yield Variant(name, launch, Needs(tensor_core=wide, arrival=True, streams=wide))


def compact_variants(shape: Shape, dtype: torch.dtype, arch: int, length: int) -> Iterator[Variant]:
    """The tier that moves the token buffer, and the others."""
    import torch

    from pyramid_rt.kernels import compact

    cache = _empty(shape.layers, 2, shape.kv_heads, MAX_SEQ + 64, shape.head_dim, dtype=dtype)
    scalar = _empty(1, dtype=torch.int64)
    for name, tokens in (("tokens", _empty(MAX_SEQ + 64, dtype=torch.int64)), ("cache", None)):
        yield Variant(
            name, compact.plan(cache, tokens, scalar, _empty(64, dtype=torch.int64), scalar), Needs()
        )


# An op joins with one line: how to plan it for a model's shape, dtype, architecture and T.
OPS: dict[str, Callable[[Shape, Any, int, int], Iterator[Variant]]] = {
    "attention": attention_variants,
    "compact": compact_variants,
}


class StubDriver:
    """What Triton asks of a driver before it compiles, answered without a GPU."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker compiles at a time."""

    arch: int
    op: str
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """One binary, looked at."""

    key: str
    figures: Figures
    wrong: list[str]


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _examine(binary: Any, arch: int) -> Figures:
    """Machine code of a compiled kernel, and what ptxas says when it assembles the same text again."""
    from triton.backends.nvidia.compiler import get_ptxas

    metadata = binary.metadata
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(binary.asm["cubin"])
        ptx.write_text(binary.asm["ptx"], encoding="utf-8")
        target = next(line for line in binary.asm["ptx"].splitlines() if line.startswith(".target"))
        name = target.split()[1].rstrip(",")
        fusion = [] if metadata.enable_fp_fusion else ["--fmad=false"]
        command = [
            get_ptxas(arch).path,
            "-v",
            *fusion,
            f"--gpu-name={name}",
            str(ptx),
            "-o",
            f"{folder}/again",
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
        sass = subprocess.run(
            [_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
        )
        resources = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        )
    return figures(
        sass.stdout,
        resources.stdout,
        log.stdout + log.stderr,
        arch=arch,
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
    )


def compile_job(job: Job) -> list[Compiled]:
    """Runs in a worker: every variant of one op at one shape and dtype."""
    import torch
    from triton.runtime import driver

    driver.set_active(StubDriver(job.arch))
    dtype = getattr(torch, job.dtype)
    result = []
    lengths = {n: list(OPS[job.op](job.shape, dtype, job.arch, n)) for n in LENGTHS}
    for index, variant in enumerate(lengths[LENGTHS[0]]):
        key = f"{job.op}/{job.shape.name}/{job.dtype}/{variant.name}"
        binaries = [lengths[n][index].launch.warmup() for n in LENGTHS]
        found = _examine(binaries[0], job.arch)
        wrong = gate(found, variant.needs, job.arch)
        if len({binary.hash for binary in binaries}) != 1:
            wrong.append(f"T in {LENGTHS} does not share one binary")
        result.append(Compiled(key, found, wrong))
    return result


def print_table(arch: str, compiled: list[Compiled]) -> None:
    """One line a kernel."""
    width = max(len(c.key) for c in compiled)
    head = "regs spill stack shared  wide in-flight LDL/STL barrier C75xx  instr tensor core"
    print(f"\n{arch}\n{'kernel':{width}} {head}")
    for c in compiled:
        f = c.figures
        barrier = ("yes" if f.barrier_before_arrival else "NO") if f.arrivals else "-"
        print(
            f"{c.key:{width}} {f.registers:4} {f.spill_bytes:5} {f.stack:5} {f.shared:6} {f.wide_share:5.1%} "
            f"{f.bytes_in_flight:9} {f.local_accesses:7} {barrier:>7} {f.warnings:5} {f.instructions:6} "
            f"{f.tensor_core or '-'}"
        )
        for line in c.wrong:
            print(f"{'':{width}} FAILS: {line}")


def check_manifest(
    manifest: dict[str, Any], version: str, arch: str, compiled: list[Compiled], *, whole: bool
) -> bool:
    """Print the differences from the manifest; whether there are none."""
    try:
        lines = compare(manifest, version, arch, {c.key: c.figures.json() for c in compiled}, whole=whole)
    except KeyError:
        print(f"Triton {version} for {arch} is not in the manifest: nothing to compare with")
        return True
    for line in lines:
        print(f"differs from the manifest: {line}")
    return not lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="default: all")
    parser.add_argument("--shape", action="append", choices=[s.name for s in SHAPES], help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    parser.add_argument("--update", action="store_true", help="write what was found into the manifest")
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """The command line; returns the exit status."""
    options = _arguments()
    # The interpreter would take the place of the compiler; workers start after this, and import after it.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    manifest = json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}
    jobs = [
        Job(int(arch.removeprefix("sm_")), op, shape, dtype)
        for arch in options.arch or ARCHITECTURES
        for op in options.op or OPS
        for shape in SHAPES
        if not options.shape or shape.name in options.shape
        for dtype in options.dtype or DTYPES
    ]
    whole = not (options.op or options.shape or options.dtype)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        results = list(pool.map(compile_job, jobs))
    passed = True
    print(f"Triton {triton.__version__}")
    for arch in dict.fromkeys(job.arch for job in jobs):
        compiled = [c for job, part in zip(jobs, results, strict=True) if job.arch == arch for c in part]
        print_table(f"sm_{arch}", compiled)
        passed &= not any(c.wrong for c in compiled)
        if options.update:
            kept = manifest.setdefault(triton.__version__, {})
            old = {} if whole else kept.get(f"sm_{arch}", {})
            kept[f"sm_{arch}"] = old | {c.key: c.figures.json() for c in compiled}
        else:
            passed &= check_manifest(manifest, triton.__version__, f"sm_{arch}", compiled, whole=whole)
    if options.update:
        MANIFEST.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("\npassed" if passed else "\nFAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
