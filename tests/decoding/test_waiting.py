"""Waits of OpenMP's threads: short beside other programs, spun through when the process has its CPUs to itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyramid_rt.decoding.place import places
from pyramid_rt.decoding.place.threads import available_cpus, is_gnu, openmp
from pyramid_rt.decoding.place.waiting import SHARED, WINDOW, IdleTeam, Waits, waits_for

gnu = pytest.mark.skipif(
    not openmp() or not is_gnu() or not Path("/proc/self/task").is_dir() or available_cpus() < 2,
    reason="needs GNU OpenMP, Linux and two CPUs",
)


class RecordedTeam(IdleTeam):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def start(self, threads: int) -> None:
        assert threads >= 2
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


class Machine:
    """Seconds that pass and switches that happen as the test says."""

    def __init__(self) -> None:
        self.seconds, self.switches = 0.0, 0
        self.waits = Waits(RecordedTeam(), lambda: self.switches, lambda: self.seconds)

    def round(self, seconds: float, switches: int, threads: int = 2) -> list[str]:
        """Calls of the team after a round that lasted so long and lost its CPU so often."""
        team = self.waits.team
        assert isinstance(team, RecordedTeam)
        before = len(team.calls)
        with self.waits.watched(threads):
            self.seconds += seconds
            self.switches += switches
        return team.calls[before:]


def test_it_is_decided_by_the_switches_of_a_window() -> None:
    machine = Machine()
    few, many = int(SHARED * 2 * WINDOW) - 1, int(SHARED * 2 * WINDOW) + 1
    assert machine.round(WINDOW, few) == ["stop"]
    assert machine.round(WINDOW, many) == ["start"]
    assert machine.round(WINDOW, many, threads=4) == ["stop"]
    # What happens between rounds does not count.
    machine.switches += 1000
    machine.seconds += 1000
    assert machine.round(WINDOW, few) == ["stop"]


def test_short_rounds_add_up_to_a_window() -> None:
    machine = Machine()
    made = [machine.round(WINDOW * 0.26, 5) for _ in range(8)]
    assert made == 2 * [[], [], [], ["start"]]


def test_a_round_that_fails_counts_too() -> None:
    machine = Machine()

    def fail() -> None:
        with machine.waits.watched(2):
            machine.seconds += WINDOW
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert isinstance(machine.waits.team, RecordedTeam)
    assert machine.waits.team.calls == ["stop"]


@gnu
def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert waits_for(1) is None
    assert waits_for(None) is None
    for name, value in (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert waits_for(2) is None
    with monkeypatch.context() as context:
        context.setattr("pyramid_rt.decoding.place.waiting.is_gnu", lambda: False)
        assert waits_for(2) is None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits(RecordedTeam(), lambda: 0)
    monkeypatch.setattr(places, "waits_for", lambda threads: waits)
    return waits


def test_the_outermost_work_of_a_place_is_watched(recorded: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    monkeypatch.setattr(recorded, "_note", lambda seconds, lost, threads: noted.append(threads))
    place = places.HostPlace(torch.device("cpu"), 2)
    with place.work():
        with place.work():
            pass
        assert not noted
    assert noted == [2]


# In a process of its own: how long threads spin is decided for a whole process.
SLEEPERS = """
import os, threading, time, torch
from pyramid_rt.decoding.place.waiting import WAITS, waits_for

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

def gone(tasks):
    while len(os.listdir("/proc/self/task")) > tasks:
        time.sleep(0.001)

alone = threading.active_count()
print(regions())
tasks = len(os.listdir("/proc/self/task"))
for _ in range(2):
    waits_for(2)
    waits_for(2)
    print(regions())
    WAITS.team.stop()
    WAITS.team.stop()
    gone(tasks)
    print(regions())
print(threading.active_count() - alone)
"""


@gnu
def test_waiting_threads_sleep_while_the_team_is_there() -> None:
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SLEEPERS],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**kept, "PYTHONPATH": ":".join(sys.path)},
    )
    alone, short, spun, again, last, more = map(int, done.stdout.split())
    # Of 100 waits of a millisecond, those that were slept through.
    assert max(alone, spun, last) < 50, done.stdout
    assert min(short, again) > 80, done.stdout
    assert more == 0
