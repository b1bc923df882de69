"""The fuzzer for a minute, in processes of its own: it counts on the main thread and on the clock of a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 20
LEAST = {"directories": 20, "arguments": 50, "command_lines": 20}  # cases, on a machine that is very busy


@pytest.mark.parametrize("kind", LEAST)
def test_nothing_but_our_own_errors_comes_out(kind: str) -> None:
    tests = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fuzz", kind, "--seconds", str(SECONDS), "--seed", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = re.match(rf"{kind}: (\d+) cases, 0 failures", done.stdout)
    assert found is not None
    assert int(found[1]) >= LEAST[kind]
