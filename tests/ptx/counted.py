"""Instructions and bytes of compiled kernels, counted by the machine: `PYTHONPATH=tests python -P -m ptx.counted`.

The table of docs/kernels.md is what this prints for sm_90; with --decode, the sums over a generation of a pyramid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def decode(weights: Path, prompt: Any, loading: dict[str, Any], options: dict[str, Any]) -> str:
    """Sums over the launches of a generation, by kernel; `loading` is for `load`, `options` for `generate`."""
    import pyramid_rt

    given = {"dtype": "bfloat16", "max_seq": 512, **loading}
    with (
        pyramid_rt.load(weights, device="cpu", backend="triton", control="device", **given) as pyramid,
        device.scheduled(Schedule(detect=False)),
        device.counted() as launched,
    ):
        result = pyramid.generate(prompt, **options)
    kernels = dict.fromkeys(name for name, _ in launched)
    stats = result.stats
    about = (
        f"{stats.method}: {stats.prompt_tokens} tokens of prompt, {stats.new_tokens} new, {given['dtype']}"
    )
    rows = [about, "", "| kernel | launches | instructions | read | written |", "|---|---|---|---|---|"]
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
    parser.add_argument(
        "--request",
        action="store_true",
        help="count the generation that a JSON object on standard input says",
    )
    given = parser.parse_args()
    device.install(given.arch)
    import pyramid_rt

    demo = Path(pyramid_rt.__file__).parent / "demo"
    try:
        if given.request:
            print(decode(**json.load(sys.stdin)))
        elif given.decode:
            options = {"method": given.method, "max_new_tokens": given.decode}
            print(decode(given.weights or demo, "def fib(n):\n", {}, options))
        else:
            print(markdown())
    except pyramid_rt.PyramidError as error:
        print(f"pyramid-rt: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
