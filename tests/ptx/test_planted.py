"""Faults planted in compiled kernels: each must be caught, whatever the schedule, and the kernel as it is must pass.

Needs kernels that are compiled: PYRAMID_PTX=sm_80 (or sm_90), as `make test-compiled` sets it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors

from ptx import device, faults, machine
from ptx.faults import Edit, replaced
from ptx.machine import AT_ONCE, LATE, Fault, Schedule
from ptx.subjects import LAUNCHES, LENGTH, MEETING, SHAPE, Subject, subject

pytestmark = [
    pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING),
    pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80"),
]

SEEDS = range(1, 7)
# A loop whose end was moved may never come to it.
BUDGET = 20_000_000
# One program of one warp that writes four words: no index is compared with a border.
WITHOUT_BORDERS = ("begin",)


@cache
def made(name: str) -> Subject:
    return subject(name)


def words(name: str) -> list[torch.Tensor]:
    return made(name).run()


def verdict(name: str, edit: Edit, schedule: Schedule) -> str:
    """The kind of the fault that the machine found, `values` where only bits differ, "" where nothing does."""
    expected = words(name)
    with device.edited(edit):
        try:
            found = made(name).run(replace(schedule, budget=BUDGET))
        except Fault as fault:
            return fault.kind
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return "" if same else "values"


def verdicts(name: str, edit: Edit, **schedule: Any) -> set[str]:
    """Under every seed."""
    return {verdict(name, edit, replace(Schedule.drawn(seed), **schedule)) for seed in SEEDS}


@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_as_they_are_leave_equal_bits_under_every_seed(name: str) -> None:
    expected, kept = words(name), made(name)
    for seed in range(1, 21):
        for found, same in zip(kept.run(Schedule.drawn(seed)), expected, strict=True):
            assert_equal_tensors(found, same)


@pytest.mark.parametrize("name", MEETING)
def test_no_barrier_before_the_arrival(name: str) -> None:
    found = verdicts(name, faults.without_barriers_before_the_arrival)
    # Where shared memory is used again after the store, that is the first thing to be seen.
    assert found <= {"global_race", "shared_race"}, found


@pytest.mark.parametrize("name", MEETING)
@pytest.mark.parametrize("order", ["relaxed", "acquire", "release"])
def test_an_arrival_that_orders_too_little(name: str, order: str) -> None:
    assert verdicts(name, replaced(r"gpu\.acq_rel", f"gpu.{order}")) == {"global_race"}


@pytest.mark.parametrize("name", MEETING)
def test_a_counter_that_is_not_reset(name: str) -> None:
    """The first launch is right, and the next one finds no last arriver."""
    kept, expected = made(name), words(name)
    counters = next(i for i, t in enumerate(kept.tensors) if t is kept.tensor(counter_name(kept)))
    with device.edited(faults.without_reset):
        found = kept.run()
        for i, (mine, same) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(mine, same) == (i != counters), i
        assert not expected[counters].any()
        assert found[counters].any()


def spread(count: int, most: int) -> range:
    """Numbers below `count`: all, or every second or third where they would take minutes."""
    return range(0, count, max(1, -(-count // most)))


def counter_name(kept: Subject) -> str:
    return next(n for n in ("arrivals_ptr", "counters_ptr") if n in kept.launch.kernel.arg_names)


@pytest.mark.parametrize("name", MEETING)
def test_two_blocks_write_one_cell(name: str) -> None:
    assert "" not in verdicts(name, faults.every_block_the_first)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_missing_barrier_somewhere(name: str) -> None:
    """One barrier after another taken away: those around reused shared memory are missed as races."""
    tried = spread(len(re.findall(faults.BARRIER, made(name).ptx())), 60)
    found = [verdict(name, faults.without_barrier(i), Schedule()) for i in tried]
    caught = [kind for kind in found if kind]
    # Never by the values alone: in order and at once, a kernel without a barrier still computes the same.
    assert set(caught) <= {"shared_race", "global_race", "uninitialised", "bounds", "in_flight"}, found
    # The others stand on paths that these inputs do not take (windows of up to 16 rows, longer lists), or next to
    # another one.
    assert len(caught) >= len(tried) // 3, found


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name not in WITHOUT_BORDERS])
def test_a_border_off_by_one(name: str) -> None:
    """One comparison after another takes its border to the other side: some mask is a row or an entry too wide."""
    tried = spread(len(re.findall(faults.COMPARISON, made(name).ptx())), 100)
    found = [verdict(name, faults.off_by_one(i), Schedule()) for i in tried]
    # Most change nothing that is kept: loads of rows whose results are masked by another comparison.
    assert any(found), found


def test_no_barrier_before_the_arrival_shows_in_the_values_too() -> None:
    """With the detector off, where stores are late."""
    expected, kept, differing = words("out"), made("out"), 0
    with device.edited(faults.without_barriers_before_the_arrival):
        for seed in SEEDS:
            found = kept.run(Schedule(seed=seed, detect=False, quantum=20))
            differing += not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert differing


PIPELINED = ("qkv", "out", "gate_up", "attention")


@pytest.mark.parametrize("name", PIPELINED)
def test_a_wait_that_is_too_weak(name: str) -> None:
    weaker = replaced(r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;")
    for copies in (AT_ONCE, LATE):
        found = verdicts(name, weaker, copies=copies)
        assert found <= {"in_flight", "shared_race"}
        assert "in_flight" in found


@pytest.mark.parametrize("name", PIPELINED)
def test_no_wait_at_all(name: str) -> None:
    assert verdicts(name, replaced(r"cp\.async\.wait_group\s+\d+;", "")) == {"in_flight"}


def test_a_row_too_many() -> None:
    """The length's parameter one larger: the row past the window is NaN, which the result then shows."""
    kept = subject("out")
    at = next(i for i, value in enumerate(kept.launch.args) if isinstance(value, int) and value == LENGTH)
    arguments = list(kept.launch.args)
    arguments[at] = LENGTH + 1
    rows = kept.tensor("out_ptr")
    kept.run()
    expected = rows.clone()
    kept.launch = replace(kept.launch, args=tuple(arguments))
    kept.run()
    assert torch.equal(rows[:LENGTH], expected[:LENGTH])
    assert not torch.equal(rows[LENGTH].view(torch.int16), expected[LENGTH].view(torch.int16))


def test_rows_past_the_end_of_a_buffer() -> None:
    kept, width = subject("out"), SHAPE.heads * SHAPE.head_dim
    arguments = [
        a[:-48] if isinstance(a, torch.Tensor) and a.shape == (64, width) else a for a in kept.launch.args
    ]
    with pytest.raises(Fault, match="outside every buffer"):
        Subject(replace(kept.launch, args=tuple(arguments))).run()


@pytest.mark.skipif(device.architecture() != 90, reason="wgmma is of sm_90")
@pytest.mark.parametrize("name", PIPELINED)
def test_a_result_of_wgmma_taken_too_early(name: str) -> None:
    edit = replaced(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "")
    assert verdicts(name, edit, products=LATE) == {"uninitialised"}
