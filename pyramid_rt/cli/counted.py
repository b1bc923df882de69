"""`profile --counted`: instructions and bytes of the compiled kernels of a generation, counted without a GPU.

The machine that runs them is a tool of the project's tests, and needs a process of its own: in it kernels are
compiled for a GPU that is not there, before anything is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyramid_rt
from pyramid_rt.errors import InputError

# The machine executes some million instructions a second: a token of the demo pyramid takes seconds.
NEW_TOKENS = 8


def machine_folder() -> Path:
    """The folder to import the machine from.

    Raises:
        InputError: the package is not that of a copy of the repository.
    """
    root = Path(pyramid_rt.__file__).resolve().parents[1]
    if not (root / "tests" / "ptx" / "counted.py").is_file():
        raise InputError(
            "--counted runs compiled kernels on a machine that is part of the project's tests: it needs a copy of "
            f"the repository, and {root} is none"
        )
    return root / "tests"


def run(weights: Path, prompt: Any, loading: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Count a generation and print the table; the exit status.

    Args:
        weights: directory of the pyramid.
        prompt, options: as `generate` takes them; `NEW_TOKENS` are written where they do not say.
        loading: options of `load`, of which dtype and max_seq are possible here.

    Raises:
        InputError: another one was given, or there is no machine.
    """
    folder = machine_folder()
    others = sorted(set(loading) - {"dtype", "max_seq"})
    if others:
        raise InputError(
            f"--counted takes no --{others[0].replace('_', '-')}: kernels run on a machine of their own"
        )
    request = {
        "weights": str(weights),
        "prompt": prompt,
        "loading": dict(loading),
        "options": {"max_new_tokens": NEW_TOKENS, **options},
    }
    paths = [str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ptx.counted", "--request"],
        input=json.dumps(request),
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        check=False,
    )
    return done.returncode
