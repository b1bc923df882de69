"""The command line as a process: Ctrl-C at any moment, and standard streams of every kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny import write_tiny_pyramid

PROMPT = "def read(path):\n    with open("
LONG = ("generate", "--ignore-eos", "--max-new-tokens", "900", PROMPT)

# A test run in the background of a shell ignores SIGINT, and so would its children.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pyramid_rt.cli import main
sys.exit(main())
"""


def command(*argv: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *argv]


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def shell(line: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command as "$@" in a line of sh."""
    return subprocess.run(["sh", "-c", line, "sh", *command(*argv)], capture_output=True, text=True)


def test_a_closed_pipe_is_silent() -> None:
    process = start(*LONG)
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_ctrl_c_ends_with_130() -> None:
    process = start(*LONG)
    assert process.stdout
    process.stdout.read(1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "\n")


@pytest.mark.parametrize("moment", ["torch", "pyramid_rt.cli.command", "pyramid_rt.text.tokenizer"])
def test_ctrl_c_while_modules_are_imported(moment: str) -> None:
    program = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from pyramid_rt.cli import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_ctrl_c_at_any_moment(share: float) -> None:
    """Wherever it falls: in an import, the loading, the decoding or the way out."""
    begin = time.monotonic()
    assert start("generate", "--max-new-tokens", "8", PROMPT).wait() == 0
    whole = time.monotonic() - begin
    ready = subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True)" + PROGRAM, "generate", "--max-new-tokens", "8", PROMPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ready.stdout
    ready.stdout.readline()
    time.sleep(share * whole)
    ready.send_signal(signal.SIGINT)
    _, err = ready.communicate()
    assert ready.returncode in (0, 130)  # 0 where it was done before
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_a_keyboard_interrupt_that_a_library_swallows_still_ends_with_130() -> None:
    program = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pyramid_rt.cli import command, main
def swallow(arguments):
    class Lost:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
    Lost()
    return 0
def convert(arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    except BaseException as error:
        raise ValueError("what a library made of it") from error
command.run = {"swallow": swallow, "convert": convert}[sys.argv.pop()]
sys.exit(main())
"""
    for way in ("swallow", "convert"):
        done = subprocess.run([sys.executable, "-c", program, "info", way], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (130, "\n"), way


def test_an_ignored_interrupt_stays_ignored() -> None:
    done = shell("trap '' INT; \"$@\" & pid=$!; sleep 0.3; kill -INT $pid; wait $pid", "--version")
    assert done.returncode == 0
    program = PROGRAM.replace("default_int_handler", "SIG_IGN") + "\n"
    program = program.replace("sys.exit(main())", "main(); print(signal.getsignal(signal.SIGINT).name)")
    out = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "SIG_IGN"


@pytest.mark.parametrize(
    "argv", [("generate", "--max-new-tokens", "2", "a"), ("--version",)], ids=["generate", "version"]
)
@pytest.mark.parametrize(
    ("line", "status"), [('"$@" >&-', 0), ('"$@" >&- 2>&- <&-', 0), ('"$@" 2>&-', 0), ('"$@" >/dev/full', 2)]
)
def test_streams_that_are_closed_or_full(line: str, status: int, argv: tuple[str, ...]) -> None:
    done = shell(line, *argv)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if status:
        assert done.stderr.splitlines()[-1] == ("pyramid-rt: error: standard output: No space left on device")


def test_a_closed_standard_input_is_named() -> None:
    done = shell('"$@" <&-', "generate", "-")
    assert (done.returncode, done.stderr) == (2, "pyramid-rt: error: prompt: standard input is closed\n")


def test_what_is_written_though_nobody_listens(tmp_path: Path) -> None:
    write_tiny_pyramid(tmp_path / "tiny")
    target = str(tmp_path / "tiny" / "target")
    assert shell('"$@" >&-', "init", str(tmp_path / "new"), "--target", target).returncode == 0
    assert "target" in json.loads((tmp_path / "new" / "pyramid.json").read_text())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_without_the_character_gets_a_replacement(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    program = PROGRAM.replace(
        "sys.exit(main())",
        "from pyramid_rt.cli import command\ncommand.run = lambda _: print('a\\u4eac\\U0001f600z') or 0\nmain()",
    )
    done = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, env=environment)
    shown = "a\u4eac\U0001f600z" if encoding == "utf-8" else "a??z"
    assert (done.returncode, done.stdout.decode(encoding), done.stderr) == (0, shown + "\n", b"")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pyramid_rt", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("pyramid-rt: error: ")
