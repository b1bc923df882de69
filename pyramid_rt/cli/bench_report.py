"""The report of ``bench``: a table of speeds, and the same as JSON with what they were measured on."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from pyramid_rt import __version__
from pyramid_rt.decoding.place import threads_in
from pyramid_rt.decoding.place.threads import processor
from pyramid_rt.tuning.compare import BASELINE
from pyramid_rt.tuning.speeds import Speed, Spread

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid

_KEY = (
    "Random prompts of the model's own vocabulary, greedy, end-of-sequence ignored, methods taking turns; medians of "
    "{} (+-: half of least to most, in percent of the median). Decoding is what follows the first token; lower tiers "
    "process the prompt in that time. GB/s of weights that its passes read, by formula. How many proposed tokens "
    "stand depends on the text: tune and explain take prompts of yours."
)


def print_speeds(console: Console, speeds: Sequence[Speed], repeats: int) -> None:
    """Print the table, within 80 columns, and its key."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for header in ("prompt", "new"):
        table.add_column(header, justify="right")
    table.add_column("method")
    headers = (
        "first\nms",
        "prefill\ntok/s",
        "+- %",
        "decode\ntok/s",
        "+- %",
        f"x {BASELINE}",
        "per\npass",
        "GB/s",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for place, one in enumerate(speeds):
        again = place > 0 and speeds[place - 1].case == one.case
        table.add_row(
            "" if again else f"{one.case.prompt}",
            "" if again else f"{one.case.new}",
            one.method,
            f"{1000 * one.first_token.median:.1f}",
            f"{one.prefill.median:.0f}",
            _percent(one.prefill),
            f"{one.decode.median:.1f}",
            _percent(one.decode),
            "–" if one.ratio is None else f"{one.ratio.median:.2f}",
            "–" if one.tokens_per_target_forward is None else f"{one.tokens_per_target_forward:.2f}",
            "–" if one.bandwidth is None else f"{one.bandwidth.median / 1e9:.1f}",
        )
    console.print(table)
    console.print(_KEY.format(repeats), style="dim")


def speeds_object(pyramid: Pyramid, speeds: Sequence[Speed], repeats: int) -> dict[str, Any]:
    """Everything measured, as a JSON object."""
    return {
        "what": "speeds of decoding methods; seconds, tokens per second, bytes per second, over the repeats",
        "environment": environment(pyramid),
        "repeats": repeats,
        "tiers": [tier.name for tier in pyramid.tiers],
        "speeds": [asdict(one) for one in speeds],
    }


def environment(pyramid: Pyramid) -> dict[str, Any]:
    """The machine, versions and settings that a measurement belongs to."""
    cuda = pyramid.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(pyramid.device) if cuda else "cpu",
        "processor": processor(),
        "threads": threads_in(pyramid.place),
        "dtype": _dtype(pyramid),
        "control": pyramid.control,
        "graphs": pyramid.graphs,
        "max_seq": pyramid.max_seq,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "pyramid_rt": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _dtype(pyramid: Pyramid) -> str | None:
    cache = getattr(pyramid.tiers[-1], "cache", None)
    return None if cache is None else str(cache.k[0].dtype).removeprefix("torch.")


def _percent(spread: Spread) -> str:
    return f"{50 * (spread.most - spread.least) / spread.median:.0f}"
