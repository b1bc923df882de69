"""Counted bytes of compiled kernels against the formulas of bench/kernel_check/traffic.py."""

from __future__ import annotations

import pytest
import torch

from bench.kernel_check.traffic import traffic
from ptx import device, machine
from ptx.machine import Counts
from ptx.snippets import execute
from ptx.test_planted import CHANNELS, LENGTH, WIDTH, Product, replaced
from pyramid_rt.models.shapes import Shape

pytestmark = pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING)
compiled = pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80")

SHAPE = Shape(
    name="small", layers=1, hidden=CHANNELS, intermediate=256, heads=3, kv_heads=1, head_dim=64, vocab=1000
)


def counts_of(run: object) -> Counts:
    with device.counted() as found:
        run()  # type: ignore[operator]
    [(_, counts)] = found
    return counts


@compiled
def test_a_product_reads_its_weights_once() -> None:
    assert SHAPE.heads * SHAPE.head_dim == WIDTH
    expected = traffic("out", SHAPE, length=LENGTH)
    counts = counts_of(Product().run)
    assert counts.traffic["w_ptr"] == (expected.stationary, 0)
    assert counts.traffic["out_ptr"][1] == LENGTH * CHANNELS * 2
    # The weights come in the widest accesses there are.
    assert counts.loaded[16] >= expected.stationary
    assert counts.barriers > 0
    assert counts.thread_instructions <= 32 * counts.instructions


@compiled
def test_a_product_that_reads_its_weights_twice_is_found() -> None:
    with device.edited(
        replaced(
            r"^(.*cp\.async\.c[ag]\.shared\.global.*;)$",
            r"\1 cp.async.commit_group; cp.async.wait_group 0; \1",
        )
    ):
        counts = counts_of(lambda: Product().launch.run())
    assert counts.traffic["w_ptr"][0] == 2 * traffic("out", SHAPE, length=LENGTH).stationary


@compiled
def test_attention_reads_its_cache_once() -> None:
    from pyramid_rt.kernels.forward import attention
    from pyramid_rt.kernels.forward.attention_configs import config_for

    context, rows = 300, 400
    config = config_for(torch.bfloat16, SHAPE.head_dim, device.architecture())
    space = attention.workspace(
        length=LENGTH, heads=SHAPE.heads, kv_heads=1, head_dim=SHAPE.head_dim, kv_bound=rows,
        splits=config.splits, device=torch.device("cpu"),
    )  # fmt: skip
    query = torch.randn(64, SHAPE.heads, SHAPE.head_dim).bfloat16()
    keys, values = (torch.randn(1, rows, SHAPE.head_dim).bfloat16() for _ in range(2))
    out = torch.zeros(64, SHAPE.heads * SHAPE.head_dim, dtype=torch.bfloat16)
    counts = counts_of(
        attention.plan(
            query,
            keys,
            values,
            torch.tensor(context),
            out,
            space,
            length=LENGTH,
            kv_bound=rows,
            config=config,
        ).run
    )
    cache = traffic("attention", SHAPE, length=LENGTH, context=context).stationary
    assert counts.traffic["k_ptr"] == counts.traffic["v_ptr"] == (cache // 2, 0)
    assert counts.traffic["out_ptr"] == (0, LENGTH * SHAPE.heads * SHAPE.head_dim * 2)


def test_sectors_and_conflicts_of_plain_accesses() -> None:
    """A thread's 64 bytes are two sectors of their own, of which two loads of 16 touch the first."""
    with pytest.MonkeyPatch.context() as patch:
        found: list[Counts] = []
        run = machine.run
        patch.setattr("ptx.snippets.run", lambda *args: found.append(run(*args)))
        place = (
            "mov.b32 %r10, global_smem; mad.lo.s32 %r11, %r9000, {stride}, %r10; st.shared.b32 [%r11], %r0;"
        )
        execute(place.format(stride=4))
        execute(place.format(stride=8))
        execute(place.format(stride=128))
    assert [counts.conflicts for counts in found] == [0, 1, 31]
    assert found[0].load_sectors == 64
    assert found[0].store_sectors == 32
    assert found[0].loaded == {16: 1024}
    assert found[0].traffic["in"] == (1024, 0)
    assert found[0].stored == {16: 512}
    assert found[0].barriers == 0
