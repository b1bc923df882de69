"""The programs of `examples/` as modules, and as processes that serve at a port of this machine."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def example(name: str) -> ModuleType:
    """An example, imported as it is when run from its folder."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def serving(name: str, *argv: str, within: float) -> Iterator[str]:
    """The address of an example that serves; it is ended afterwards. Fails where it does not answer in time."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--port", str(port), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait(process, url, time.monotonic() + within)
        yield url
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait(process: subprocess.Popen[str], url: str, until: float) -> None:
    """Until a request is answered, with whatever status."""
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode}: {process.communicate()[0][-3000:]}")
        try:
            urllib.request.urlopen(f"{url}/completions", data=b"{}", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            if error.code == 400:
                return
            time.sleep(0.3)
        except OSError:
            time.sleep(0.3)
    process.kill()
    raise AssertionError(f"it does not serve: {process.communicate()[0][-3000:]}")
