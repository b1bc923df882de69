"""Instructions and bytes of compiled kernels, counted by the machine: `PYTHONPATH=tests python -P -m ptx.counted`.

The table of docs/kernels.md is what this prints for sm_90; with --decode, the sums over a generation of a pyramid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from ptx import device
from ptx.machine import Counts, Schedule

# By their kernels' names for them, what some programs of a launch leave for others: no part of a formula.
SCRATCH = ("partials", "acc", "stats", "arrivals", "picked", "found", "values", "amounts", "winners", "winning",
           "distance")  # fmt: skip
HEAD = (
    "| kernel | formula: read + written | weights, cache or rows read | other reads | written | scratch: read + "
    "written | sectors: read + written | conflicts | barriers | instructions |"
)


def bytes_of(counts: Counts, names: Iterable[str], which: int) -> int:
    """Bytes read (0) or written (1) of some buffers, each range once, whatever it is called besides."""
    return sum(counts.traffic[f"{name}_ptr"][which] for name in names if f"{name}_ptr" in counts.traffic)


def lines() -> list[str]:
    """A row of the table for every kernel, on the small inputs of `subjects`."""
    from ptx.held import FORMULAS, formula_of
    from ptx.subjects import LAUNCHES, subject

    found = []
    for name in LAUNCHES:
        kept = subject(name)
        with device.counted() as launched:
            kept.run()
        [(_, counts)] = launched
        expected, terms = formula_of(name), FORMULAS[name]
        formula = "" if expected is None else f"{expected.read:,} + {expected.written:,}"
        streamed = bytes_of(counts, terms.streamed, 0)
        # The arrivals of products; in a decision these are its statistics.
        shared = SCRATCH if "arrivals_ptr" in counts.traffic else (*SCRATCH, "counters")
        scratch = [bytes_of(counts, shared, which) for which in (0, 1)]
        loaded, stored = (sum(by_width.values()) for by_width in (counts.loaded, counts.stored))
        found.append(
            f"| `{name}` | {formula} | {streamed:,} | {loaded - streamed - scratch[0]:,} | "
            f"{stored - scratch[1]:,} | {scratch[0]:,} + {scratch[1]:,} | {counts.load_sectors:,} + "
            f"{counts.store_sectors:,} | {counts.conflicts:,} | {counts.barriers:,} | {counts.instructions:,} |"
        )
    return found


def markdown() -> str:
    """The table of docs/kernels.md."""
    return "\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *lines()])


def decode(weights: Path, tokens: int, method: str) -> str:
    """Sums over the launches of a generation, by kernel."""
    import pyramid_rt

    pyramid = pyramid_rt.load(
        weights, device="cpu", backend="triton", dtype="bfloat16", control="device", max_seq=512
    )
    with device.scheduled(Schedule(detect=False)), device.counted() as launched:
        pyramid.generate("def fib(n):\n", method=method, max_new_tokens=tokens)
    pyramid.close()
    kernels = dict.fromkeys(name for name, _ in launched)
    rows = ["| kernel | launches | instructions | read | written |", "|---|---|---|---|---|"]
    for kernel in kernels:
        every = [counts for name, counts in launched if name == kernel]
        read, written = (
            sum(sum(getattr(counts, part).values()) for counts in every) for part in ("loaded", "stored")
        )
        executed = sum(counts.instructions for counts in every)
        rows.append(f"| `{kernel}` | {len(every):,} | {executed:,} | {read:,} | {written:,} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="ptx.counted", description=__doc__)
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90)
    parser.add_argument("--decode", type=int, metavar="TOKENS", help="count a generation instead")
    parser.add_argument(
        "--weights", type=Path, help="of --decode: a pyramid's directory; the demo's if left out"
    )
    parser.add_argument("--method", default="psd")
    given = parser.parse_args()
    device.install(given.arch)
    import pyramid_rt

    demo = Path(pyramid_rt.__file__).parent / "demo"
    if given.decode:
        print(decode(given.weights or demo, given.decode, given.method))
    else:
        print(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
