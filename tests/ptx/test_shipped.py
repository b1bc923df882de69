"""Every shipped configuration, compiled: against float64, and each row's bits in every window and place.

A row of a tree is tied to the slots that it sees: with them it has the same bits wherever it stands in the window,
and with a chain's slots those of the chain. A path that was verified in scattered slots and moved together by a
compaction sums in another order from then on: there no equality is promised.

The tolerances and the poison are those of the check on a GPU. That a row has the same bits for every T is shown for
equal chains of instructions: the machine adds what a tensor core multiplies in an order of its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.kernel_check import tasks
from bench.kernel_check.problems import oracle
from bench.kernel_check.problems.base import Case, Place
from bench.kernel_check.problems.cache import Attention
from bench.kernel_check.runtime import InterpreterRuntime
from bench.kernel_check.tasks import Task
from ptx import device, machine
from ptx.machine import Schedule
from ptx.shipped import cases, configurations
from pyramid_rt.kernels.limits import WINDOW

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


# A tree's rows see slots of the window, hence other sums in windows that start elsewhere; what they keep is below.
INVARIANT = [case for case in EVERY if case.op in WINDOWED and not case.sizes.get("tree")]


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.key)
def test_a_row_has_the_same_bits_in_every_window(case: Case) -> None:
    # Races were looked for above; without matrix instructions float32 takes the machine ten times as long.
    lengths, firsts = ((3, 64), (21,)) if case.dtype == "float32" else ((1, 3, 16, 17, 40, 64), (0, 21))
    with device.scheduled(Schedule(seed=1, quantum=50, detect=False)):
        outcome("invariance", case, lengths, firsts)


TREES = [case for case in EVERY if case.op == "attention" and case.sizes.get("tree")]


def attended(problem: Attention, length: int, seed: int) -> Tensor:
    """[T, H x D] of a launch on the placed window, its blocks, warps and stores in the order of the seed."""
    problem.poison()
    with device.scheduled(replace(Schedule.drawn(seed), quantum=50, detect=False)):
        problem.start(length)
    out = problem.outputs(length)["out"].clone()
    assert bool(out.isfinite().all())
    return out


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    differing = [row for row in range(len(expected)) if oracle.differ(actual[row], expected[row], exact=True)]
    assert not differing, differing


@pytest.mark.parametrize("case", TREES, ids=lambda case: case.key)
def test_a_row_of_a_tree_has_the_same_bits_wherever_it_stands(case: Case) -> None:
    """For every T, at every place of the window, beside any other rows: what it sees decides."""
    problem = Attention(case, MachineRuntime().place)
    assert problem.ancestors is not None
    problem.place(0, WINDOW, hide=False)
    expected = attended(problem, WINDOW, 1)
    # Parents stand before their children, so a tree cut short is one.
    for length in (1, 5, 17, 40):
        assert_bits(attended(problem, length, 1 + length), expected[:length])
    order = torch.randperm(WINDOW, generator=torch.Generator().manual_seed(1))
    problem.q.copy_(problem.q[order])
    problem.ancestors.copy_(problem.ancestors[order])
    assert_bits(attended(problem, WINDOW, 2), expected[order])
    problem.q[::2] = problem.base_q[WINDOW:][: WINDOW // 2]
    problem.ancestors[::2] = -1
    assert_bits(attended(problem, WINDOW, 3)[1::2], expected[order][1::2])


@pytest.mark.parametrize("case", TREES, ids=lambda case: case.key)
def test_a_chain_given_as_a_tree_has_the_bits_of_the_chain(case: Case) -> None:
    problem = Attention(case, MachineRuntime().place)
    ancestors = torch.tensor([(2 << row) - 1 for row in range(63)] + [-1])
    for first, length in ((0, 1), (21, 17), (40, WINDOW)):
        problem.place(first, length, hide=True)
        problem.ancestors = ancestors
        tree = attended(problem, length, 1)
        problem.ancestors = None
        assert_bits(tree, attended(problem, length, 2))
