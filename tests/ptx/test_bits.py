"""Bits of compiled kernels that arithmetic on paper foretells: what the machine computes is what PTX says."""

from __future__ import annotations

import ctypes
import ctypes.util

import pytest
import torch
from helpers.oracle import CONFIG, poisoned, random, window, workspace
from torch import Tensor

from ptx import device, machine
from pyramid_rt.kernels.forward import project

pytestmark = [
    pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING),
    pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80"),
]

CHANNELS, WIDTH, LENGTH = 24, 80, 3


def fused_chain(row: Tensor, column: Tensor) -> float:
    """Products added one by one with ascending k, each rounded once with its sum."""
    fma = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fma.restype, fma.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    total = 0.0
    for a, b in zip(row.tolist(), column.tolist(), strict=True):
        total = fma(a, b, total)
    return total


def test_a_float32_product_is_a_chain_of_fused_additions() -> None:
    """So its distance from float64 is the chain's, neither the machine's nor a wrong instruction's."""
    x = window(LENGTH, WIDTH, dtype=torch.float32)
    weight = random(CHANNELS, WIDTH, dtype=torch.float32, scale=WIDTH**-0.5, seed=2)
    nothing = torch.zeros(64, CHANNELS)
    out, scaled = poisoned(64, CHANNELS, dtype=torch.float32), poisoned(64, CHANNELS, dtype=torch.float32)
    sumsq = poisoned(1, 64, dtype=torch.float32)
    norm = torch.ones(CHANNELS)
    space = workspace(CHANNELS, CONFIG)
    project.run(x, weight, None, nothing, norm, LENGTH, out, scaled, sumsq, space, CONFIG)
    expected = torch.tensor([[fused_chain(row, x[t]) for row in weight] for t in range(LENGTH)])
    assert torch.equal(out[:LENGTH], expected)
    # The chain is told from one that rounds products too.
    apart = torch.zeros(LENGTH, CHANNELS)
    for k in range(WIDTH):
        apart += x[:LENGTH, k, None] * weight[None, :, k]
    assert not torch.equal(apart, expected)
