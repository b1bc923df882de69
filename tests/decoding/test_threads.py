"""Threads of an operation: how many, whose setting, and that they sleep when they wait."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pyramid_rt
from pyramid_rt import InputError
from pyramid_rt.decoding.place import threads as module
from pyramid_rt.decoding.place.threads import (
    ONE_THREAD_BYTES,
    available_cpus,
    check_threads,
    default_threads,
    intra_op_threads,
)

CPUS = available_cpus()
PROMPT = "x = "


def number_in_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("value", [0, -1, CPUS + 1, 1.5, True, "2", [1]])
def test_a_wrong_number_is_refused_by_name(tiny_dir: Path, value: Any) -> None:
    with pytest.raises(InputError, match=rf"threads must be an integer in 1\.\.{CPUS}, found"):
        pyramid_rt.load(tiny_dir, device="cpu", threads=value)
    with pytest.raises(InputError, match="threads must be an integer"):
        check_threads(value)


def test_numbers_that_are_right() -> None:
    assert check_threads(None) is None
    assert [check_threads(count) for count in range(1, CPUS + 1)] == list(range(1, CPUS + 1))
    assert check_threads(torch.tensor(1)) == 1


def test_small_pyramids_get_one_thread_and_others_torchs_number(tiny_dir: Path) -> None:
    assert default_threads(ONE_THREAD_BYTES - 1) == 1
    assert default_threads(ONE_THREAD_BYTES) == torch.get_num_threads()
    with pyramid_rt.load(tiny_dir, device="cpu") as rt:
        assert rt.place.threads == 1  # type: ignore[attr-defined]
    with pyramid_rt.load(tiny_dir, device="cpu", threads=CPUS) as rt:
        assert rt.place.threads == CPUS  # type: ignore[attr-defined]


@pytest.mark.parametrize("by_openmp", [True, False])
def test_the_number_holds_inside_and_in_this_thread_alone(
    by_openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_openmp:  # where the library's functions cannot be called
        monkeypatch.setattr(module, "_openmp", lambda: None)
    elif module._openmp() is None:
        pytest.skip("torch's OpenMP cannot be called here")
    before = torch.get_num_threads()
    wanted = before + 1
    with intra_op_threads(wanted):
        assert torch.get_num_threads() == wanted
        if by_openmp:
            assert number_in_a_new_thread() != wanted
        with intra_op_threads(None):
            assert torch.get_num_threads() == wanted
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), intra_op_threads(wanted):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_a_number_that_the_application_gave_torch_stays_and_does_not_count(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pyramid_rt.load(tiny_dir, device="cpu", threads=1) as rt:
            inside: list[int] = []
            forward = rt.tiers[-1].forward

            def spy(*args: Any) -> Any:
                inside.append(torch.get_num_threads())
                return forward(*args)

            monkeypatch.setattr(rt.tiers[-1], "forward", spy)
            for _ in rt.stream(PROMPT, max_new_tokens=8, ignore_eos=True):
                assert torch.get_num_threads() == before + 1
            assert set(inside) == {1}
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# In a process of its own: how long threads spin is decided for a whole process, and for good.
SLEEPERS = """
import os, sys, threading, time, torch
from pyramid_rt.decoding.place.threads import wait_briefly

def sleeps():
    total = 0
    for task in os.listdir("/proc/self/task"):
        if int(task) != threading.get_native_id():
            with open(f"/proc/self/task/{task}/status") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("voluntary"))
    return total

torch.set_num_threads(2)
x = torch.ones(2**18)

def regions():
    x.add_(1)
    before = sleeps()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.001)
    return sleeps() - before

alone = threading.active_count()
spinning = regions()
arranged = wait_briefly(int(sys.argv[1]))
wait_briefly(int(sys.argv[1]))
print(arranged, spinning, regions(), threading.active_count() == alone)
"""


def sleepers(threads: int, **environment: str) -> tuple[bool, int, int, bool]:
    """Short waits arranged or not, how often a waiting thread slept before and after, nothing else seen."""
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SLEEPERS, str(threads)],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, "PYTHONPATH": ":".join(sys.path), **environment},
    )
    arranged, before, after, same = done.stdout.split()
    return arranged == "True", int(before), int(after), same == "True"


@pytest.mark.skipif(
    not module._openmp() or not module._is_gnu() or not Path("/proc/self/task").is_dir() or CPUS < 2,
    reason="needs GNU OpenMP, Linux and two CPUs",
)
def test_waiting_threads_sleep_instead_of_spinning() -> None:
    arranged, before, after, unseen = sleepers(2)
    assert arranged
    assert before < 50  # of 100 waits of a millisecond, spent spinning
    assert after > 80
    assert unseen
    assert not sleepers(1)[0]
    assert not sleepers(2, GOMP_SPINCOUNT="1000")[0]
    assert not sleepers(2, OMP_WAIT_POLICY="active")[0]
