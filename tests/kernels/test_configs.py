"""kernels/configs.py and the host side of kernels/launch.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from helpers.equality import assert_equal_tensors
from helpers.oracle import CONFIG, DEVICE, DTYPES, poisoned, random, sums_of_squares, window, workspace, zeros
from ptx.device import architecture

from pyramid_rt.kernels import configs
from pyramid_rt.kernels import launch as common
from pyramid_rt.kernels.forward import attention_configs, embed, gate_up, head, project, qkv

# Hidden size, intermediate size, query heads, key heads, head size, vocabulary.
SHAPES = {
    "1B": (2048, 8192, 32, 8, 64, 128256),
    "3B": (3072, 8192, 24, 8, 128, 128256),
    "8B": (4096, 14336, 32, 8, 128, 128256),
    "SmolLM2-135M": (576, 1536, 9, 3, 64, 49152),
}
CASES = [
    (name, op, rows, width)
    for name, (hidden, inner, heads, kv_heads, size, vocab) in SHAPES.items()
    for op, rows, width in (
        ("qkv", (heads + 2 * kv_heads) * size, hidden),
        ("project", hidden, heads * size),
        ("project", hidden, inner),
        ("gate_up", 2 * inner, hidden),
        ("head", vocab, hidden),
    )
]


@pytest.mark.parametrize(("name", "op", "rows", "width"), CASES)
def test_every_shipped_configuration_is_sound(name: str, op: configs.Op, rows: int, width: int) -> None:
    for arch, dtype in product(configs.ARCHITECTURES, DTYPES):
        config = configs.projection_config(op, arch, rows, width, dtype)
        assert config == configs.projection_config(op, arch, rows, width, dtype)
        assert config.block_n % common.CHANNELS == 0
        assert config.block_k >= 16
        # Every split has work, or a partial would be zero for nothing.
        steps = -(-width // config.block_k)
        share = -(-steps // config.splits)
        assert share * (config.splits - 1) < steps
        if op == "head":
            assert config.splits == 1


def test_unknown_architecture_is_refused() -> None:
    assert "head" in get_args(configs.Op)
    with pytest.raises(ValueError, match=r"^arch "):
        configs.projection_config("head", 75, 64, 64, torch.float32)


def test_a_tuned_entry_takes_the_place_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    key: tuple[configs.Op, int, int, int, torch.dtype] = ("gate_up", 90, 16384, 2048, torch.bfloat16)
    rule = configs.projection_config(*key)
    tuned = replace(rule, num_warps=2 * rule.num_warps)
    monkeypatch.setattr(configs, "TUNED", {key: tuned})
    assert configs.projection_config(*key) == tuned != rule
    other: tuple[configs.Op, int, int, int, torch.dtype] = ("gate_up", 80, 16384, 2048, torch.bfloat16)
    assert configs.projection_config(*other).num_warps == rule.num_warps

    usual = attention_configs.config_for(torch.bfloat16, 64, 90)
    tuned_attention = replace(usual, num_stages=usual.num_stages + 1)
    monkeypatch.setattr(attention_configs, "TUNED", {(90, 64, torch.bfloat16): tuned_attention})
    assert attention_configs.config_for(torch.bfloat16, 64, 90) == tuned_attention
    assert attention_configs.config_for(torch.bfloat16, 128, 90) != tuned_attention


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sub_tiles": 2}, "sub_tiles is 2"),
        ({"block_k": 48}, "block_k is 48"),
        ({"block_n": 8}, "block_n, block_k are 8, 32"),
        ({"splits": 0}, "splits is 0"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"wide_stages": 0}, "wide_stages is 0"),
    ],
)
def test_a_configuration_no_kernel_takes_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.skipif(bool(architecture()), reason="a stand-in device takes tensors of the CPU")
def test_a_compiled_kernel_takes_no_tensor_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    table, tokens, norm = zeros(4, 64), torch.zeros(4, dtype=torch.int64, device=DEVICE), zeros(64)
    arguments = table, tokens, norm, 3, zeros(64, 64), zeros(64, 64), zeros(1, 64)
    embed.plan(*arguments)
    monkeypatch.setattr(common, "interpreted", lambda _: False)
    cpu: Any = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match=r"^table is on cpu, expected a CUDA device"):
        embed.plan(*cpu)


def test_a_step_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers may build no tensor: in a captured graph it would come from the graph's pool."""
    x, out, sums = window(3, 64, dtype=torch.float32), zeros(64, 64), zeros(1, 64)
    scaled, norm, weight, space = (
        zeros(64, 64),
        zeros(64),
        random(128, 64, dtype=torch.float32),
        workspace(128, CONFIG),
    )
    cache, start = zeros(2, 2, 99, 16), torch.zeros((), dtype=torch.int64, device=DEVICE)
    tokens, rotary, q = torch.zeros(64, dtype=torch.int64, device=DEVICE), zeros(99, 2, 16), zeros(64, 4, 16)
    statistics, logits = head.TileStatistics.allocate(2, DEVICE), zeros(64, 128)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a launcher made a tensor")

    with monkeypatch.context() as patch:
        for name in (
            "empty",
            "zeros",
            "full",
            "tensor",
            "arange",
            "cat",
            "stack",
            "empty_like",
            "zeros_like",
        ):
            patch.setattr(torch, name, refuse)
        launches = (
            embed.plan(weight, tokens, norm, 3, out, scaled, sums),
            qkv.plan(x, sums, 1e-5, weight, None, rotary, start, 3, q, cache[0], cache[1], space, CONFIG),
            project.plan(x, weight[:64], None, x, norm, 3, out, scaled, sums, space, CONFIG),
            gate_up.plan(x, sums, 1e-5, weight, None, 3, out, space, CONFIG),
            head.plan(x, sums, 1e-5, weight, tokens[:2], 128, logits, statistics, None, CONFIG),
        )
    for launch in launches:
        tensors = [argument for argument in launch.args if isinstance(argument, torch.Tensor)]
        assert [tensor for tensor in tensors if tensor.device.type != DEVICE.type] == []
        assert "enable_fp_fusion" in launch.kwargs


def test_one_launch_differs_from_another_only_in_its_length() -> None:
    """Nothing the compiler sees depends on T: constexprs and options are the same, T is one number among others."""
    out, sums, space = zeros(64, 64), zeros(1, 64), workspace(64, CONFIG)
    x, weight, norm, scaled = zeros(64, 96), zeros(64, 96), zeros(64), zeros(64, 64)
    plans = [
        project.plan(x, weight, None, out, norm, length, out, scaled, sums, space, CONFIG)
        for length in range(1, 65)
    ]
    first = plans[0]
    for length, launch in enumerate(plans, 1):
        assert launch.kwargs == first.kwargs
        changed = [i for i, (a, b) in enumerate(zip(launch.args, first.args, strict=True)) if a is not b]
        assert [launch.args[i] for i in changed] == ([length] if length > 1 else [])


def test_a_row_is_the_same_in_every_window() -> None:
    """Masks and placement: what stands beside a row, or after the window, never reaches it.

    The interpreter multiplies a tile by numpy, whose sums may depend on the shape but not on other columns.
    """
    weight, residual = random(64, 96, dtype=torch.float32), zeros(64, 64)
    x = random(64, 96, dtype=torch.float32, seed=1)
    results = {}
    for length in (1, 5, 16, 17, 40, 64):
        given = poisoned(64, 96, dtype=torch.float32)
        given[:length] = x[:length]
        out, sums, space = zeros(64, 64), zeros(1, 64), workspace(64, CONFIG)
        norm, scaled = zeros(64), zeros(64, 64)
        project.run(given, weight, None, residual, norm, length, out, scaled, sums, space, CONFIG)
        results[length] = out[:length]
        torch.testing.assert_close(sums[:, :length], sums_of_squares(out, length)[:, :length])
    # Windows up to 16 rows are one shape of product and longer ones another, which on a GPU changes no bit.
    for length, result in results.items():
        assert_equal_tensors(result, results[16 if length <= 16 else 64][:length])
    torch.testing.assert_close(results[64][:16], results[16])
