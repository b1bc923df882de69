"""Speed on a CPU when it is quiet, and beside one busy loop, by the number of threads and how they wait.

    python -m bench.threads [--weights weights/smollm2] [--repeats 5] [--json FILE]

The demo pyramid, and SmolLM2 where its weights are. Contenders, each in a process of its own, since how long threads
spin is decided for a whole process: `default`, what `load` chooses; `spinning`, torch's own number of threads that
wait as OpenMP has it, which is what comes without any of this; and numbers of threads that wait as the default's
do. They take turns, first with nothing else running, then beside a process that does nothing but count, with no
variable set that tells OpenMP what to do. Rates are medians of new tokens per second; ratios are medians over the
repeats of rates of one repeat. Exit status 1 where the default misses a goal: at least half its quiet speed beside
the loop, and at least 90% of the spinning contender's when quiet. Only on a machine that has nothing else to do does
this say anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pyramid_rt
from bench.harness import write_json
from pyramid_rt.decoding.place.threads import available_cpus

SMOLLM2 = Path("weights/smollm2")
PROMPT = (
    "import os\nimport sys\n\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv[1:]\n"
)
NEW_TOKENS = {"demo": 192, "smollm2": 48}
DEFAULT, SPINNING = "default", "spinning"
LEAST_BESIDE, LEAST_QUIET = 0.5, 0.9
_VARIABLES = ("OMP_", "GOMP_", "MKL_", "KMP_")


@dataclass
class Rates:
    """New tokens per second of each contender, by repeat."""

    quiet: dict[str, list[float]] = field(default_factory=dict)
    beside: dict[str, list[float]] = field(default_factory=dict)

    def kept(self, name: str) -> float:
        """The share of its quiet speed that a contender keeps beside the loop."""
        return statistics.median(b / q for b, q in zip(self.beside[name], self.quiet[name], strict=True))

    def against(self, name: str, other: str) -> float:
        """A contender's quiet speed over another's."""
        return statistics.median(a / b for a, b in zip(self.quiet[name], self.quiet[other], strict=True))

    def misses(self) -> list[str]:
        """Goals that the default misses, in words."""
        found = []
        if self.kept(DEFAULT) < LEAST_BESIDE:
            found.append(f"beside the loop {self.kept(DEFAULT):.0%} of its speed, goal {LEAST_BESIDE:.0%}")
        if self.against(DEFAULT, SPINNING) < LEAST_QUIET:
            ratio = self.against(DEFAULT, SPINNING)
            found.append(f"quiet {ratio:.0%} of the speed of {SPINNING!r}, goal {LEAST_QUIET:.0%}")
        return found


class Contender:
    """A pyramid in a process of its own, which decodes once for every line it is sent."""

    def __init__(self, weights: Path, name: str, new_tokens: int) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_VARIABLES)}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.threads", "--serve", name),
                *("--weights", str(weights), "--new-tokens", str(new_tokens)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.rate()  # which loads and warms up

    def rate(self) -> float:
        """New tokens per second of one generation."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended with status {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(weights: Path, name: str, new_tokens: int) -> None:
    """A contender's side: for every line of standard input, decode once and print the rate."""
    with ExitStack() as stack:
        threads = int(name.split()[0]) if name[0].isdigit() else None
        if name == SPINNING:
            stack.enter_context(mock.patch("pyramid_rt.api.default_threads", return_value=None))
        rt = stack.enter_context(pyramid_rt.load(weights, device="cpu", threads=threads))
        for _ in sys.stdin:
            begin = time.perf_counter()
            result = rt.generate(PROMPT, max_new_tokens=new_tokens, ignore_eos=True)
            print(len(result.tokens) / (time.perf_counter() - begin), flush=True)


@contextmanager
def busy_loop() -> Iterator[None]:
    """Another process that does nothing but run, and ends with this one, however that ends."""
    program = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(weights: Path, new_tokens: int, repeats: int) -> Rates:
    """All contenders on one pyramid, taking turns, quiet and then beside the loop."""
    names = [DEFAULT, SPINNING, *(_name(count) for count in _counts())]
    rates = Rates()
    with ExitStack() as stack:
        contenders = {}
        for name in names:
            contenders[name] = Contender(weights, name, new_tokens)
            stack.callback(contenders[name].close)
        for found, beside in ((rates.quiet, False), (rates.beside, True)):
            found.update({name: [] for name in names})
            with busy_loop() if beside else ExitStack():
                for _ in range(repeats):
                    for name, contender in contenders.items():
                        found[name].append(contender.rate())
    return rates


def _counts() -> list[int]:
    """Numbers of threads to try: powers of two, and all CPUs."""
    most = available_cpus()
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def _name(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def report(name: str, rates: Rates) -> dict[str, Any]:
    """Print a pyramid's table; the same for JSON."""
    print(f"{name}: new tokens per second, median")
    print(f"  {'':12} {'quiet':>9} {'beside a loop':>14} {'kept':>6} {'to spinning':>12}")
    rows = []
    for contender in rates.quiet:
        quiet, beside = (statistics.median(found[contender]) for found in (rates.quiet, rates.beside))
        kept, ratio = rates.kept(contender), rates.against(contender, SPINNING)
        print(f"  {contender:12} {quiet:9.1f} {beside:14.1f} {kept:6.0%} {ratio:12.2f}")
        rows.append(
            {"contender": contender, "quiet": quiet, "beside": beside, "kept": kept, "to_spinning": ratio}
        )
    misses = rates.misses()
    for missed in misses:
        print(f"  missed: {missed}")
    return {"pyramid": name, "rows": rows, "missed": misses}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 1 where a goal was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, default=SMOLLM2, help=f"of SmolLM2 ({SMOLLM2})")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--new-tokens", type=int, help="per turn (192 for the demo, 48 for SmolLM2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        serve(arguments.weights, arguments.serve, arguments.new_tokens)
        return 0
    pyramids = {"demo": pyramid_rt.demo_weights()}
    if arguments.weights.is_dir():
        pyramids["smollm2"] = arguments.weights
    found = []
    for name, weights in pyramids.items():
        rates = measure(weights, arguments.new_tokens or NEW_TOKENS[name], arguments.repeats)
        found.append(report(name, rates))
    if arguments.json is not None:
        write_json(arguments.json, {"cpus": available_cpus(), "pyramids": found})
        print(json.dumps({"written": str(arguments.json)}))
    return int(any(entry["missed"] for entry in found))


if __name__ == "__main__":
    raise SystemExit(main())
