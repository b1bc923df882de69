"""The files that ``profile`` writes: a trace, and pictures of its rounds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyramid_rt.errors import InputError
from pyramid_rt.profiling.drawing import figure_class

if TYPE_CHECKING:
    from pyramid_rt.profiling.profile import Profile

TRACE, PICTURES = "trace.json", ("rounds.svg", "rounds.png")


def check_folder(flag: str, folder: Path) -> None:
    """Refuse before any work a folder that cannot hold the files, and pictures that cannot be drawn.

    Makes the folder where it is missing. Raises InputError.
    """
    figure_class()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{flag}: {folder} is no folder and cannot be made: {reason}") from error


def write(profile: Profile, folder: Path, rounds: int) -> list[Path]:
    """Write the trace, and the pictures where the call had a round; returns where they are. Raises InputError."""
    written = [profile.save(folder / TRACE)]
    if profile.rounds(1):
        written += [profile.save(folder / name, rounds) for name in PICTURES]
    return written
