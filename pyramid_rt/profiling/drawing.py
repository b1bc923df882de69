"""The picture of a few rounds as matplotlib draws it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from pyramid_rt.errors import InputError
from pyramid_rt.profiling.picture import Cell, RoundPicture, TokenRow

# By the distance of a tier from the target, the target's own first: Okabe and Ito's colours, told apart by everyone.
TIER_COLOURS = ("#CC79A7", "#E69F00", "#0072B2", "#56B4E9", "#999999")
FATES = {
    "stood": ("#BFE3CF", "stood"),
    "fell": ("#F2B8B5", "fell"),
    "behind": ("#E9E9E9", "behind one that fell"),
    "correction": ("#F9D99A", "correction: the judge's own token"),
    "bonus": ("#BBD7F2", "bonus after a whole proposal"),
    "plain": ("#F1DCEA", "drawn without a proposal"),
}
_WIDTH, _LANE, _ROW, _TITLE = 12.0, 0.24, 0.46, 0.62  # inches
_INK, _FAINT = "#222222", "#777777"


def draw(found: Sequence[RoundPicture], tiers: Sequence[str], machine: str, kind: str) -> bytes:
    """Rounds as a file of `kind`, "svg" or "png".

    Args:
        found: the rounds, one or more. tiers: names, small to large. machine: stands below the title.

    Raises:
        InputError: no matplotlib.
    """
    figure_kind = figure_class()
    heights = [_height(each, len(tiers)) for each in found]
    total = 0.85 + sum(heights) + 0.55
    figure = figure_kind(figsize=(_WIDTH, total), facecolor="white")
    figure.text(
        0.015, 1 - 0.26 / total, "Where the time of a round goes, and what became of each token",
        fontsize=13, fontweight="bold", color=_INK, va="center",
    )  # fmt: skip
    figure.text(0.015, 1 - 0.52 / total, machine, fontsize=8.5, color=_FAINT, va="center", parse_math=False)
    span = max(each.milliseconds for each in found)
    columns = max((cell.column for each in found for row in each.rows for cell in row.cells), default=0) + 1
    colours = {tier: TIER_COLOURS[min(at, 4)] for at, tier in enumerate(reversed(tiers))}
    top = 0.85
    for each, height in zip(found, heights, strict=True):
        _draw_round(figure, each, colours, top, total, span, columns)
        top += height
    _draw_legend(figure, found, colours, total, span)
    out = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with warnings.catch_warnings():
        # A token may hold signs that the font has no picture of; a box stands for them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(out, format=kind, dpi=150, metadata=metadata)
    return out.getvalue()


def figure_class() -> Any:
    """matplotlib's figures, without its windows; imported here alone, for it takes a second.

    Raises InputError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"a picture needs matplotlib, which is not installed ({error}): pip install 'pyramid-rt[profile]'"
        ) from error
    return Figure


def _height(each: RoundPicture, tiers: int) -> float:
    return _TITLE + _LANE * tiers + (0.42 + _ROW * len(each.rows) if each.rows else 0.1)


def _draw_round(
    figure: Any,
    each: RoundPicture,
    colours: dict[str, str],
    top: float,
    total: float,
    span: float,
    columns: int,
) -> None:
    """One round from `top` inches below the figure's upper edge on."""
    left, width = 0.145, 0.84
    lanes = _LANE * len(each.lanes)
    figure.text(
        0.015,
        1 - (top + 0.2) / total,
        f"Round {each.number}: {_time(each.milliseconds, span)} {_unit(span)}, {_tokens(each.committed)} committed",
        fontsize=10.5,
        fontweight="bold",
        color=_INK,
        va="center",
    )
    axes = figure.add_axes((left, 1 - (top + 0.4 + lanes) / total, width, lanes / total))
    _draw_lanes(axes, each, colours, span)
    if not each.rows:
        return
    below = top + 0.4 + lanes + 0.34
    rows = _ROW * len(each.rows)
    axes = figure.add_axes((left, 1 - (below + rows) / total, width, rows / total))
    axes.set_xlim(0, max(columns, 8))
    axes.set_ylim(len(each.rows), 0)
    axes.axis("off")
    for at, row in enumerate(each.rows):
        _draw_tokens(axes, row, at, colours)


def _draw_lanes(axes: Any, each: RoundPicture, colours: dict[str, str], span: float) -> None:
    axes.set_xlim(0, span * 1.001)
    axes.set_ylim(-0.5, len(each.lanes) - 0.5)
    axes.set_yticks(range(len(each.lanes)), [tier for tier, _ in each.lanes], fontsize=9)
    for label, (tier, _) in zip(axes.get_yticklabels(), each.lanes, strict=True):
        label.set_color(colours[tier])
        label.set_fontweight("bold")
    axes.tick_params(axis="x", labelsize=8, colors=_FAINT, length=2, pad=2)
    axes.tick_params(axis="y", length=0)
    if _unit(span) == "us":
        axes.xaxis.set_major_formatter(lambda value, place: f"{1000 * value:g}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    for lane, (tier, bars) in enumerate(each.lanes):
        axes.axhline(lane, color="#EEEEEE", linewidth=0.8, zorder=0)
        for bar in bars:
            forward = bar.what == "forward"
            axes.barh(
                lane,
                bar.end - bar.begin,
                left=bar.begin,
                height=0.72 if forward else 0.34,
                color=colours[tier],
                alpha=1.0 if forward else 0.45,
                edgecolor="white",
                linewidth=0.4,
                zorder=2,
            )
            if forward and bar.end - bar.begin > span * 0.055:
                axes.text(
                    (bar.begin + bar.end) / 2, lane, _time(bar.end - bar.begin, span), fontsize=7, color="white",
                    ha="center", va="center", zorder=3,
                )  # fmt: skip


def _draw_tokens(axes: Any, row: TokenRow, at: int, colours: dict[str, str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.text(
        -0.1, at + 0.34, row.label, fontsize=8.5, color=colours.get(row.judge, _INK), ha="right", va="center",
        fontweight="bold", parse_math=False,
    )  # fmt: skip
    corrected = {cell.column for cell in row.cells if cell.fate == "correction"}
    for cell in row.cells:
        if cell.fate == "fell" and cell.column in corrected:
            _draw_replaced(axes, cell, row, at)
            continue
        if cell.fate == "correction":
            continue
        axes.add_patch(
            FancyBboxPatch(
                (cell.column + 0.03, at + 0.1), 0.94, 0.48, boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=FATES[cell.fate][0], edgecolor="white", mutation_aspect=0.6,
            )
        )  # fmt: skip
        axes.text(
            cell.column + 0.5, at + 0.34, cell.text, fontsize=8, ha="center", va="center", parse_math=False,
            color=_FAINT if cell.fate == "behind" else _INK, family="monospace",
        )  # fmt: skip


def _draw_replaced(axes: Any, cell: Cell, row: TokenRow, at: int) -> None:
    """A token that fell, the one put in its place, and why: both in one column, one above the other."""
    from matplotlib.patches import FancyBboxPatch

    other = next(each for each in row.cells if each.fate == "correction" and each.column == cell.column)
    for each, y in ((cell, at + 0.02), (other, at + 0.35)):
        axes.add_patch(
            FancyBboxPatch(
                (each.column + 0.03, y), 0.94, 0.31, boxstyle="round,pad=0,rounding_size=0.05",
                facecolor=FATES[each.fate][0], edgecolor="white", mutation_aspect=0.6,
            )
        )  # fmt: skip
        axes.text(
            each.column + 0.5, y + 0.155, each.text, fontsize=7, ha="center", va="center", parse_math=False,
            color=_INK, family="monospace",
        )  # fmt: skip
    axes.text(
        cell.column + 0.5, at + 0.83, cell.reason, fontsize=6.5, ha="center", va="center", color="#A33B34",
        parse_math=False,
    )  # fmt: skip


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _unit(span: float) -> str:
    """The unit of a picture whose longest round takes `span` milliseconds."""
    return "us" if span < 2 else "ms"


def _time(milliseconds: float, span: float) -> str:
    return f"{1000 * milliseconds:.0f}" if _unit(span) == "us" else f"{milliseconds:.2f}"


def _draw_legend(
    figure: Any, found: Sequence[RoundPicture], colours: dict[str, str], total: float, span: float
) -> None:
    from matplotlib.patches import Patch

    used = {cell.fate for each in found for row in each.rows for cell in row.cells}
    tall = [Patch(facecolor="#666666", label=f"tall bar: forward pass, in {_unit(span)}")]
    thin = [Patch(facecolor="#BBBBBB", label="thin bar: drawing, deciding")]
    fates = [Patch(facecolor=colour, label=label) for fate, (colour, label) in FATES.items() if fate in used]
    figure.legend(
        handles=[*tall, *thin, *fates],
        loc="lower left",
        bbox_to_anchor=(0.01, 0.02 / total),
        ncols=len(fates) + 2,
        fontsize=7.5,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )
