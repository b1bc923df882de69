"""Reading and writing the files of a directory: bounded, quick to refuse, never half written.

What is at a path is looked at before it is read: a FIFO would block, a device never end. Every error is a
WeightsError that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pyramid_rt.errors import WeightsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The largest tokenizers have about 35 MB; a file beyond this is no config, and would take many times its size.
MOST_BYTES = 256 * 2**20
# How old a temporary file is before it is taken for left behind, where files cannot be locked. Seconds.
_ABANDONED = 3600.0
_SUFFIX = ".part"


def kind_of(path: Path) -> str | None:
    """The kind of thing at a path: "directory", "file", or another in words ("FIFO"); None for nothing.

    Raises:
        WeightsError: the system cannot say, as for a name that is too long or a link to itself.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{_shown(path)}: cannot look at it: {_reason(error)}") from None
    return _kind(mode)


def check_directory(path: Path, expected: str) -> None:
    """Raise WeightsError where a path is no directory; `expected` says what for."""
    kind = kind_of(path)
    if kind != "directory":
        found = "does not exist" if kind is None else f"is a {kind}"
        raise WeightsError(f"{_shown(path)} {found}; expected {expected}")


def resolved(path: Path) -> Path:
    """The path without links. Raises WeightsError, as for a link to itself."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{_shown(path)}: cannot follow it: {_reason(error)}") from None


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file of up to `most` bytes.

    Raises:
        WeightsError: it is not there, no regular file, larger, or cannot be read.
    """
    # O_NONBLOCK: opening a FIFO does not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise WeightsError(f"{_shown(path)}: is a {_kind(found.st_mode)}, expected a file")
            data = file.read(most + 1) if found.st_size <= most else b""
            if found.st_size > most or len(data) > most:
                raise WeightsError(
                    f"{_shown(path)}: has {max(found.st_size, len(data))} bytes, expected at most {most}"
                )
            return data
    except (OSError, ValueError) as error:
        raise WeightsError(f"{_shown(path)}: cannot read it: {_reason(error)}") from None


def read_object(path: Path, *, constants: bool = True, most: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON object from a file. `constants`: Python's NaN and Infinity are allowed. Errors as `read_bytes`."""
    return parse_object(path, read_bytes(path, most), constants=constants)


def parse_object(path: Path, data: bytes, *, constants: bool = True) -> dict[str, Any]:
    """A JSON object from a file's content. Raises WeightsError that names the file."""
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise WeightsError(f"{_shown(path)}: not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise WeightsError(f"{_shown(path)}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{_shown(path)}: expected a JSON object, found {type(content).__name__}")
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object beside the file and rename, so that a reader never sees half of it.

    Writers at the same time do not disturb each other: the last one stands. What writers that were killed left
    behind is removed.

    Raises:
        WeightsError: it cannot be written, or the content is no JSON.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        data = text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{_shown(path)}: cannot write it: {error}") from error
    with whole_file(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes its place at the end of a block that raises nothing.

    Raises:
        WeightsError: the system cannot write it; names `path`.
    """
    try:
        _remove_abandoned(path)
        with _temporary(path) as part:
            yield part
            os.replace(part, path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{_shown(path)}: cannot write it: {_reason(error)}") from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new file beside `path`, locked by its writer as long as it lives; removed unless it was renamed."""
    while True:
        # A number of the process would not do: threads share it, and so do containers over one volume.
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
        with open(part, "xb") as file:
            try:
                _lock(file, wait=True)
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue  # another writer took it for abandoned before it was locked
                yield part
                return
            finally:
                part.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files whose writer is gone: nobody holds their lock any more."""
    begin = f".{path.name}."
    for name in os.listdir(path.parent):
        if name.startswith(begin) and name.endswith(_SUFFIX):
            part = path.parent / name
            with contextlib.suppress(OSError), open(part, "rb") as file:  # gone meanwhile, or another user's
                if _lock(file, wait=False):
                    part.unlink()


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Take the lock of an open file; whether it is ours now. It goes with the file's last descriptor."""
    if fcntl is None:
        return wait or time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (
        OSError
    ):  # held by its writer; or a file system without locks, where nothing is taken for abandoned
        return False
    return True


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "directory"),
        (stat.S_ISREG, "file"),
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
    )
    return next((name for test, name in kinds if test(mode)), "special file")


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]


def _shown(path: Path) -> str:
    """A path for a message: no lone surrogates, which no terminal takes, and not too long."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= 300 else f"{text[:200]}...{text[-80:]}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
