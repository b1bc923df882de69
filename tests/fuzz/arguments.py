"""Calls of the library with arguments of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, get_type_hints

import pyramid_rt
from fuzz.runner import Case, Workspace
from fuzz.values import shown, value
from pyramid_rt.loading.directory import init
from pyramid_rt.tuning.search import TuneOptions

OPTIONS = tuple(get_type_hints(pyramid_rt.Options))
_LOAD = ("device", "dtype", "max_seq", "backend", "control", "prefix_reuse", "graphs")
_PYRAMID = (
    "rules",
    "tokenizer",
    "eos_token_ids",
    "vocab_size",
    "defaults",
    "control",
    "prefix_reuse",
    "graphs",
)
_TUNE = ("max_new_tokens", "repeats", "budget", "common", "lossy", "max_differs")
_FUZZY = ("threshold", "divergence", "divergence_on", "or_match")
PROMPT = [5, 6, 7]


def case(dice: random.Random, place: Workspace) -> Case:
    """One call."""
    made: tuple[Callable[[random.Random, Workspace], Case], ...] = (
        _generate, _prompt, _load, _pyramid, _tune, _fuzzy, _init,
    )  # fmt: skip
    return dice.choices(made, (50, 12, 10, 12, 6, 6, 4))[0](dice, place)


def _some(dice: random.Random, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value(dice) for name in dice.sample(names, dice.choice((1, 1, 2, 3)))}


def _generate(dice: random.Random, place: Workspace) -> Case:
    options = _some(dice, OPTIONS)
    # With others that are right, so that what is wrong is not the only thing that is looked at.
    right = {
        "method": dice.choice(("ar", "sd", "psd", "fsd", "psd_f")),
        "temperature": dice.choice((0.0, 0.7)),
    }
    given = {"max_new_tokens": 3, "seed": 1, **right, **options}
    way = dice.choice(("generate", "stream", "params", "prepare"))

    def run() -> None:
        if way == "generate":
            place.pyramid.generate(PROMPT, **given)
        elif way == "params":
            place.pyramid.generate(PROMPT, pyramid_rt.SamplingParams(**given))
        elif way == "prepare":
            place.pyramid.prepare(**given)
        else:
            with place.pyramid.stream(PROMPT, **given) as stream:
                for _ in stream:
                    pass

    return Case(f"{way}({shown(given)})", run)


def _prompt(dice: random.Random, place: Workspace) -> Case:
    prompt = value(dice)
    if dice.random() < 0.5:
        prompt = [prompt, value(dice)][: dice.randrange(1, 3)]
    if dice.random() < 0.3:
        prompt = [{"role": "user", "content": value(dice)}, {dice.choice(("role", "x")): value(dice)}]
    return Case(f"generate({shown(prompt)})", lambda: place.pyramid.generate(prompt, max_new_tokens=2))


def _load(dice: random.Random, place: Workspace) -> Case:
    given: dict[str, Any] = {"device": "cpu", **_some(dice, _LOAD)}
    where = value(dice) if dice.random() < 0.15 else place.tiny

    def run() -> None:
        with pyramid_rt.load(where, **given) as pyramid:
            pyramid.generate(PROMPT, max_new_tokens=2)

    return Case(f"load({shown(where)}, {shown(given)})", run)


def _pyramid(dice: random.Random, place: Workspace) -> Case:
    given: dict[str, Any] = _some(dice, _PYRAMID)
    tiers = value(dice) if dice.random() < 0.2 else place.pyramid.tiers

    def run() -> None:
        made = pyramid_rt.Pyramid(tiers, **given)
        made.generate(PROMPT, max_new_tokens=2)

    return Case(f"Pyramid({shown(tiers)}, {shown(given)})", run)


def _tune(dice: random.Random, place: Workspace) -> Case:
    given = _some(dice, _TUNE)
    return Case(f"TuneOptions({shown(given)})", lambda: TuneOptions(**given))


def _fuzzy(dice: random.Random, place: Workspace) -> Case:
    given = {"threshold": 0.2, **_some(dice, _FUZZY)}

    def run() -> None:
        rules: list[Any] = [pyramid_rt.Fuzzy(**given), pyramid_rt.Match()]
        pyramid_rt.Pyramid(place.pyramid.tiers, rules).generate(PROMPT, max_new_tokens=3)

    return Case(f"Fuzzy({shown(given)})", run)


def _init(dice: random.Random, place: Workspace) -> Case:
    where: Any = place.folder / "new"
    given: dict[str, Any] = {"target": place.tiny / "target", "draft": place.tiny / "draft"}
    given[dice.choice(("target", "draft", "qualifier", "force"))] = value(dice)
    return Case(f"init({shown(given)})", lambda: init(where, **given), may_leave=("new", "new/pyramid.json"))
