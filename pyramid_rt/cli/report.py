"""Tables of the command line: results, the comparison of methods, and the contents of a weights directory."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from pyramid_rt.decoding.methods import LOSSLESS_METHODS
from pyramid_rt.decoding.place import threads_in
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.backends.choice import exactness
from pyramid_rt.models.llama import parameter_count
from pyramid_rt.tuning.compare import BASELINE, MethodReport

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid
    from pyramid_rt.result import GenerationResult

MIB = 2**20


def counted(number: int, what: str) -> str:
    """A number of things in words, as "1 thread"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def summary(result: GenerationResult, max_seq: int) -> str:
    """Return one line on a result of a pyramid of `max_seq` positions: how much, how fast, why it ended."""
    stats = result.stats.to_dict()
    full = result.finish_reason == "length" and result.usage["total_tokens"] >= max_seq
    parts = [
        counted(len(result.tokens), "token"),
        f"{_number(stats['tokens_per_second'])} tokens/s",
        f"{_number(stats['tokens_per_target_forward'], 2)} per target pass",
        f"first after {_number(_thousandfold(stats['time_to_first_token']))} ms",
        f"ended by {result.finish_reason}" + (f" (the context of {max_seq} is full)" if full else ""),
        f"seed {result.seed}",
    ]
    return " · ".join(parts)


def machine(pyramid: Pyramid) -> str:
    """Return what a measurement was made on, in one line."""
    dtype = str(_models(pyramid)[-1].cache.k[0].dtype).removeprefix("torch.")
    if pyramid.device.type == "cuda":
        where = torch.cuda.get_device_name(pyramid.device)
    else:
        where = f"{platform.machine()} CPU, {counted(threads_in(pyramid.place), 'thread')}"
    return f"{where} · {dtype} · torch {torch.__version__}"


def print_comparison(
    console: Console, rows: Sequence[MethodReport], prompts: int, max_new_tokens: int
) -> None:
    """Print the table of methods and, in words, whether the lossless ones kept their promise."""
    names = list(dict.fromkeys(name for row in rows for name in row.acceptance))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("method", "lossless"):
        table.add_column(header)
    headers = ["tokens/s", f"x {BASELINE}", "tokens per\ntarget pass"]
    for header in (*headers, *(f"{name}\naccepted" for name in names), "not the\ntarget's"):
        table.add_column(header, justify="right")
    best = max(
        (row for row in rows if row.lossless and not row.unequal), key=lambda row: row.ratio, default=None
    )
    for row in rows:
        table.add_row(
            f"{row.method} *" if row is best else row.method,
            "yes" if row.lossless else "no",
            _number(row.tokens_per_second),
            _number(row.ratio, 2),
            _number(row.tokens_per_target_forward, 2),
            *(_percent(row.acceptance.get(name)) for name in names),
            "0" if row.lossless else _percent(row.differs),
            style="bold green" if row is best else None,
        )
    console.print(table)
    if best is not None:
        turn = f"x {BASELINE}, its speed over {BASELINE}'s of the same turn"
        console.print(f"* the fastest that writes what {BASELINE} writes, by {turn}", style="dim")
    console.print(
        f"Greedy, {prompts} prompts of {max_new_tokens} new tokens each, methods taking turns; "
        f"median of {rows[0].repeats}."
    )
    console.print(verdict(rows, prompts))


def verdict(rows: Sequence[MethodReport], prompts: int) -> str:
    """Return whether each lossless method gave the baseline's tokens, in plain words."""
    checked = [row for row in rows if row.lossless and row.method != BASELINE]
    if not checked:
        return f"Only {BASELINE} of the lossless methods could run; there was nothing to compare."
    words = [
        f"{row.method} is NOT equal to {BASELINE}: {row.unequal} of {prompts} outputs have other tokens."
        for row in checked
        if row.unequal
    ]
    equal = [row.method for row in checked if not row.unequal]
    if equal:
        words.append(
            f"Compared token by token with {BASELINE} on all {prompts} prompts: {' and '.join(equal)} "
            f"{'is' if len(equal) == 1 else 'are'} equal."
        )
    return " ".join(words)


def print_info(console: Console, pyramid: Pyramid) -> None:
    """Print tiers, memory plan, methods and defaults."""
    assert pyramid.memory_plan is not None  # there is one for whatever `load` made
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tier")
    for header in ("parameters", "layers", "hidden", "heads", "weights\nMiB", "cache\nMiB", "buffers\nMiB"):
        table.add_column(header, justify="right")
    for tier, (name, *sizes) in zip(_models(pyramid), pyramid.memory_plan.rows(), strict=True):
        config = tier.config
        heads = f"{config.num_heads}/{config.num_kv_heads}"
        counts = (parameter_count(config), config.num_layers, config.hidden_size)
        table.add_row(name, *(f"{count:,}" for count in counts), heads, *(_mib(size) for size in sizes))
    console.print(table)
    target = _models(pyramid)[-1]
    with pyramid.place.work():  # on the threads that it will run on
        exact = exactness(target.model.backend.name, target.model.rotary.dtype, target.device)
    lines = {
        "memory": f"{_mib(pyramid.memory_plan.total)} MiB",
        "runs on": machine(pyramid),
        "exactness": exact,
        "context": f"{pyramid.max_seq} tokens",
        "methods": ", ".join(
            f"{method} (lossless)" if method in LOSSLESS_METHODS else method for method in pyramid.methods
        ),
        "default": pyramid.default_method,
        "defaults set": ", ".join(f"{key} {value}" for key, value in pyramid.defaults.items()) or "none",
        **{
            f"of {method}": ", ".join(f"{key} {value}" for key, value in options.items())
            for method, options in pyramid.method_defaults.items()
        },
    }
    for name, value in lines.items():
        line = f"{name:<13} {value}"
        if not console.soft_wrap:
            line = textwrap.fill(line, console.width, subsequent_indent=" " * 14)
        console.print(line, markup=False)


def _models(pyramid: Pyramid) -> list[ModelTier]:
    """The tiers of a pyramid that came from a directory: each is a model."""
    return [tier for tier in pyramid.tiers if isinstance(tier, ModelTier)]


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f}"


def _thousandfold(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
