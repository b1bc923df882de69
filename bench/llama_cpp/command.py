"""Our plain decoding beside llama.cpp's on SmolLM2-135M: each in a process of its own, taking turns on a CPU.

    python -m bench.llama_cpp [--python PATH] [--json FILE]

For each type of weights and each length of the prompt, both process the prompt once and then decode from its end in
turns, greedily; figures are medians of the turns, ratios are of the same turn. llama.cpp is the package
llama-cpp-python, which may be installed in another environment, whose interpreter --python names. It is built from
source, for minutes; on a virtual machine with AMX its native build may crash, and
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON
-DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import environment, write_json
from bench.llama_cpp.files import KINDS, gguf_file
from bench.smollm2_weights import fetch

WORKER = Path(__file__).parent / "worker.py"
ROOT = Path(__file__).parents[2]
GOAL = 1.15


class Worker:
    """A contender's process."""

    def __init__(self, python: str, contender: str, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, str(WORKER), contender, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.contender = contender
        self._answer()

    def ask(self, prompt: Sequence[int], new_tokens: int, *, fresh: bool) -> dict[str, Any]:
        """One turn."""
        assert self._process.stdin is not None
        asked = {"prompt": list(prompt), "new_tokens": new_tokens, "fresh": fresh}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.contender} ended with status {self._process.wait()}; its message is above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Row:
    """One type of weights at one length; tokens per second, ours over theirs."""

    dtype: str
    context: int
    ours: float
    theirs: float
    ratio: tuple[float, float, float]
    prompt_ours: float
    prompt_theirs: float
    same_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "ratio": list(self.ratio)}


def measure(
    workers: dict[str, Worker], dtype: str, prompt: Sequence[int], new_tokens: int, repeats: int
) -> Row:
    """Both contenders on one prompt."""
    first = {name: worker.ask(prompt, 2, fresh=True) for name, worker in workers.items()}
    rates: dict[str, list[float]] = {name: [] for name in workers}
    tokens: dict[str, list[int]] = {}
    for turn in range(repeats):
        order = list(workers) if turn % 2 == 0 else list(reversed(workers))
        for name in order:
            answer = workers[name].ask(prompt, new_tokens, fresh=False)
            rates[name].append((new_tokens - 1) / answer["decode_s"])
            tokens[name] = answer["tokens"]
    ratios = sorted(a / b for a, b in zip(rates["ours"], rates["llama.cpp"], strict=True))
    pairs = zip(tokens["ours"], tokens["llama.cpp"], strict=True)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), new_tokens)
    return Row(
        dtype,
        len(prompt),
        statistics.median(rates["ours"]),
        statistics.median(rates["llama.cpp"]),
        (ratios[0], statistics.median(ratios), ratios[-1]),
        len(prompt) / first["ours"]["prompt_s"],
        len(prompt) / first["llama.cpp"]["prompt_s"],
        same,
    )


def show(console: Console, rows: Sequence[Row]) -> None:
    """The table."""
    table = Table(title="SmolLM2-135M, tokens/s", title_justify="left")
    for heading in (
        "weights",
        "context",
        "ours",
        "theirs",
        "ratio",
        "least-most",
        "prompt",
        "theirs",
        "same",
    ):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for row in rows:
        low, middle, high = row.ratio
        table.add_row(
            row.dtype,
            str(row.context),
            f"{row.ours:.1f}",
            f"{row.theirs:.1f}",
            f"{middle:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row.prompt_ours:.0f}",
            f"{row.prompt_theirs:.0f}",
            str(row.same_tokens),
        )
    console.print(table)


def prompt_of(directory: Path, length: int) -> list[int]:
    """So many tokens of this project's own prose, repeated as often as it takes."""
    from pyramid_rt.text.tokenizer import Tokenizer

    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    ids = Tokenizer.from_dir(directory).encode(text)
    return (ids * (length // len(ids) + 1))[:length]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write where asked. Exit status 0, whoever is faster."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.llama_cpp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter that has llama_cpp")
    parser.add_argument("--smollm2", type=Path, default=Path("weights/smollm2"), help="fetched when missing")
    parser.add_argument("--dtype", action="append", choices=KINDS, help="default: both")
    parser.add_argument("--context", type=int, action="append", help="default: 256, 2048 and 7800")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of either")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.new_tokens < 2:
        parser.error("--repeats must be at least 1 and --new-tokens at least 2")
    if not (options.smollm2 / "pyramid.json").exists():
        fetch(options.smollm2, None, "float32")
    contexts = options.context or [256, 2048, 7800]
    room = max(contexts) + options.new_tokens + 8
    console, rows = Console(), []
    for dtype in options.dtype or KINDS:
        common = {"threads": options.threads, "context": room}
        target = options.smollm2.resolve() / "target"
        file = gguf_file(options.smollm2.resolve() / "gguf", dtype)
        workers = {
            "ours": Worker(sys.executable, "ours", {**common, "file": str(target), "dtype": dtype}),
            "llama.cpp": Worker(options.python, "llama.cpp", {**common, "file": str(file)}),
        }
        for context in contexts:
            rows.append(
                measure(workers, dtype, prompt_of(target, context), options.new_tokens, options.repeats)
            )
            console.print(f"{dtype} {context}: {rows[-1].ours:.1f} and {rows[-1].theirs:.1f} tokens/s")
        for worker in workers.values():
            worker.close()
    show(console, rows)
    if options.json:
        head = environment("cpu")
        write_json(
            options.json,
            {**head, "threads": options.threads, "goal": GOAL, "rows": [row.to_dict() for row in rows]},
        )
    return 0
