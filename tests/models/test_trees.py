"""A window that is a tree gives every path the logits of that chain, and the accepted path's rows move together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.llamas import SHAPES, assert_same, load, rms, run, save_models, tokens_for
from torch import Tensor

from pyramid_rt.models.backends.bulk import BulkBackend
from pyramid_rt.models.llama import KVCache, Llama, forward
from pyramid_rt.models.trees import Tree

CONTEXT = 45  # with dynamic rope (up to 48) the tree's positions straddle the original context
# Two tokens of the text that are not cached yet, then nodes: 2 and 3 follow the text, 4 and 5 follow 2, and so on.
PARENTS = [-1, 0, 1, 1, 2, 2, 3, 5, 5, 7]
PATHS = ([0, 1, 2, 4], [0, 1, 2, 5, 7, 9], [0, 1, 2, 5, 8], [0, 1, 3, 6])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def filled(directory: Path) -> tuple[Llama, KVCache, Tensor]:
    """A model, its cache with `CONTEXT` tokens of a text and stale rows after them, and the text."""
    model, cache = load(directory)
    text = tokens_for(model, CONTEXT)
    run(model, cache, text)
    cache.buffer[..., CONTEXT:, :] = 30.0
    return model, cache, text


def run_tree(
    model: Llama, cache: KVCache, nodes: Tensor, tree: Tree | None, bound: int | None = None
) -> Tensor:
    logits = forward(
        model,
        cache,
        nodes,
        torch.tensor(CONTEXT),
        rows=torch.arange(len(nodes)),
        kv_bound=bound or CONTEXT + len(nodes),
        tree=tree,
    )
    assert logits is not None
    return logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bound", [None, 200])
def test_each_path_is_a_chain(directories: dict[str, Path], shape: str, bound: int | None) -> None:
    model, cache, text = filled(directories[shape])
    nodes, tree = tokens_for(model, len(PARENTS), seed=8), Tree.of(torch.tensor(PARENTS))
    logits = run_tree(model, cache, nodes, tree, bound)
    for path in PATHS:
        other = KVCache.allocate(model.config, 512, torch.float32, torch.device("cpu"))
        chain = run(model, other, torch.cat((text, nodes[path])))[CONTEXT:]
        assert_same(logits[path], chain)


@pytest.mark.parametrize("wrong", ["positions by slot", "all rows seen"])
def test_a_tree_that_is_taken_for_a_chain_is_noticed(directories: dict[str, Path], wrong: str) -> None:
    model, cache, text = filled(directories["gqa3"])
    nodes, tree = tokens_for(model, len(PARENTS), seed=8), Tree.of(torch.tensor(PARENTS))
    chain = Tree.of(torch.arange(-1, len(PARENTS) - 1))
    false = (
        Tree(chain.depths, tree.ancestors)
        if wrong == "positions by slot"
        else Tree(tree.depths, chain.ancestors)
    )
    logits, expected = (
        run_tree(model, cache, nodes, false),
        run(model, cache, torch.cat((text, nodes[PATHS[1]]))),
    )
    assert rms(logits[9] - expected[-1]) > 1e-3 * rms(expected[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_accepted_path_goes_on_as_a_chain(directories: dict[str, Path], shape: str) -> None:
    """Compaction by index moves keys and values; the token buffer moves with them, as a column."""
    model, cache, text = filled(directories[shape])
    nodes, tree = tokens_for(model, len(PARENTS), seed=8), Tree.of(torch.tensor(PARENTS))
    run_tree(model, cache, nodes, tree)
    path = torch.tensor(PATHS[1])
    padded = torch.cat((path, torch.zeros(64 - len(path), dtype=torch.int64)))
    cache.compact(torch.tensor(CONTEXT), padded, torch.tensor(len(path)))
    following = tokens_for(model, 3, seed=9)
    end = CONTEXT + len(path)
    logits = run(model, cache, following, end)
    other = KVCache.allocate(model.config, 512, torch.float32, torch.device("cpu"))
    expected = run(model, other, torch.cat((text, nodes[path], following)))
    assert_same(logits, expected[end:])
    assert_same(cache.buffer[..., :end, :], other.buffer[..., :end, :])


def test_a_chain_is_the_trivial_tree(directories: dict[str, Path]) -> None:
    """The same mask and angles; and no tensor of its own says where a chain's rows are rotated."""
    model, _ = load(directories["gqa4"])
    chain = Tree.of(torch.arange(-1, 6))
    start = torch.tensor(5)
    plain = model.backend.window(model.rotary, start, 7, 20, 4)
    same = model.backend.window(model.rotary, start, 7, 20, 4, chain)
    for name in ("slots", "positions", "cos", "sin", "mask"):
        assert_equal_tensors(getattr(same, name), getattr(plain, name))
    assert plain.positions is plain.slots
    assert plain.ancestors is None


def test_the_widest_tree() -> None:
    """64 rows: the last bit is the sign. One path of all rows, and a root with 63 children."""
    path = Tree.of(torch.arange(-1, 63))
    assert path.depths.tolist() == list(range(64))
    assert path.ancestors.tolist() == [(1 << row + 1) - 1 if row < 63 else -1 for row in range(64)]
    star = Tree.of(torch.tensor([-1] + [0] * 63))
    assert star.depths.tolist() == [0] + [1] * 63
    assert star.ancestors[62:].tolist() == [(1 << 62) + 1, -(1 << 63) + 1]
    with pytest.raises(ValueError, match="parents has 65 rows, expected at most 64"):
        Tree.of(torch.arange(-1, 64))


def test_a_backend_that_knows_chains_only_refuses(directories: dict[str, Path]) -> None:
    model, cache, _ = filled(directories["gqa1"])
    bulk = replace(model, backend=BulkBackend())
    with pytest.raises(ValueError, match="backend 'bulk' takes chains only, found a tree of 2 rows"):
        run_tree(bulk, cache, torch.tensor([1, 2]), Tree.of(torch.tensor([-1, -1])))
