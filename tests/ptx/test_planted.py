"""Faults planted in compiled kernels: each must be caught, whatever the schedule, and the kernel as it is must pass.

Needs kernels that are compiled: PYRAMID_PTX=sm_80 (or sm_90), as `make test-compiled` sets it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.oracle import CONFIG, poisoned, random, window, workspace

from ptx import device, machine
from ptx.machine import AT_ONCE, LATE, Fault, Schedule

pytestmark = [
    pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING),
    pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80"),
]

LENGTH = 18
CHANNELS, WIDTH = 128, 192
SEEDS = range(1, 7)


class Product:
    """A product split three ways along K, whose last arriver adds the parts: bfloat16, two tiles of channels."""

    def __init__(self) -> None:
        from pyramid_rt.kernels.forward import project

        self.config = replace(CONFIG, splits=3)
        dtype = torch.bfloat16
        self.out, self.scaled = (poisoned(64, CHANNELS, dtype=dtype) for _ in range(2))
        self.sums = poisoned(2, 64, dtype=torch.float32)
        self.space = workspace(CHANNELS, self.config)
        self.launch = project.plan(
            window(LENGTH, WIDTH, dtype=dtype),
            random(CHANNELS, WIDTH, dtype=dtype, scale=WIDTH**-0.5, seed=2),
            None,
            window(LENGTH, CHANNELS, dtype=dtype, seed=1),
            random(CHANNELS, dtype=dtype, seed=4),
            LENGTH,
            self.out,
            self.scaled,
            self.sums,
            self.space,
            self.config,
        )

    def run(self, schedule: Schedule | None = None) -> torch.Tensor:
        """The result, its rows past the window included, as words."""
        self.out.fill_(torch.nan)
        self.space.partials.fill_(torch.nan)
        self.space.counters.zero_()
        with device.scheduled(schedule or Schedule()):
            self.launch.run()
        return self.out.view(torch.int16).clone()


def replaced(pattern: str, by: str, *, which: int | None = None) -> Callable[[str], str]:
    """An edit of every match, or of one; one that matches nothing is an error."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx, re.MULTILINE))
        assert found, pattern
        for match in reversed(found if which is None else [found[which]]):
            ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
        return ptx

    return edit


def around_arrivals(change: Callable[[str, str], tuple[str, str]]) -> Callable[[str], str]:
    """An edit of what lies between the last store and each arrival, and of what follows it up to the next."""

    def edit(ptx: str) -> str:
        parts = ptx.split("atom.global")
        assert len(parts) > 1
        for i in range(1, len(parts)):
            at = parts[i - 1].rindex("st.global")
            before, parts[i] = change(parts[i - 1][at:], parts[i])
            parts[i - 1] = parts[i - 1][:at] + before
        return "atom.global".join(parts)

    return edit


# Triton 3.9 puts a barrier of its own there, so all of them go.
without_barriers_before_the_arrival = around_arrivals(
    lambda before, after: (re.sub(r"bar\.sync\s+0;", "", before), after)
)
# The reset is the first store after the arrival.
without_reset = around_arrivals(
    lambda before, after: (before, re.sub(r"^.*st\.global\.b32.*;", "", after, count=1, flags=re.MULTILINE))
)


def kinds(edit: Callable[[str], str], **schedule: Any) -> list[str]:
    """The verdict of the machine under every seed, "" where it found nothing."""
    product, found = Product(), []
    with device.edited(edit):
        for seed in SEEDS:
            try:
                product.run(replace(Schedule.drawn(seed), **schedule))
                found.append("")
            except Fault as fault:
                found.append(fault.kind)
    return found


def test_the_kernel_as_it_is_leaves_equal_bits_under_every_seed() -> None:
    product = Product()
    expected = product.run()
    for seed in range(1, 21):
        assert torch.equal(product.run(Schedule.drawn(seed)), expected)
        assert not product.space.counters.any()


def test_no_barrier_before_the_arrival() -> None:
    assert set(kinds(without_barriers_before_the_arrival)) == {"global_race"}


def test_no_barrier_before_the_arrival_shows_in_the_values_too() -> None:
    """With the detector off, where stores are late."""
    product = Product()
    expected, differing = product.run(), 0
    with device.edited(without_barriers_before_the_arrival):
        for seed in SEEDS:
            schedule = Schedule(seed=seed, detect=False, quantum=20)
            differing += not torch.equal(product.run(schedule), expected)
    assert differing


def test_a_relaxed_arrival() -> None:
    assert set(kinds(replaced(r"gpu\.acq_rel", "gpu.relaxed"))) == {"global_race"}


def test_a_counter_that_is_not_reset() -> None:
    """The next launch finds no last arriver."""
    product = Product()
    expected = product.run()
    with device.edited(without_reset):
        assert torch.equal(product.run(), expected)
        assert product.space.counters.any()


def test_a_wait_that_is_too_weak() -> None:
    weaker = replaced(r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;")
    for copies in (AT_ONCE, LATE):
        found = kinds(weaker, copies=copies)
        assert set(found) <= {"in_flight", "shared_race"}
        assert "in_flight" in found


def test_no_wait_at_all() -> None:
    assert set(kinds(replaced(r"cp\.async\.wait_group\s+\d+;", ""))) == {"in_flight"}


def test_a_row_too_many() -> None:
    """The length's parameter one larger: the row past the window is NaN, which the result then shows."""
    product = Product()
    at = next(i for i, value in enumerate(product.launch.args) if isinstance(value, int) and value == LENGTH)
    arguments = list(product.launch.args)
    arguments[at] = LENGTH + 1
    expected = product.run()
    product.launch = replace(product.launch, args=tuple(arguments))
    found = product.run()
    assert torch.equal(found[:LENGTH], expected[:LENGTH])
    assert not torch.equal(found[LENGTH], expected[LENGTH])


def test_rows_past_the_end_of_a_buffer() -> None:
    product = Product()
    arguments = [
        a[:-48] if isinstance(a, torch.Tensor) and a.shape == (64, WIDTH) else a for a in product.launch.args
    ]
    product.launch = replace(product.launch, args=tuple(arguments))
    with pytest.raises(Fault, match="outside every buffer"):
        product.run()


def test_a_missing_barrier_somewhere() -> None:
    """One barrier after another taken away: those around reused shared memory are missed as races."""
    product = Product()
    ptx = product.launch.warmup().asm["ptx"]
    count = len(re.findall(r"bar\.sync\s+0;", ptx))
    caught = []
    for which in range(count):
        with device.edited(replaced(r"bar\.sync\s+0;", "", which=which)):
            try:
                product.run()
            except Fault as fault:
                caught.append(fault.kind)
    assert set(caught) <= {"shared_race", "global_race", "in_flight"}
    # Half of them belong to the path of shorter windows, and one next to another is rightly not missed.
    assert len(caught) >= count // 3, (caught, count)


def test_two_blocks_write_one_cell() -> None:
    found = kinds(replaced(r"mov\.u32\s+(%r\d+), %ctaid\.([xyz]);", r"mov.u32 \1, 0;"))
    assert set(found) == {"global_race"}


@pytest.mark.skipif(device.architecture() != 90, reason="wgmma is of sm_90")
def test_a_result_of_wgmma_taken_too_early() -> None:
    edit = replaced(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "")
    assert set(kinds(edit, products=LATE)) == {"uninitialised"}
