"""The forward pass against transformers and against a float64 Llama."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors, assert_everywhere
from helpers.llamas import (
    SHAPES,
    assert_same,
    exact_logits,
    hf_model,
    load,
    rms,
    run,
    run_windows,
    save_models,
    tokens_for,
)
from torch.utils._python_dispatch import TorchDispatchMode

from pyramid_rt.models import llama
from pyramid_rt.models.backends.cpu import KEYS
from pyramid_rt.models.llama import (
    SLACK_ROWS,
    KVCache,
    cache_bytes,
    forward,
    parameter_count,
    weight_bytes,
)
from pyramid_rt.models.matrix import Packed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices as they were read."""
    monkeypatch.setattr(llama, "can_pack", lambda device, dtype: False)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_equal_transformers(directories: dict[str, Path], shape: str) -> None:
    model, cache = load(directories[shape])
    # transformers gives all rows of a dynamic pass one length: compare within the original context.
    tokens = tokens_for(model, 48 if shape == "dynamic" else 300)
    expected = hf_model(shape)(tokens[None]).logits[0]
    logits = run(model, cache, tokens)
    assert logits.dtype == torch.float32
    assert rms(expected) > 0.5
    assert_same(logits, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_float32_logits_are_exact_to_rounding(
    directories: dict[str, Path], shape: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(llama, "can_pack", lambda device, dtype: False)
    model, cache = load(directories[shape])
    assert isinstance(model.head, Packed) == (packed and torch.backends.mkldnn.is_available())
    tokens = tokens_for(model, 200)
    exact = exact_logits(hf_model(shape), torch.float32, tokens)
    logits = run_windows(model, cache, tokens, [60, 1, 2, 3, 4, 5, 6, 7, 1, 64, 40, 7])
    assert_same(logits, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_as_exact_as_transformers(
    directories: dict[str, Path], shape: str, dtype: torch.dtype
) -> None:
    """Against float64 on the same rounded weights, we may be no worse than transformers is."""
    model, cache = load(directories[shape], dtype)
    tokens = tokens_for(model, 48)
    hf: Any = hf_model(shape)
    exact = exact_logits(hf, dtype, tokens)
    theirs = hf.to(dtype)(tokens[None]).logits[0].double() - exact
    ours = run_windows(model, cache, tokens, [30, 1, 17]).double() - exact
    assert rms(theirs) > 1e-4
    assert rms(ours) < 1.2 * rms(theirs)
    assert float(ours.abs().max()) < 1.6 * float(theirs.abs().max())


def test_dynamic_rope_does_not_depend_on_later_tokens(directories: dict[str, Path]) -> None:
    model, cache = load(directories["dynamic"])
    tokens = tokens_for(model, 160)
    whole = run(model, cache, tokens)
    stepwise = run_windows(
        model, KVCache.allocate(model.config, 512, torch.float32, CPU), tokens, [40, *[1] * 120]
    )
    assert_same(stepwise, whole)
    # One length for all rows, as transformers has it, is something else.
    theirs = hf_model("dynamic")(tokens[None]).logits[0]
    assert rms(whole - theirs) > 0.01 * rms(theirs)


@pytest.mark.parametrize("shape", ["gqa3", "gqa8"])
@pytest.mark.parametrize("lengths", [[1] * 70, [64, 6], [3, 64, 1, 2], [69, 1]])
def test_windows_chain_to_the_full_pass(directories: dict[str, Path], shape: str, lengths: list[int]) -> None:
    model, cache = load(directories[shape])
    tokens = tokens_for(model, 70)
    whole = run(model, cache, tokens)
    other = KVCache.allocate(model.config, 512, torch.float32, CPU)
    assert_same(run_windows(model, other, tokens, lengths), whole)
    for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
        assert_same(a, b)


def test_padding_rows_and_stale_rows_change_nothing(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa4"])
    tokens = tokens_for(model, 40)
    expected = run_windows(model, cache, tokens, [30, 4, 6])
    stale = KVCache.allocate(model.config, 512, torch.float32, CPU)
    for buffer in (*stale.k, *stale.v):
        buffer.fill_(50.0)
    padding = torch.full((9,), 3)
    parts = [
        run(model, stale, tokens[:30], 0, kv_bound=120),
        run(model, stale, torch.cat((tokens[30:34], padding)), 30, kv_bound=200)[:4],
        run(model, stale, torch.cat((tokens[34:], padding)), 34, kv_bound=512 + SLACK_ROWS)[:6],
    ]
    assert_same(torch.cat(parts), expected)


def test_rows_past_the_bound_are_not_read_and_only_the_window_is_written(
    directories: dict[str, Path],
) -> None:
    model, cache = load(directories["gqa1"])
    # Up to the next step of the bound a row is looked at, and hidden.
    for buffer in (*cache.k, *cache.v):
        buffer.fill_(math.nan)
        buffer[:, :KEYS].fill_(50.0)
    run(model, cache, tokens_for(model, 10))
    assert_everywhere(run(model, cache, tokens_for(model, 3), 10).isfinite())
    for buffer in (*cache.k, *cache.v):
        assert_everywhere(buffer[:, :13] != 50.0, buffer[:, :13])
        assert_everywhere(buffer[:, 13:KEYS] == 50.0, buffer[:, 13:KEYS])
        assert_everywhere(buffer[:, KEYS:].isnan(), buffer[:, KEYS:])


def test_overwritten_rows_decode_as_if_the_first_text_never_was(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa8"])
    tokens = tokens_for(model, 20)
    run(model, cache, tokens_for(model, 30, seed=9))
    again = run_windows(model, cache, tokens, [12, 8])
    fresh = run_windows(model, KVCache.allocate(model.config, 512, torch.float32, CPU), tokens, [12, 8])
    assert_equal_tensors(again, fresh)


def test_chosen_rows_and_no_rows(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa3"])
    tokens, start = tokens_for(model, 9), torch.tensor(0)
    every = run(model, cache, tokens)
    chosen = forward(model, cache, tokens, start, rows=torch.tensor([8, 2]), kv_bound=9)
    assert chosen is not None
    assert_same(chosen, every[[8, 2]])
    other = KVCache.allocate(model.config, 512, torch.float32, CPU)
    assert forward(model, other, tokens, start, rows=None, kv_bound=9) is None
    for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
        assert_equal_tensors(a, b)


def test_the_last_context_row_may_be_overrun_by_the_slack(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa1"], max_seq=16)
    tokens = tokens_for(model, 16 + SLACK_ROWS)
    run(model, cache, tokens[:15])
    logits = run(model, cache, tokens[15:79], 15)
    large, large_cache = load(directories["gqa1"], max_seq=256)
    assert_same(logits, run(large, large_cache, tokens[:79])[15:])


class NoHostRead(TorchDispatchMode):
    """Fails on every op that hands a device value to Python or makes a shape depend on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("unpacked")
def test_forward_reads_nothing_back_and_changes_no_input(directories: dict[str, Path]) -> None:
    model, cache = load(directories["dynamic"])
    tokens, start, rows = tokens_for(model, 5), torch.tensor(46), torch.tensor([4])
    inputs = [
        tokens,
        start,
        rows,
        model.embedding,
        model.rotary,
        *(layer.qkv.operand for layer in model.layers),
    ]
    before = [t.clone() for t in inputs]
    with torch.inference_mode(), NoHostRead():
        first = forward(model, cache, tokens, start, rows=rows, kv_bound=60)
        second = forward(model, cache, tokens, start, rows=rows, kv_bound=60)
    with NoHostRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        start.item()
    assert first is not None
    assert second is not None
    assert_equal_tensors(first, second)
    for a, b in zip(before, inputs, strict=True):
        assert_equal_tensors(a, b)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_allocated(directories: dict[str, Path], shape: str) -> None:
    model, cache = load(directories[shape], torch.bfloat16, max_seq=100)
    hf = hf_model(shape)
    assert parameter_count(model.config) == hf.num_parameters()
    assert weight_bytes(model.config, torch.bfloat16) == 2 * hf.num_parameters()
    held = sum(t.nbytes for t in (*cache.k, *cache.v, model.rotary))
    assert cache_bytes(model.config, 100, torch.bfloat16) == held
    assert [t for t in cache.k if t.shape != (model.config.num_kv_heads, 164, model.config.head_dim)] == []
    assert (model.head.operand is model.embedding) == hf.config.tie_word_embeddings
