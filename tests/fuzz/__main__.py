"""Run the fuzzer: `python -m fuzz [KIND] --seconds N --seed N [--only N]`."""

from __future__ import annotations

import argparse
import sys

import torch

from fuzz import arguments, command_lines, directories
from fuzz.runner import Make, fuzz

KINDS: dict[str, Make] = {
    "directories": directories.case,
    "arguments": arguments.case,
    "command_lines": command_lines.case,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="one kind only")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kind (60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one case, to run it alone")
    given = parser.parse_args()
    failed = False
    torch.set_num_threads(1)  # a process with threads cannot be forked
    for kind in [given.kind] if given.kind else KINDS:
        report = fuzz(kind, KINDS[kind], seed=given.seed, seconds=given.seconds, only=given.only)
        print(
            f"{kind}: {report.cases} cases, {len(report.failures)} failures, {report.known} known", flush=True
        )
        for failure in report.failures:
            print(f"  {failure}".encode("utf-8", "backslashreplace").decode())
        failed = failed or bool(report.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
