"""Compile every kernel ahead of time, for GPUs that need not be there, and hold its machine code to a gate.

    python -m bench.compile_gate --arch sm_90 [--arch sm_89 ...] [--op attention] [--update]

Every kernel goes through its real `plan` and Triton's own warmup, in every shipped configuration, at the shapes
of the three Llamas: what is looked at is what a launch would run. Printed per kernel: the gate's figures. They
are compared with bench/results/kernels_manifest.json; exit status 1 where the gate fails or a figure differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compile_gate.gate import Figures, Needs, figures, gate
from bench.compile_gate.manifest import Kernel, Manifest, compare, load, save
from bench.compile_gate.variants import LENGTHS, OPS
from pyramid_rt.models.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from pyramid_rt.kernels.launch import Launch

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
DTYPES = ("bfloat16", "float16", "float32")


class StubDriver:
    """The answers that Triton wants of a driver before it compiles, given without a GPU."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels per device number, and one worker may serve several architectures.
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Job:
    """One task of a worker: an op at all shapes, which often share a binary."""

    arch: int
    op: str
    dtype: str
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel, looked at."""

    kernel: Kernel
    binary: str
    figures: Figures
    needs: Needs
    wrong: list[str]


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _examine(binary: Any, log: str, launch: Launch, arch: int) -> Figures:
    """Machine code of a compiled kernel, and what ptxas said while Triton had it assembled."""
    if "bytes spill stores" not in log:
        raise RuntimeError(f"no log of ptxas for {launch.kernel}: a cache of Triton's served the kernel")
    metadata = binary.metadata
    stages = [launch.kwargs[key] for key in ("NARROW_STAGES", "WIDE_STAGES") if key in launch.kwargs]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        sass = _tool("nvdisasm", "-c", str(cubin))
        resources = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    return figures(
        sass,
        resources,
        log,
        binary.asm["ttgir"],
        arch=arch,
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        stages=tuple(stages) or (metadata.num_stages,),
        programs=math.prod(launch.grid),
    )


def compile_job(job: Job) -> list[Compiled]:
    """Runs in a worker: every variant of one op and dtype, each distinct binary looked at once."""
    import torch
    from triton import knobs
    from triton.runtime import driver

    driver.set_active(StubDriver(job.arch))
    knobs.nvidia.dump_ptxas_log = True
    dtype = getattr(torch, job.dtype)
    result: list[Compiled] = []
    logs: dict[str, str] = {}
    # The grid is part of what is looked at: it decides how many programs an SM gets.
    seen: dict[tuple[str, tuple[int, int, int]], Figures] = {}
    for shape in job.shapes:
        lengths = [list(OPS[job.op](shape, dtype, job.arch, length)) for length in LENGTHS]
        for index, variant in enumerate(lengths[0]):
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                binaries = [variants[index].launch.warmup() for variants in lengths]
            name, launch = binaries[0].hash, variant.launch
            logs.setdefault(name, log.getvalue())
            if (name, launch.grid) not in seen:
                seen[name, launch.grid] = _examine(binaries[0], logs[name], launch, job.arch)
            found = seen[name, launch.grid]
            wrong = gate(found, variant.needs, job.arch)
            if len({binary.hash for binary in binaries}) != 1:
                wrong.append(
                    f"T in {LENGTHS} does not share one binary, with a word to skip it by and without"
                )
            kernel = Kernel(job.op, job.dtype, variant.name, shape.name)
            result.append(Compiled(kernel, name, found, variant.needs, wrong))
    return result


def unequal_norms(compiled: list[Compiled]) -> list[str]:
    """Kernels of one model that should agree and add a row's sums of squares up in different layouts."""
    layouts: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for c in compiled:
        if c.needs.normalises:
            alike = layouts.setdefault((c.kernel.shape, c.kernel.dtype, c.needs.normalises), {})
            alike.setdefault(c.figures.row_sums, []).append(str(c.kernel))
    return [
        f"{' '.join(model)}: sums of squares are added in {len(found)} layouts: {found}"
        for model, found in layouts.items()
        if len(found) > 1
    ]


def print_table(arch: str, compiled: list[Compiled]) -> None:
    """One line a kernel."""
    width = max(len(str(c.kernel)) for c in compiled)
    head = "regs spill stack shared   wide in-flight LDL/STL barrier C75xx  instr tensor core"
    print(f"\n{arch}\n{'kernel':{width}} {head}")
    for c in sorted(compiled, key=lambda c: c.kernel):
        f = c.figures
        barrier = ("yes" if f.barrier_before_arrival else "NO") if f.arrivals else "-"
        print(
            f"{c.kernel!s:{width}} {f.registers:4} {f.spill_bytes:5} {f.stack:5} {f.shared:6} "
            f"{f.wide_share:6.1%} {f.bytes_in_flight:9} {f.local_accesses:7} {barrier:>7} {f.warnings:5} "
            f"{f.instructions:6} {f.tensor_core or '-'}"
        )
        for line in c.wrong:
            print(f"{'':{width}} FAILS: {line}")


def check_manifest(
    manifest: Manifest, version: str, arch: str, compiled: list[Compiled], *, whole: bool
) -> bool:
    """Print the differences from the manifest, dtype by dtype; whether there are none."""
    same = True
    for dtype in sorted({c.kernel.dtype for c in compiled}):
        found = {c.kernel: c.figures for c in compiled if c.kernel.dtype == dtype}
        kept = {k: f for k, f in manifest.get(version, {}).get(arch, {}).items() if k.dtype == dtype}
        if not kept:
            print(
                f"Triton {version} for {arch} in {dtype} is not in the manifest: gated, compared with nothing"
            )
            continue
        for line in compare(kept, found, whole=whole):
            print(f"differs from the manifest: {line}")
            same = False
    return same


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="default: all")
    parser.add_argument("--shape", action="append", choices=[s.name for s in SHAPES], help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    parser.add_argument("--update", action="store_true", help="write what was found into the manifest")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    return parser.parse_args()


def compile_all(jobs: list[Job], workers: int) -> list[list[Compiled]]:
    """All jobs in processes of their own, in a cache of Triton's that is new: every binary comes with its log."""
    # The interpreter would take the place of the compiler; workers start after this, and import after it.
    os.environ.pop("TRITON_INTERPRET", None)
    context = multiprocessing.get_context("spawn")
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for job, compiled in zip(jobs, pool.map(compile_job, jobs), strict=True):
                binaries = len({c.binary for c in compiled})
                print(
                    f"sm_{job.arch} {job.op} {job.dtype}: {len(compiled)} kernels in {binaries} binaries",
                    flush=True,
                )
                for c in compiled:
                    for line in c.wrong:
                        print(f"FAILS: {c.kernel}: {line}", flush=True)
                results.append(compiled)
    return results


def main() -> int:
    """The command line; returns the exit status."""
    options = _arguments()
    shapes = tuple(s for s in SHAPES if not options.shape or s.name in options.shape)
    jobs = [
        Job(int(arch.removeprefix("sm_")), op, dtype, shapes)
        for op in OPS
        if not options.op or op in options.op
        for arch in options.arch or ARCHITECTURES
        for dtype in options.dtype or DTYPES
    ]
    whole = not (options.op or options.shape or options.dtype)
    results = compile_all(jobs, options.workers)
    import triton

    manifest = load()
    passed = True
    print(f"Triton {triton.__version__}")
    for arch in sorted({job.arch for job in jobs}):
        compiled = [c for job, part in zip(jobs, results, strict=True) if job.arch == arch for c in part]
        print_table(f"sm_{arch}", compiled)
        passed &= not any(c.wrong for c in compiled)
        for line in unequal_norms(compiled):
            print(f"FAILS: {line}")
            passed = False
        if options.update:
            kept = manifest.setdefault(triton.__version__, {})
            old = {} if whole else kept.get(f"sm_{arch}", {})
            kept[f"sm_{arch}"] = old | {c.kernel: c.figures for c in compiled}
        else:
            passed &= check_manifest(manifest, triton.__version__, f"sm_{arch}", compiled, whole=whole)
    if options.update:
        save(manifest)
    print("\npassed" if passed else "\nFAILED")
    return 0 if passed else 1
