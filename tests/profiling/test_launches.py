"""Launches of a round written down, and kernel records told apart by that list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pyramid_rt
from pyramid_rt.decoding.methods import rules_of
from pyramid_rt.decoding.rounds.kernel_steps import KernelRoundRunner
from pyramid_rt.decoding.state import State
from pyramid_rt.profiling.launches import expected_launches
from pyramid_rt.profiling.records import Expected, KernelRecord, MatchError, match

LAYERS = {"draft": 1, "qualifier": 2, "target": 3}
LIST = [
    Expected("burst of 'draft'", "draft", 0, None, "embed", "embed_kernel"),
    Expected("burst of 'draft'", "draft", 0, 0, "qkv", "qkv_kernel"),
    Expected("burst of 'draft'", None, 0, None, "sample", "sample_kernel"),
    Expected("verify of 'target'", "target", 1, None, "embed", "embed_kernel"),
]


def records(*names: str) -> list[KernelRecord]:
    return [KernelRecord(name, 10.0 * at, 10.0 * at + 4) for at, name in enumerate(names)]


GOOD = records("embed_kernel", "qkv_kernel_0d1d2d", "sample_kernel", "embed_kernel")


def test_the_nth_record_is_the_nth_launch() -> None:
    found = match(LIST, list(reversed(GOOD)), active=[True, True, True, False])
    assert [each.launch for each in found] == LIST
    assert [each.record for each in found] == GOOD
    assert [each.skipped for each in found] == [False, False, False, True]


@pytest.mark.parametrize("count", [0, 3, 5, 8])
def test_another_count_is_an_error_that_names_both(count: int) -> None:
    with pytest.raises(MatchError, match=f"{count} kernels were recorded and the round has 4 launches"):
        match(LIST, (GOOD + GOOD)[:count])


def test_another_kernel_is_an_error_that_names_the_place() -> None:
    swapped = records("embed_kernel", "sample_kernel", "qkv_kernel", "embed_kernel")
    with pytest.raises(MatchError, match=r"kernel 1 of 4 was recorded as 'sample_kernel'.*'qkv_kernel'"):
        match(LIST, swapped)


def test_flags_of_another_count_are_refused() -> None:
    with pytest.raises(MatchError, match="3 active flags were given for 4 launches"):
        match(LIST, GOOD, active=[True] * 3)


def test_the_list_of_a_round_names_every_launch(kernel_dir: Path) -> None:
    with pyramid_rt.load(
        kernel_dir, device="cpu", backend="triton", control="device", max_seq=128
    ) as pyramid:
        options: dict[str, Any] = {
            "method": "psd",
            "draft_length": 2,
            "qualifier_length": 3,
            "inner_rounds": 1,
        }
        chosen = pyramid_rt.SamplingParams(**options)
        plan = pyramid.make_plan(chosen, rules_of("psd", chosen.rule_options))
        state = State.for_kernels(plan, pyramid.max_seq, pyramid.vocab_size, pyramid.device)
        tiers: Any = pyramid.tiers
        runner = KernelRoundRunner(tiers, plan, state, pyramid.vocab_size)
        names = [tier.name for tier in pyramid.tiers]
        found = expected_launches(runner.stages(128), names)
        assert len(found) == runner.launches()
    for tier, count in LAYERS.items():
        steps = {each.step for each in found if each.tier == tier}
        for step in steps:
            ops = [(each.op, each.layer) for each in found if each.step == step and each.tier == tier]
            inner = [
                (op, layer) for layer in range(count) for op in ("qkv", "attention", "out", "gate_up", "down")
            ]
            assert ops == [("embed", None), *inner, ("head", None)]
    for each in found:
        kernel = {"out": "project", "down": "project"}.get(each.op, each.op)
        assert each.kernel.startswith(kernel), each
    assert [each.section for each in found][-1] == "verify of 'target'"


def test_rounds_of_kernels_are_profiled_launch_by_launch(kernel_dir: Path) -> None:
    options: dict[str, Any] = {"method": "psd", "draft_length": 2, "qualifier_length": 3, "inner_rounds": 2}
    options |= {"max_new_tokens": 4, "seed": 4}
    with pyramid_rt.load(
        kernel_dir, device="cpu", backend="triton", control="device", max_seq=128
    ) as pyramid:
        expected = pyramid.generate("abcabc", **options)
        profile = pyramid.profile("abcabc", **options)
    assert profile.result.tokens == expected.tokens
    rounds = [span for span in profile.spans.children if span.kind == "round"]
    passes = [span for span in rounds[0].walk() if span.kind == "forward"]
    assert [span.tier for span in passes] == [
        *["draft"] * 2,
        "qualifier",
        *["draft"] * 2,
        "qualifier",
        "target",
    ]
    ran = {line.tier: line.passes for line in profile.tier_lines}
    counted = {tier.name: tier.forwards for tier in expected.stats.tiers}
    assert ran == counted
    assert sum(line.skipped for line in profile.tier_lines) > 0
    for span in profile.spans.walk():
        if span.kind == "forward" and span.args.get("skipped"):
            assert "bytes" not in span.args
            assert all(op.args["skipped"] for op in span.walk())
        elif span.kind == "forward":
            assert span.args["bytes"] > 0
