"""Every shipped configuration, compiled: against float64, and each row's bits in every window and place.

The tolerances and the poison are those of the check on a GPU. That a row has the same bits for every T is shown for
equal chains of instructions: the machine adds what a tensor core multiplies in an order of its own.
"""

from __future__ import annotations

import pytest
import torch

from bench.kernel_check import tasks
from bench.kernel_check.problems.base import Case, Place
from bench.kernel_check.runtime import InterpreterRuntime
from bench.kernel_check.tasks import Task
from ptx import device, machine
from ptx.machine import Schedule
from ptx.shipped import cases, configurations

pytestmark = [
    pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING),
    pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80"),
]
# Both widths of a product, each not full and full.
LENGTHS = (1, 5, 16, 17, 64)
DECIDED = (2, 9)
WINDOWED = ("qkv", "attention", "out", "gate_up", "down", "head")
EVERY = cases(device.architecture()) if device.architecture() else []


class MachineRuntime(InterpreterRuntime):
    """The check's, with the configurations of the machine's architecture; bits are compared as on a GPU."""

    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.place = Place(torch.device("cpu"), device.architecture())


def outcome(kind: str, case: Case, lengths: tuple[int, ...], firsts: tuple[int, ...] = ()) -> None:
    run = {"check": tasks.check, "invariance": tasks.invariance}[kind]
    [row] = run(Task(kind, case, lengths=lengths, firsts=firsts), MachineRuntime())
    assert row["ok"], row["message"]


def test_there_is_more_than_one_configuration() -> None:
    found = {len(configurations(op, device.architecture(), "bfloat16")) for op in ("qkv", "out", "gate_up")}
    assert max(found) > 1


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.key)
def test_against_float64(case: Case) -> None:
    outcome("check", case, LENGTHS if case.op in (*WINDOWED, "embed") else DECIDED)


# A tree's rows see slots of the window, hence other sums in other windows: there the same call has the same bits.
INVARIANT = [case for case in EVERY if case.op in WINDOWED and not case.sizes.get("tree")]


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.key)
def test_a_row_has_the_same_bits_in_every_window(case: Case) -> None:
    # Races were looked for above; without matrix instructions float32 takes the machine ten times as long.
    lengths, firsts = ((3, 64), (21,)) if case.dtype == "float32" else ((1, 3, 16, 17, 40, 64), (0, 21))
    with device.scheduled(Schedule(seed=1, quantum=50, detect=False)):
        outcome("invariance", case, lengths, firsts)
