"""A stand-in device: compiled kernels that are launched on CPU tensors go to the machine.

`install` makes Triton compile for a GPU that is not there, and every launch of a kernel run on the machine. The
schedule of the launches is `current`, and each launch's counters are handed to those who listen.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ptx import machine
from ptx.machine import Counts, Memory, Schedule
from ptx.parser import Program, parse

VARIABLE = "PYRAMID_PTX"
SEEDS = "PYRAMID_PTX_SEEDS"

# How launches go from now on: in order, with everything as late as allowed.
current = Schedule()
# Further schedules of every launch, each by its own seed: they must leave the same bits everywhere.
repeats = int(os.environ.get(SEEDS) or 0)
# (name of the kernel, counters) after each launch.
listeners: list[Callable[[str, Counts], None]] = []
# PTX to PTX, by which tests plant faults.
edits: list[Callable[[str], str]] = []
_programs: dict[str, Program] = {}


class Driver:
    """Answers to all that Triton asks of a driver before it compiles, without a GPU."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels per device number.
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def architecture() -> int:
    """The one asked for, 0 where none is."""
    return int((os.environ.get(VARIABLE) or "sm_0").removeprefix("sm_"))


def install(arch: int) -> None:
    """From here on kernels are compiled for `arch` and run on the machine. Before Triton is imported, once."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ[VARIABLE] = f"sm_{arch}"
    # Apart from the ordinary cache: nothing is assembled here, the machine takes PTX.
    os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"pyramid-ptx-cache-{os.getuid()}"))
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    from pyramid_rt.kernels.launch import Launch

    CUDABackend.make_cubin = lambda *_args, **_kwargs: b"none"
    driver.set_active(Driver(arch))
    compile_only = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            launch(compiled, self, grid, args, kwargs)
        return compiled

    triton.JITFunction.run = run
    Launch.__post_init__ = lambda self: None  # type: ignore[method-assign]
    from pyramid_rt import api
    from pyramid_rt.loading import weights
    from pyramid_rt.models.backends import choice

    refuse = choice.check_backend

    def check_backend(name: str, device: torch.device) -> None:
        # The machine takes any tensor; torch knows no GPU whose capability it could be asked for.
        if name != "triton":
            refuse(name, device)

    for module in (api, weights, choice):
        vars(module)["check_backend"] = check_backend

    from pyramid_rt.kernels.decide import decision, filters
    from pyramid_rt.models.backends import triton as backend

    # Configurations are those of the device that is stood in for; of a CPU they would be those of sm_80.
    for module in (backend, decision, filters):
        vars(module)["architecture"] = lambda _device: arch


@contextlib.contextmanager
def scheduled(schedule: Schedule) -> Iterator[None]:
    """Launches within go this way."""
    global current
    before, current = current, schedule
    try:
        yield
    finally:
        current = before


@contextlib.contextmanager
def edited(edit: Callable[[str], str]) -> Iterator[None]:
    """Launches within run PTX that was changed."""
    edits.append(edit)
    try:
        yield
    finally:
        edits.remove(edit)


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, Counts]]]:
    """The counters of the launches within."""
    found: list[tuple[str, Counts]] = []

    def listen(name: str, counts: Counts) -> None:
        found.append((name, counts))

    listeners.append(listen)
    try:
        yield found
    finally:
        listeners.remove(listen)


def program(ptx: str) -> Program:
    """Parsed once."""
    if ptx not in _programs:
        _programs[ptx] = parse(ptx)
    return _programs[ptx]


def launch(compiled: Any, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a compiled kernel on the machine; it may touch the tensors among its arguments, nothing else."""
    known = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **known)
    bound.apply_defaults()
    memory: list[Memory] = []
    values: list[int | bytes] = []
    for name, kind in compiled.src.signature.items():
        value = bound.arguments[name]
        if isinstance(value, torch.Tensor):
            memory.append(extent(name, value))
        if kind != "constexpr":
            values.append(_encoded(value, kind))
    ptx = compiled.asm["ptx"]
    for edit in edits:
        ptx = edit(ptx)
    found = program(ptx)
    values += [0] * (
        len(found.parameters) - len(values)
    )  # two scratch pointers, which no kernel of ours uses

    def go(schedule: Schedule) -> Counts:
        shape = (*grid, 1, 1)[:3]
        return machine.run(
            found, shape, compiled.metadata.num_warps, compiled.metadata.shared, values, memory, schedule
        )

    before = [bytes(_view(m)) for m in memory] if repeats else []
    counts = go(current)
    after = [bytes(_view(m)) for m in memory] if repeats else []
    for seed in range(1, repeats + 1):
        for m, old in zip(memory, before, strict=True):
            ctypes.memmove(m.start, old, m.size)
        go(Schedule.drawn(seed))
        for m, same in zip(memory, after, strict=True):
            assert bytes(_view(m)) == same, f"{found.name} leaves other bits in {m.name} with seed {seed}"
    for listener in listeners:
        listener(found.name, counts)


def _view(m: Memory) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * m.size).from_address(m.start)


def extent(name: str, tensor: torch.Tensor) -> Memory:
    """The range that a tensor spans: its own, not its storage's."""
    if tensor.numel() == 0:
        return Memory(name, tensor.data_ptr(), 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Memory(name, tensor.data_ptr(), (last + 1) * tensor.element_size())


def _encoded(value: Any, kind: str) -> int | bytes:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind.startswith("fp"):
        return struct.pack({"fp32": "<f", "fp64": "<d"}[kind], value)
    return int(value)
