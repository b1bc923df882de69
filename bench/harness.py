"""Helpers of the benches: contenders side by side in one process, and what a row must say about where it ran."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyramid_rt.decoding.place.threads import processor
from pyramid_rt.tuning.turns import take_turns

P = TypeVar("P")


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit, for the head of a result file."""
    import transformers
    import triton

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


@dataclass
class Timings:
    """Outcomes of contenders on the same prompts.

    Attributes:
        outputs: per contender, the tokens of each prompt (of the last repeat).
        rates: per contender and repeat, new tokens per second over all prompts.
    """

    outputs: dict[str, list[list[int]]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median tokens per second."""
        return statistics.median(self.rates[name])

    def ratio(self, name: str, baseline: str) -> list[float]:
        """Minimum, median and maximum over the repeats of one contender's rate over another's."""
        pairs = sorted(a / b for a, b in zip(self.rates[name], self.rates[baseline], strict=True))
        return [pairs[0], statistics.median(pairs), pairs[-1]]

    def same_tokens(self, a: str, b: str) -> bool:
        """True where two contenders wrote the same."""
        return self.outputs[a] == self.outputs[b]


def side_by_side(
    contenders: dict[str, Callable[[P], list[int]]], prompts: Sequence[P], repeats: int
) -> Timings:
    """Time contenders taking turns on prompts, after one unmeasured turn on the first prompt.

    Args:
        contenders: by name; each takes a prompt and returns its new tokens.
    """
    for run in contenders.values():
        run(prompts[0])
    turns = take_turns(list(contenders.values()), prompts, repeats, tokens=len)
    result = Timings()
    for place, name in enumerate(contenders):
        result.outputs[name] = [run.outcome for run in turns.runs(place, -1)]
        result.rates[name] = turns.rates(place)
    return result


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
