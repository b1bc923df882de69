"""A chain of tiers and rules: what fits together, and the plan of its rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyramid_rt import checks
from pyramid_rt.decoding.proposers import Proposer
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import InputError
from pyramid_rt.params import SamplingParams


def checked_chain(
    tiers: Sequence[Tier | Proposer], rules: Sequence[Rule] | None
) -> tuple[tuple[Tier | Proposer, ...], tuple[Rule, ...] | None]:
    """The tiers and rules that a pyramid was given, each what it should be, and as many as fit together.

    Raises:
        InputError: names the first that is something else, or says how many were expected.
    """
    chain = tuple(checks.sequence("tiers", tiers, "tiers"))
    if not chain:
        raise InputError("a pyramid needs at least one tier")
    for index, tier in enumerate(chain):
        if not isinstance(tier, Proposer) and not _is_tier(tier):
            raise InputError(f"tiers[{index}] must be a tier, small to large, found {checks.shown(tier)}")
    names = [tier.name for tier in chain]
    if len(set(names)) < len(names):
        raise InputError(f"tiers need different names, found {', '.join(names)}")
    if rules is None:
        return chain, None
    between = tuple(checks.sequence("rules", rules, "rules"))
    for index, rule in enumerate(between):
        if isinstance(rule, type) or not callable(getattr(rule, "judge", None)):
            raise InputError(
                f"rules[{index}] must be a rule, as Match() or Fuzzy(0.3), found {checks.shown(rule)}"
            )
    if len(between) != len(chain) - 1:
        raise InputError(f"{len(chain)} tiers need {len(chain) - 1} rules between them, found {len(between)}")
    return chain, between


def _is_tier(thing: object) -> bool:
    return callable(getattr(thing, "forward", None)) and isinstance(
        getattr(thing, "device", None), torch.device
    )


def build_plan(params: SamplingParams, rules: tuple[Rule, ...], *, host_control: bool) -> RoundPlan:
    """The plan of a chain of rules: its lengths, and how many inner rounds make an outer one.

    Raises InputError: lengths that do not fit the chain, or a window over 64.
    """
    stages = len(rules)
    lengths = params.lengths
    if lengths is None:
        if stages > 2:
            raise InputError(f"a chain of {stages + 1} tiers needs the option lengths, {stages} of them")
        lengths = (params.draft_length, params.qualifier_length)[:stages]
    elif len(lengths) != stages:
        raise InputError(f"lengths must have one entry per stage, {stages} here, found {len(lengths)}")
    inner_rounds = params.inner_rounds
    if inner_rounds is None and not host_control and stages > 1:
        inner_rounds = -(-lengths[1] // (lengths[0] + 1))
    return RoundPlan(
        rules=rules,
        lengths=lengths,
        inner_rounds=inner_rounds,
        host_control=host_control,
        sampled=params.temperature > 0,
        filters=params.filters,
        logprobs=params.logprobs,
        trace=params.trace,
    )
