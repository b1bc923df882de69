"""Threads of an operation: how many, and whose setting."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pyramid_rt
from pyramid_rt import InputError
from pyramid_rt.cli.bench_report import environment
from pyramid_rt.cli.report import machine
from pyramid_rt.decoding.place import threads as module
from pyramid_rt.decoding.place import threads_in
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
        monkeypatch.setattr(module, "openmp", lambda: None)
    elif module.openmp() is None:
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


def test_reports_name_the_threads_of_the_pyramid(tiny_dir: Path) -> None:
    before = torch.get_num_threads()
    for count in range(1, CPUS + 1):
        with pyramid_rt.load(tiny_dir, device="cpu", threads=count) as rt:
            said = f"CPU, {count} thread" + ("" if count == 1 else "s")
            assert threads_in(rt.place) == environment(rt)["threads"] == count
            assert f"{said} ·" in machine(rt)
            assert f"{said} ·" in rt.profile(PROMPT, max_new_tokens=1).machine
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
