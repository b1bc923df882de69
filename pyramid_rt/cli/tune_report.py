"""The report of ``tune``: what it measured, the finalists, and what follows from them in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pyramid_rt.cli.report import counted
from pyramid_rt.decoding.methods import TIERS_NEEDED
from pyramid_rt.tuning.candidates import agreement, standing_share, thresholds
from pyramid_rt.tuning.compare import BASELINE
from pyramid_rt.tuning.replay import Costs, Prediction, Setting
from pyramid_rt.tuning.search import LOSSY_GAIN, Row, Tuning

_WIDTHS_SHOWN = (1, 2, 4, 8, 16, 32)
_KEY = (
    "* chosen. Lengths draft/qualifier, thresholds qualifier/target and tokens accepted draft/qualifier, of those "
    f"that the method has; tokens per second as the model said and as run, and over those of {BASELINE}; tokens per "
    f"target pass. The tokens are as {BASELINE} writes them, or other ones of the same distribution, or so many are "
    "not the target's own (! too many)."
)
# Options of a setting: how they are said.
_WRITTEN = {
    "draft_length": "draft {}",
    "qualifier_length": "qualifier {}",
    "qualifier_threshold": "qualifier threshold {:g}",
    "target_threshold": "target threshold {:g}",
}


def print_tuning(console: Console, tuning: Tuning) -> None:
    """Print measurements, finalists and the verdict."""
    console.print(passes_table(tuning.tiers, tuning.costs))
    console.print()
    console.print(_agreement(tuning))
    console.print()
    console.print(_finalists(tuning))
    console.print(_KEY, style="dim")
    console.print()
    for sentence in words(tuning):
        console.print(sentence)


def words(tuning: Tuning) -> list[str]:
    """The runs, the promise of lossless settings kept or not, and the race's outcome, a sentence or two each."""
    temperature = tuning.common["temperature"]
    how = "greedy" if temperature == 0 else f"at temperature {temperature:g}"
    left = tuning.prompts_given - tuning.prompts - tuning.prompts_silent
    run = (
        f"The model priced {len(tuning.considered):,} settings; {len(tuning.rows)} were run, taking turns, "
        f"{how}, on {counted(tuning.prompts, 'prompt')} of up to {tuning.length} new tokens; "
        f"median of {tuning.repeats}."
    )
    if tuning.prompts_silent:
        run += f" After {counted(tuning.prompts_silent, 'prompt')} the target ended its text at once."
    if left:
        run += f" {counted(left, 'prompt')} left out: the time was over."
    if tuning.length < tuning.options.max_new_tokens:
        run += f" The time was too short for {tuning.options.max_new_tokens} tokens."
    if tuning.repeats < tuning.options.repeats:
        run += f" The time was over before repeat {tuning.repeats + 1} of {tuning.options.repeats}."
    return [run, *_equality(tuning), *_three_tiers(tuning), *_choice(tuning)]


def described(setting: Setting) -> str:
    """A setting in words."""
    parts = [
        text.format(value) for name, text in _WRITTEN.items() if (value := getattr(setting, name)) is not None
    ]
    return setting.method + (f" ({', '.join(parts)})" if parts else "")


def tuning_object(tuning: Tuning, machine: str) -> dict[str, Any]:
    """Everything measured, as a JSON object."""
    return {
        "what": "a search for the defaults of a pyramid; seconds, and tokens per second with prompts included",
        "machine": machine,
        "options": {**asdict(tuning.options), "common": dict(tuning.common)},
        "tiers": tuning.tiers,
        "costs": asdict(tuning.costs),
        "agreement": [
            {
                "proposing": tuning.tiers[pair[0]],
                "verifying": tuning.tiers[pair[1]],
                "match": agreement(tuning.traces, pair),
                "stand": {
                    f"{value:g}": standing_share(tuning.traces, pair, value)
                    for value in thresholds(tuning.traces, pair)
                },
            }
            for pair in _pairs(tuning)
        ],
        "considered": [_prediction(one) for one in tuning.considered],
        "run": [
            {**asdict(row), "prediction": _prediction(row.prediction), "lossless": row.setting.lossless}
            for row in tuning.rows
        ],
        "length": tuning.length,
        "prompts": {"given": tuning.prompts_given, "used": tuning.prompts},
        "repeats": tuning.repeats,
        "chosen": tuning.defaults(),
    }


def _prediction(one: Prediction) -> dict[str, Any]:
    return {
        **one.setting.options(),
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_target_forward": one.tokens_per_target_forward,
        "differs": one.differs,
    }


def passes_table(tiers: Sequence[str], costs: Costs) -> Table:
    """Milliseconds of a forward pass of each tier, by its width."""
    table = _table("ms per forward pass, by tokens in it")
    shown = [width for width in _WIDTHS_SHOWN if width <= max(c.widths[-1] for c in costs.curves)]
    for width in shown:
        table.add_column(str(width), justify="right")
    for name, curve in zip(tiers, costs.curves, strict=True):
        cells = (f"{1000 * curve.at(width):.2f}" if width <= curve.widths[-1] else "" for width in shown)
        table.add_row(name, *cells)
    return table


def _agreement(tuning: Tuning) -> Table:
    """Shares of positions that stand by match, and by threshold, each below its threshold."""
    kind = tuning.common["divergence"]
    table = _table("tokens that stand")
    table.add_column("match", justify="right")
    found = [(pair, thresholds(tuning.traces, pair)) for pair in _pairs(tuning)]
    for place in range(max(len(values) for _, values in found)):
        table.add_column(f"{kind} <=" if place == 0 else "", justify="right", no_wrap=True)
    for pair, values in found:
        shares = (f"{v:g}\n{100 * standing_share(tuning.traces, pair, v):.0f} %" for v in values)
        name = f"{tuning.tiers[pair[0]]} to {tuning.tiers[pair[1]]}"
        table.add_row(name, f"{100 * agreement(tuning.traces, pair):.0f} %", *shares)
    return table


def _pairs(tuning: Tuning) -> list[tuple[int, int]]:
    last = len(tuning.tiers) - 1
    return [(0, 1), (1, last), (0, last)] if last > 1 else [(0, last)]


def _finalists(tuning: Tuning) -> Table:
    table = _table("method", gap=1)  # eighty columns just hold it
    table.add_column("lengths")
    table.add_column("thres-\nholds")
    for header in ("tok/s\nmodel", "tok/s\nrun", f"x {BASELINE}", "per\npass"):
        table.add_column(header, justify="right")
    table.add_column("accep-\nted", justify="right")
    table.add_column("tokens")
    for row in sorted(tuning.rows, key=lambda row: -row.ratio):
        setting, chosen = row.setting, row is tuning.chosen
        table.add_row(
            f"{setting.method}{' *' if chosen else ''}{' (now)' if row.current else ''}",
            _joined(setting.draft_length, setting.qualifier_length),
            _joined(setting.qualifier_threshold, setting.target_threshold),
            f"{row.prediction.tokens_per_second:.1f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.ratio:.2f}",
            "–" if row.tokens_per_target_forward is None else f"{row.tokens_per_target_forward:.2f}",
            "/".join("–" if share is None else f"{100 * share:.0f}" for share in row.acceptance.values())
            + (" %" if row.acceptance else ""),
            _tokens(row, tuning),
            style="bold green" if chosen else None,
        )
    return table


def _joined(*values: float | None) -> str:
    return "/".join(f"{value:g}" for value in values if value is not None)


def _tokens(row: Row, tuning: Tuning) -> str:
    """The relation of a row's tokens to the target's own."""
    if row.differs is not None:
        return f"{100 * row.differs:.1f} %{' !' if row.differs > tuning.options.max_differs else ''}"
    if row.unequal is None:
        return "others"
    return f"as {BASELINE}" if not row.unequal else f"{row.unequal} NOT"


def _equality(tuning: Tuning) -> list[str]:
    """A sentence on lossless settings: they wrote the baseline's tokens, or not."""
    checked = [row for row in tuning.rows if row.unequal is not None and row.setting.method != BASELINE]
    wrong = [row for row in checked if row.unequal]
    found = [
        f"{described(row.setting)} is NOT equal to {BASELINE}: {row.unequal} of {tuning.prompts} outputs have "
        "other tokens. On the torch backend a near tie of two scores can do that; anything else is a fault."
        for row in wrong
    ]
    if checked and not wrong:
        found.append(
            f"Every lossless setting wrote {BASELINE}'s tokens, compared one by one on every prompt."
        )
    return found


def _three_tiers(tuning: Tuning) -> list[str]:
    """A verdict on three tiers: among lossless settings and, where there are others, among all that are allowed."""
    if len(tuning.tiers) < 3:
        return [f"With {len(tuning.tiers)} tiers there is no method of three to try."]
    lossless = [row for row in tuning.rows if row.differs is None]
    allowed = [row for row in tuning.rows if (row.differs or 0.0) <= tuning.options.max_differs]
    found = [_pays(lossless, "")]
    if len(allowed) > len(lossless):
        found.append(_pays(allowed, "With lossy methods: "))
    return found


def _pays(rows: Sequence[Row], prefix: str) -> str:
    three = _fastest([row for row in rows if TIERS_NEEDED[row.setting.method] > 2])
    fewer = _fastest([row for row in rows if TIERS_NEEDED[row.setting.method] <= 2])
    assert fewer is not None  # the baseline is always there
    if three is None:
        return f"{prefix}No setting of three tiers was run: the budget was too small."
    if fewer.ratio >= three.ratio:
        return (
            f"{prefix}{fewer.setting.method} beats three tiers here: {described(fewer.setting)} is "
            f"{fewer.ratio / three.ratio:.2f}x as fast as the best of them, {described(three.setting)}."
        )
    return (
        f"{prefix}Three tiers pay here: {described(three.setting)} is {three.ratio / fewer.ratio:.2f}x as fast as "
        f"the best with fewer, {described(fewer.setting)}."
    )


def _choice(tuning: Tuning) -> list[str]:
    row = tuning.chosen
    said = []
    if row.setting.lossless:
        lossy = [one for one in tuning.rows if one.differs is not None]
        faster = _fastest([one for one in lossy if (one.differs or 0.0) <= tuning.options.max_differs])
        if faster is not None and faster.ratio > row.ratio:
            said.append(
                f"{described(faster.setting)} is faster than the best lossless setting by less than "
                f"{100 * (LOSSY_GAIN - 1):.0f} %: not worth giving up the target's own text."
            )
    if row.setting.method == BASELINE:
        return [
            *said,
            f"Plain decoding ({BASELINE}) is chosen{'' if said else ': nothing that was run beats it'}.",
        ]
    kind = "lossless" if row.setting.lossless else f"lossy, {100 * (row.differs or 0):.1f} % not the target's"
    return [*said, f"Chosen: {described(row.setting)}, {row.ratio:.2f}x {BASELINE}, {kind}."]


def _fastest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row.ratio, default=None)


def _table(first: str, gap: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    table.add_column(first)
    return table
