"""Tensor core and matrix instructions of the machine against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx import machine
from ptx.machine import AT_ONCE, LATE, Fault, Schedule
from ptx.snippets import execute, floats

pytestmark = pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING)

LANES = range(32)


def halves(values: np.ndarray, kind: str) -> np.ndarray:
    """Small integers as 16-bit codes, exact in either format."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(values.astype(np.float32)).to(dtype).view(torch.int16).numpy().astype(np.uint16)


def packed(low: int, high: int) -> int:
    return int(low) | int(high) << 16


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma(kind: str) -> None:
    """Fragments as the PTX manual lays them out; small integers, so that every order of adding is exact."""
    random = np.random.default_rng(1)
    a, b = random.integers(-8, 9, (16, 16)), random.integers(-8, 9, (16, 8))
    codes_a, codes_b = halves(a, kind), halves(b, kind)
    words = np.zeros((32, 8), np.uint32)
    for lane in LANES:
        g, t = lane // 4, 2 * (lane % 4)
        for i, (row, k) in enumerate([(g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)]):
            words[lane, i] = packed(codes_a[row, k], codes_a[row, k + 1])
        for i, k in enumerate([t, t + 8]):
            words[lane, 4 + i] = packed(codes_b[k, g], codes_b[k + 1, g])
    words[:, 6] = np.arange(32, dtype=np.float32).view(np.uint32)
    body = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r100, %r101, %r102, %r103}}, "
        "{%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6, %r6, %r6, %r6};"
    )
    found = floats(execute(body, words))
    product = a @ b
    for lane in LANES:
        g, t = lane // 4, 2 * (lane % 4)
        expected = [product[g, t], product[g, t + 1], product[g + 8, t], product[g + 8, t + 1]]
        assert found[lane].tolist() == [value + lane for value in expected]


STORE = """
    mov.b32 %r10, global_smem;
    mad.lo.s32 %r11, %r9000, 16, %r10;
    st.shared.v4.b32 [%r11], {%r0, %r1, %r2, %r3};
    bar.sync 0;
"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (32, 8)).astype(np.uint32)
    matrices = words[:, :4].copy().view(np.uint16).reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    names = ", ".join(f"%r{100 + i}" for i in range(count))
    trans = ".trans" if transposed else ""
    found = execute(
        f"{STORE} ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r11];", words
    )
    for lane in LANES:
        row, column = lane // 4, 2 * (lane % 4)
        for i in range(count):
            assert found[lane, i] == packed(matrices[i, row, column], matrices[i, row, column + 1])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_undoes_ldmatrix(count: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (32, 8)).astype(np.uint32)
    names = ", ".join(f"%r{20 + i}" for i in range(count))
    body = f"""{STORE}
        ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{names}}}, [%r11];
        stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r11 + 512], {{{names}}};
        bar.sync 0;
        setp.lt.s32 %p1, %r9000, {8 * count};
        @%p1 ld.shared.v4.b32 {{%r100, %r101, %r102, %r103}}, [%r11 + 512];
    """
    found = execute(body, words)
    assert (found[: 8 * count] == words[: 8 * count, :4]).all()


def swizzled(tile: np.ndarray, pitch: int) -> np.ndarray:
    """Bytes of [rows, columns] 16-bit codes as wgmma wants them: atoms of 8 rows of `pitch` bytes."""
    rows, columns = tile.shape
    assert 2 * columns == pitch
    out = np.zeros(rows * pitch, np.uint8)
    for row in range(rows):
        for column in range(columns):
            at = row * pitch + 2 * column
            at ^= (at >> 7 & (pitch // 16 - 1)) << 4
            out[at : at + 2] = np.array([tile[row, column]], np.uint16).view(np.uint8)
    return out


def wgmma_body(pitch: int, kind: str, *, registers: bool, transposed: bool, wait: str) -> str:
    """Four warps copy A [64 rows] and B to shared memory (16 words a thread: two of the four at a time)."""
    layout = {128: 1, 64: 2, 32: 3}[pitch] << 62 | (8 * pitch >> 4) << 32 | 1 << 16
    results = ", ".join(f"%r{100 + i}" for i in range(4))
    a = "{%r4, %r5, %r6, %r7}, %rd21" if registers else "%rd20, %rd21"
    scales = f"1, 1, {int(transposed)}" if registers else f"1, 1, 0, {int(transposed)}"
    return f"""
        mov.b32 %r10, global_smem;
        mad.lo.s32 %r11, %r9000, 16, %r10;
        st.shared.v4.b32 [%r11], {{%r0, %r1, %r2, %r3}};
        bar.sync 0;
        fence.proxy.async.shared::cta;
        bfe.u32 %r12, %r10, 4, 14;
        cvt.u64.u32 %rd10, %r12;
        or.b64 %rd20, %rd10, {layout};
        add.s64 %rd21, %rd20, {1024 >> 4};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.{kind}.{kind} {{{results}}}, {a}, 0, {scales};
        wgmma.commit_group.sync.aligned;
        {wait}
    """


WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("products", [0, 1, 2])
def test_wgmma_with_a_in_registers(kind: str, products: int) -> None:
    """B [8 rows of N, 64 of K] K-major in the second KiB; the product takes its first 16 of K."""
    random = np.random.default_rng(2)
    a, b = random.integers(-8, 9, (64, 16)), random.integers(-8, 9, (8, 64))
    codes_a = halves(a, kind)
    words = np.zeros((128, 8), np.uint32)
    words[64:128, :4] = swizzled(halves(b, kind), 128).view(np.uint32).reshape(64, 4)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = 16 * warp + lane // 4, 2 * (lane % 4)
        for i, (row, k) in enumerate([(g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)]):
            words[thread, 4 + i] = packed(codes_a[row, k], codes_a[row, k + 1])
    body = wgmma_body(128, kind, registers=True, transposed=False, wait=WAIT)
    found = floats(execute(body, words, warps=4, schedule=Schedule(products=products)))
    product = a @ b[:, :16].T
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = 16 * warp + lane // 4, 2 * (lane % 4)
        expected = [product[g, t], product[g, t + 1], product[g + 8, t], product[g + 8, t + 1]]
        assert found[thread].tolist() == expected


@pytest.mark.parametrize("products", [1, 2])
def test_results_of_wgmma_may_not_be_used_before_the_wait(products: int) -> None:
    words = np.zeros((128, 8), np.uint32)
    body = wgmma_body(128, "bf16", registers=True, transposed=False, wait="")
    found = []
    for seed in range(8):
        try:
            execute(body, words, warps=4, schedule=Schedule(products=products, seed=seed))
        except Fault as fault:
            found.append(fault.kind)
    assert set(found) == {"uninitialised"}
    assert products != LATE or len(found) == 8
    execute(body, words, warps=4, schedule=Schedule(products=AT_ONCE))


def test_wgmma_refuses_a_layout_that_it_does_not_know() -> None:
    body = wgmma_body(128, "bf16", registers=True, transposed=False, wait=WAIT).replace(
        str(1 << 62 | 64 << 32 | 1 << 16), "0"
    )
    with pytest.raises(Fault, match="descriptor of an unknown layout"):
        execute(body, np.zeros((128, 8), np.uint32), warps=4)
