"""Command lines with flags and values of every kind."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import sys

from fuzz.runner import Case, Failure, Workspace
from pyramid_rt.cli import main
from pyramid_rt.cli.arguments import EXPLAIN_FLAGS, GENERATION_FLAGS, INIT_FLAGS, LOADING_FLAGS, TUNE_FLAGS

_VALUES = (
    "", " ", "-", "--", "-1", "0", "1", "2", "3", "0.5", "1e39", "1e400", "nan", "inf", "9" * 30, "9" * 5000, "x",
    "sd", "psd", "ar", "cpu", "cuda", "cuda:99", "float32", "bfloat16", "torch", "triton", "host", "device", "off",
    "round", "js", "topk_kl", "match", "rejection", "raw", "--json", "-h", "\n", "\x00", "\udcff", "é京😀", "{}",
    "[bold]", "%s", "=", "a=b", "/dev/null", "/dev/full", "/dev/zero", "/no/such/place", "x" * 300, "x/" * 3000, ".",
    "..", "/", "PROMPTS", "TINY", "TINY/target", "TINY/pyramid.json", "²", "٣", "0x10", "1_000",
)  # fmt: skip
_SWITCHES = {
    "generate": ("--ignore-eos", "--chat", "--json", "--trace"),
    "init": ("--force",),
    "demo": (),
    "info": (),
    "tune": ("--lossy", "--dry-run"),
    "explain": ("--json",),
    "bench": (),
    "profile": ("--ignore-eos", "--chat", "--nvtx"),
}
_FLAGS = {
    "generate": (
        *(flag for flag, *_ in (*GENERATION_FLAGS, *LOADING_FLAGS)),
        "--stop",
        "--system",
        "--weights",
    ),
    "init": tuple(flag for flag, *_ in INIT_FLAGS),
    "demo": ("--max-new-tokens", "--repeats", "--weights", "--dtype", "--max-seq"),
    "info": ("--weights", *(flag for flag, *_ in LOADING_FLAGS)),
    "tune": (*(flag for flag, *_ in (*TUNE_FLAGS, *LOADING_FLAGS)), "--prompts", "--json"),
    "explain": (*(flag for flag, *_ in (*EXPLAIN_FLAGS, *LOADING_FLAGS)), "--prompts"),
    "profile": (
        *(flag for flag, *_ in (*GENERATION_FLAGS, *LOADING_FLAGS)),
        "--system",
        "--weights",
        "--rounds",
        "--out",
    ),
    "bench": (
        "--prompt-tokens",
        "--new-tokens",
        "--methods",
        "--json",
        *(flag for flag, *_ in LOADING_FLAGS),
    ),
}
_WRITTEN = ("pyramid.json", "measured.json")


def case(dice: random.Random, place: Workspace) -> Case:
    """Run the command line in an empty folder, with a copy of the tiny pyramid beside it."""
    tiny = place.folder / "tiny"
    shutil.copytree(place.tiny, tiny)
    (place.folder / "prompts.txt").write_text("ab\n---\ncd\n")
    work = place.folder / "work"
    work.mkdir()
    argv = _argv(dice)
    argv = [
        part.replace("TINY", str(tiny)).replace("PROMPTS", str(place.folder / "prompts.txt")) for part in argv
    ]
    shown = " ".join(repr(part if len(part) < 40 else part[:37] + "...") for part in argv)
    return Case(
        shown.replace(str(tiny), "TINY"),
        lambda: _run(argv, work),
        may_leave=(
            "tiny/pyramid.json",
            *(f"work/{name}" for name in _WRITTEN),
            "work/new",
            "work/new/pyramid.json",
            *(f"work/new/{name}" for name in ("trace.json", "rounds.svg", "rounds.png")),
        ),
    )


def _argv(dice: random.Random) -> list[str]:
    commands = {
        "generate": 60,
        "init": 10,
        "info": 10,
        "tune": 12,
        "explain": 4,
        "bench": 4,
        "profile": 4,
        "demo": 2,
    }
    commands |= {"--version": 1, "nonsense": 1}
    command = dice.choices(list(commands), list(commands.values()))[0]
    if command not in _FLAGS:
        return [command, *dice.choices(_VALUES, k=dice.randrange(3))]
    argv = [command]
    if command in ("generate", "profile"):
        argv += ["--device=cpu", "--max-new-tokens=2", "--weights=TINY"]
    elif command == "tune" or command == "explain":
        argv += ["--device=cpu", "--budget=0.2", "--max-new-tokens=4", "--repeats=1", "--prompts=PROMPTS"]
    elif command == "bench":
        argv += ["--device=cpu", "--repeats=1", "--prompt-tokens=3", "--new-tokens=4"]
    elif command == "demo":
        argv += ["--device=cpu", "--max-new-tokens=1", "--repeats=1", "--weights=TINY"]
    elif command == "init":
        argv += ["--target=TINY/target"]
    for flag in dice.choices(_FLAGS[command], k=dice.choice((0, 1, 1, 2, 3))):
        # What takes long by design is left alone.
        if flag in ("--budget", "--repeats") or (command == "demo" and flag == "--max-new-tokens"):
            continue
        value = dice.choice(_VALUES)
        if command in ("tune", "bench") and flag == "--json" and not value.startswith("/"):
            value = "measured.json"
        if flag == "--out":  # which is made where it is not there
            value = "new"
        argv += [f"{flag}={value}"] if dice.random() < 0.7 else [flag, value]
    argv += dice.sample(_SWITCHES[command], dice.randrange(len(_SWITCHES[command]) + 1))
    if command in ("generate", "profile", "init", "tune", "explain", "bench") and dice.random() < 0.95:
        text = dice.choice(("ab", *_VALUES))
        place = {"generate": text, "profile": text, "init": "new"}.get(command, "TINY")
        argv += ["--", place] if dice.random() < 0.2 else [place]
    return argv


def _run(argv: list[str], work: os.PathLike[str]) -> None:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", "replace"), io.StringIO()
    before, stdin = os.getcwd(), sys.stdin
    os.chdir(work)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"ab"))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
    except SystemExit as end:  # help and the version
        status = int(end.code or 0)
    finally:
        os.chdir(before)
        sys.stdin = stdin
    said = err.getvalue().splitlines()
    if status not in (0, 2) or "Traceback" in err.getvalue():
        raise Failure(f"status {status}: {said[-1:]}")
    mistakes = [line for line in said if line.startswith("pyramid-rt: error: ")]
    if len(mistakes) != (1 if status else 0):
        raise Failure(f"status {status} with {len(mistakes)} lines of error: {said[:2]}")
