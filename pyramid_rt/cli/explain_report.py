"""The report of ``explain``: what was measured, what each change would gain, and what limits the pyramid in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pyramid_rt.cli.report import counted
from pyramid_rt.cli.tune_report import described, passes_table
from pyramid_rt.tuning.explain import Compared, Explanation
from pyramid_rt.tuning.limits import TARGET, WORTH, Change

_KEY = (
    "alpha: the chance that one proposed token stands; beta: tokens that a verify gives, over the places it looks "
    "at. Tokens per second of decoding, prompts left out: by the paper's throughput model, by tune's replay, "
    "and as run."
)


def print_explanation(console: Console, found: Explanation) -> None:
    """Print measurements, changes and the verdict."""
    console.print(passes_table(found.tiers, found.costs))
    console.print()
    console.print(_stages(found.run))
    console.print()
    console.print(_run(found.run))
    console.print(_KEY, style="dim")
    console.print()
    console.print(_changes(found))
    console.print()
    for sentence in words(found):
        console.print(sentence)


def words(found: Explanation) -> list[str]:
    """The verdict in sentences: the limit, whether fewer tiers would be faster, and how good the model is."""
    return [_limit(found), _fewer(found), _trust(found), _extent(found)]


def said(change: Change, found: Explanation) -> str:
    """A change in words."""
    before, after = found.setting, change.setting
    if change.kind == "draft":
        return f"a {found.names[0]} of half the time"
    if change.kind == "qualifier speed":
        return f"a {found.names[1]} of half the time"
    if change.kind == "verification":
        return "verification flat in T: any width in the time of one token"
    assert after is not None  # the others are settings
    if change.kind == "qualifier":
        return f"without the {found.names[1]}: {described(after)}"
    if change.kind == "added qualifier":
        return f"with the {found.tiers[1]}: {described(after)}"
    if change.kind == "baseline":
        return f"without speculation: {after.method}"
    if change.kind == "lengths":
        lengths = [after.draft_length, after.qualifier_length]
        return "lengths " + "/".join(str(length) for length in lengths if length is not None)
    name = change.kind.replace(" ", "_")
    more = "" if before.lossless else ", with more tokens that are not the target's"
    return f"{change.kind} {getattr(before, name):g} -> {getattr(after, name):g}{more}"


def explanation_object(found: Explanation, machine: str) -> dict[str, Any]:
    """Everything measured and said, as a JSON object."""
    return {
        "what": "what limits a pyramid; seconds, and tokens per second of decoding, prompts left out",
        "machine": machine,
        "tiers": found.tiers,
        "setting": found.setting.options(),
        "common": dict(found.common),
        "costs": asdict(found.costs),
        "model": asdict(found.model),
        "limit": found.limit,
        "changes": [
            {
                "kind": one.kind,
                "says": said(one, found),
                "setting": None if one.setting is None else one.setting.options(),
                "tokens_per_second": one.tokens_per_second,
                "gain": one.gain,
            }
            for one in found.changes
        ],
        "run": [{**asdict(one), "setting": one.setting.options()} for one in found.run],
        "prompts": found.prompts,
        "length": found.length,
        "repeats": found.repeats,
        "words": words(found),
    }


def _limit(found: Explanation) -> str:
    what, shares = described(found.setting), found.model.shares
    best = found.changes[0]
    gain = f"{best.gain:.2f}x"
    percent = [f"{100 * share:.0f} %" for share in shares]
    if found.limit == TARGET:
        return (
            f"The {found.names[-1]} itself limits {what}: its passes take {percent[-1]} of the time, and no change "
            f"that the model knows gains {100 * (WORTH - 1):.0f} %."
        )
    middle = min(1, len(found.names) - 1)
    reasons = {
        "draft": f"The {found.names[0]} is too slow: it takes {percent[0]} of the time of {what}",
        "qualifier speed": f"The {found.names[middle]} is too slow: it takes {percent[middle]} of the time of {what}",
        "verification": f"Verification is not flat in T: wide passes cost more than narrow ones and hold {what} back",
        "qualifier": f"The {found.names[middle]} is not worth its time in {what}",
        "added qualifier": f"A tier is missing in {what}",
        "baseline": f"Speculation is not worth its time in {what}",
        "lengths": f"The speculation lengths of {what} do not suit this pyramid",
        "qualifier threshold": f"The qualifier threshold holds {what} back",
        "target threshold": f"The target threshold holds {what} back",
    }
    return f"{reasons[best.kind]}; {said(best, found)}: {gain}."


def _fewer(found: Explanation) -> str:
    change = found.fewer
    assert change.setting is not None
    sentence = (
        f"Fewer tiers would {'' if change.gain >= WORTH else 'not '}be faster: {described(change.setting)} "
    )
    measured = _ratio(found.run, change)
    return (
        sentence + f"is {change.gain:.2f}x by the model" + (f", {measured:.2f}x as run." if measured else ".")
    )


def _ratio(run: Sequence[Compared], change: Change) -> float | None:
    """A change's measured speed over that of the setting that is explained, where it was run."""
    now = run[1].measured
    return next((one.measured / now for one in run if one.setting == change.setting), None)


def _trust(found: Explanation) -> str:
    now = found.run[1]
    return (
        f"The model says {now.predicted:.1f} tokens/s where {now.measured:.1f} were measured "
        f"({100 * (now.predicted / now.measured - 1):+.0f} %)."
    )


def _extent(found: Explanation) -> str:
    temperature = found.common["temperature"]
    how = "Greedy" if temperature == 0 else f"At temperature {temperature:g}"
    return (
        f"{how}, {counted(found.prompts, 'prompt')} of up to {found.length} new tokens, "
        f"settings taking turns; median of {found.repeats}. Gains are over what is set now, one change at a time."
    )


def _stages(run: Sequence[Compared]) -> Table:
    table = _table("stage")
    table.add_column("of")
    for header in ("alpha", "beta", "proposed", "tokens per\nverify"):
        table.add_column(header, justify="right")
    for one in run:
        for stage in one.stages:
            table.add_row(
                f"{stage.proposing} to {stage.verifying}",
                one.setting.method,
                f"{stage.alpha:.2f}",
                f"{stage.beta:.2f}",
                f"{stage.proposed:.1f}",
                f"{stage.tokens:.2f}",
            )
    return table


def _run(run: Sequence[Compared]) -> Table:
    table = _table("tokens/s")
    for header in ("model", "replay", "run"):
        table.add_column(header, justify="right")
    for one in run:
        table.add_row(
            described(one.setting), f"{one.predicted:.1f}", f"{one.replayed:.1f}", f"{one.measured:.1f}"
        )
    return table


def _changes(found: Explanation) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("gain", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("change")
    for one in found.changes:
        table.add_row(f"{one.gain:.2f}x", f"{one.tokens_per_second:.1f}", said(one, found))
    return table


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first)
    return table
