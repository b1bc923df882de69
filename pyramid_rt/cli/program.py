"""The command line as a process: Ctrl-C, standard streams and exit status, in force before torch is imported."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from pyramid_rt.cli.arguments import PROGRAM, parse
from pyramid_rt.errors import PyramidError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE

_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    A user's mistake ends as one line on standard error and status 2, Ctrl-C as 130. When the reader of
    standard output goes away, the program ends without a word.

    Args:
        argv: arguments without the program's name. None: those of this process, which is then taken to be the
            program's own: Ctrl-C ends it at any moment before it is done, and standard streams that are closed or
            cannot show a character are made to do. With arguments given, nothing of the process is touched.
    """
    if argv is not None:
        return _status(argv, None)
    _open_streams()
    interrupts = _Interrupts.take()
    status = _status(sys.argv[1:], interrupts)
    if interrupts is not None:
        # All is said and done. The interpreter's own end would put the handler away and die of the signal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


class _Interrupts:
    """The answer to Ctrl-C in a process of ours.

    While modules are imported, and after the work, there is nothing to clean up, and an exception would come out
    of whatever was running, or vanish in it: the process leaves at once. During the work the first one is a
    KeyboardInterrupt, so that streams and terminals are put in order; a second one does not wait for that.
    """

    def __init__(self) -> None:
        self.seen = False

    @classmethod
    def take(cls) -> _Interrupts | None:
        """Handle SIGINT from now on; None where somebody else does, or it is ignored, as in a background job."""
        if threading.current_thread() is not threading.main_thread():
            return None
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return None
        signal.signal(signal.SIGINT, _leave_at_once)
        _quiet_when_lost()
        return cls()

    def work_begins(self) -> None:
        signal.signal(signal.SIGINT, self._interrupt)

    def work_ends(self) -> None:
        signal.signal(signal.SIGINT, _leave_at_once)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.work_ends()
        self.seen = True
        raise KeyboardInterrupt


def _quiet_when_lost() -> None:
    """A KeyboardInterrupt that comes up where none can be raised (a finaliser) ends the process all the same."""
    before: Callable[[Any], Any] = sys.unraisablehook

    def hook(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            _leave_at_once(signal.SIGINT, None)
        before(lost)

    sys.unraisablehook = hook


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"\n")
    os._exit(EXIT_INTERRUPTED)


class _Output(io.TextIOWrapper):
    """Standard output that remembers its first failure, whoever swallows the exception (argparse does)."""

    failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._remembered():
            return super().write(text)

    def flush(self) -> None:
        with self._remembered():
            super().flush()

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            raise


def _status(argv: Sequence[str], interrupts: _Interrupts | None) -> int:
    """Run a command and turn whatever ends it into an exit status."""
    ended: BaseException | None = None
    status = 0
    try:
        status = _run(argv, interrupts)
    except BaseException as error:
        ended = error
    if interrupts is not None:
        interrupts.work_ends()
        if interrupts.seen:
            ended = KeyboardInterrupt()  # whatever a library made of it
    failure = sys.stdout.failure if isinstance(sys.stdout, _Output) else None
    if failure is not None and (ended is None or isinstance(ended, SystemExit | OSError)):
        _drop_output()
        ended = failure
        failure.filename = failure.filename or "standard output"
    return status if ended is None else _ended_by(ended)


def _run(argv: Sequence[str], interrupts: _Interrupts | None) -> int:
    try:
        arguments = parse(argv)
        # Only now, as it brings in torch.
        from pyramid_rt.cli import command

        if interrupts is not None:
            interrupts.work_begins()
        status = command.run(arguments)
    except SystemExit:  # after --help and --version
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _ended_by(error: BaseException) -> int:
    """The status for what ended a command, said in one line; what is no user's affair goes on up."""
    if isinstance(error, KeyboardInterrupt):
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return EXIT_PIPE_CLOSED
    if isinstance(error, PyramidError):
        return _fail(str(error))
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        return _fail(said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}")
    raise error


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


def _drop_output() -> None:
    """The interpreter flushes standard output once more when it ends, and would complain: nobody takes it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _open_streams() -> None:
    """Standard output and standard error that can be written to, whatever the process was started with."""
    # A closed one would be opened again by the first file that anybody opens.
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal lacks becomes a question mark; standard error has its own way.
        sys.stdout = _Output(
            sys.stdout.buffer,
            sys.stdout.encoding,
            "replace",
            line_buffering=sys.stdout.line_buffering,
            write_through=sys.stdout.write_through,
        )
