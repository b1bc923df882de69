"""The students that bench/demo_training/command.py makes from the target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors

from bench.demo_training import command as train_demo


@pytest.fixture(scope="module")
def target() -> Any:
    return train_demo.build_model("target", 3)


def planted(before: tuple[int, int], copying: tuple[int, int]) -> Any:
    """A target in which one head looks at the token before and one behind the last place of the current token."""

    def run(input_ids: torch.Tensor, **_: Any) -> Any:
        count, length = input_ids.shape[1], input_ids.shape[1] // 2
        layers = [torch.full((1, 6, count, count), 0.01) for _ in range(6)]
        rows = torch.arange(1, count)
        layers[before[0]][0, before[1], rows, rows - 1] = 0.9
        rows = torch.arange(length, count)
        layers[copying[0]][0, copying[1], rows, rows - length + 1] = 0.9
        return SimpleNamespace(attentions=layers)

    return run


@pytest.mark.parametrize(
    ("before", "copying", "parts"),
    [
        ((2, 5), (4, 0), ((2, 1), (4, 0))),
        ((0, 0), (1, 3), ((0, 0), (1, 1))),
        ((3, 2), (5, 4), ((3, 0), (5, 1))),
    ],
)
def test_the_parts_that_copy_are_found(before: Any, copying: Any, parts: Any) -> None:
    assert train_demo.copying_parts(planted(before, copying), 1) == parts


def test_the_draft_is_a_part_of_the_target(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo, "copying_parts", lambda *_: ((1, 1), (4, 0)))
    draft = train_demo.build_draft(target, 3)
    assert_equal_tensors(draft.model.embed_tokens.weight, target.model.embed_tokens.weight)
    ours, theirs = draft.model.layers[0], target.model.layers[1]
    assert_equal_tensors(ours.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight[64:])
    assert_equal_tensors(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight[192:])
    assert_equal_tensors(ours.self_attn.o_proj.weight, theirs.self_attn.o_proj.weight[:, 192:])
    gate = ours.mlp.gate_proj.weight
    assert gate.shape == (192, 384)
    # Its channels are some of the target's, each with its own row of `up` and column of `down`.
    at = [int((theirs.mlp.gate_proj.weight == row).all(1).nonzero()) for row in gate]
    assert at == sorted(set(at))
    assert_equal_tensors(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight[at])
    assert_equal_tensors(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[:, at])


def test_the_qualifier_is_the_target_without_layers(target: Any) -> None:
    qualifier = train_demo.build_qualifier(target, 3)
    for number, kept in enumerate(train_demo.KEPT_LAYERS):
        ours, theirs = qualifier.model.layers[number], target.model.layers[kept]
        assert_equal_tensors(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight)
    assert_equal_tensors(qualifier.model.norm.weight, target.model.norm.weight)
