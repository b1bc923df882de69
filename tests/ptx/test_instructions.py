"""Each instruction of the machine on hand-written PTX, against exact values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ptx import isa, machine
from ptx.parser import UnknownInstruction
from ptx.snippets import bits, execute, one, pair

pytestmark = pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING)

NAN, INF = 0x7FC00000, 0x7F800000


@pytest.mark.parametrize(
    ("body", "words", "expected"),
    [
        ("add.s32 %r100, %r0, %r1;", (0xFFFFFFFF, 3), 2),
        ("sub.s32 %r100, %r0, 5;", (3,), 0xFFFFFFFE),
        ("mul.lo.s32 %r100, %r0, %r1;", (0x10001, 0x10001), 0x20001),
        ("mad.lo.s32 %r100, %r0, %r1, %r2;", (3, 0xFFFFFFFF, 10), 7),
        ("neg.s32 %r100, %r0;", (7,), 0xFFFFFFF9),
        ("abs.s32 %r100, %r0;", (-7,), 7),
        ("min.relu.s32 %r100, %r0, %r1;", (5, 3), 3),
        ("min.relu.s32 %r100, %r0, %r1;", (5, -3), 0),
        ("max.relu.s32 %r100, %r0, %r1;", (-5, 3), 3),
        ("max.relu.s32 %r100, %r0, %r1;", (-5, -3), 0),
        ("mul.hi.u32 %r100, %r0, %r1;", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
        ("mul.hi.s32 %r100, %r0, %r1;", (-2, 3), 0xFFFFFFFF),
        ("min.s32 %r100, %r0, %r1;", (-2, 3), 0xFFFFFFFE),
        ("max.s32 %r100, %r0, %r1;", (-2, 3), 3),
        ("min.u32 %r100, %r0, %r1;", (-2, 3), 3),
        ("max.u32 %r100, %r0, %r1;", (-2, 3), 0xFFFFFFFE),
        ("and.b32 %r100, %r0, 12;", (10,), 8),
        ("or.b32 %r100, %r0, 12;", (10,), 14),
        ("xor.b32 %r100, %r0, 12;", (10,), 6),
        ("not.b32 %r100, %r0;", (10,), 0xFFFFFFF5),
        ("shl.b32 %r100, %r0, %r1;", (3, 31), 0x80000000),
        ("shl.b32 %r100, %r0, %r1;", (3, 32), 0),
        ("shr.u32 %r100, %r0, 4;", (0xF0000000,), 0x0F000000),
        ("shr.u32 %r100, %r0, %r1;", (0xF0000000, 32), 0),
        ("shr.s32 %r100, %r0, %r1;", (0xF0000000, 40), 0xFFFFFFFF),
        ("bfe.u32 %r100, %r0, 4, 15;", (0x000F1230,), 0x7123),
        ("bfe.s32 %r100, %r0, 4, 4;", (0x90,), 0xFFFFFFF9),
        ("bfe.s32 %r100, %r0, 31, 1;", (0x80000000,), 0xFFFFFFFF),
        ("prmt.b32 %r100, %r0, %r1, 0x5410U;", (0x44332211, 0x88776655), 0x66552211),
        ("prmt.b32 %r100, %r0, 0, 0x7701U;", (0x44332211,), 0x00001122),
        ("prmt.b32 %r100, %r0, 0, 0x0009U;", (0x00008000,), 0x000000FF),
        ("popc.b32 %r100, %r0;", (0xF0F1,), 9),
        ("clz.b32 %r100, %r0;", (0x00010000,), 15),
        ("clz.b32 %r100, %r0;", (0,), 32),
        ("cvt.u16.u32 %rs1, %r0; shl.b16 %rs2, %rs1, 4; cvt.u32.u16 %r100, %rs2;", (0xFFFF,), 0xFFF0),
        ("cvt.u16.u32 %rs1, %r0; shr.u16 %rs2, %rs1, 4; cvt.u32.u16 %r100, %rs2;", (0x1FFFF,), 0xFFF),
        ("or.b16 %rs2, %r0, 16; and.b16 %rs3, %rs2, 0x18; cvt.u32.u16 %r100, %rs3;", (8,), 0x18),
        ("cvt.s32.s16 %r100, %r0;", (0x8000,), 0xFFFF8000),
        ("cvt.s32.s8 %r100, %r0;", (0x80,), 0xFFFFFF80),
        ("mov.b32 %r100, {%r0, %r1};", (0x11112222, 0x33334444), 0x44442222),
        ("mov.b32 {%rs1, %rs2}, %r0; cvt.u32.u16 %r100, %rs2;", (0x11112222,), 0x1111),
        ("mov.u32 %r100, %ntid.x;", (), 32),
        ("mov.u32 %r100, %nctaid.x;", (), 1),
        ("mov.u32 %r100, global_smem;", (), 1024),
    ],
)  # fmt: skip
def test_integers(body: str, words: tuple[int, ...], expected: int) -> None:
    assert one(body, *words) == expected


@pytest.mark.parametrize(
    ("body", "words", "expected"),
    [
        ("add.s64 %rd100, %rd1, %rd2;", (0xFFFFFFFF, 1, 1, 0), 0x200000000),
        ("sub.s64 %rd100, %rd1, %rd2;", (0, 0, 1, 0), 0xFFFFFFFFFFFFFFFF),
        ("mul.lo.s64 %rd100, %rd1, %rd2;", (0, 1, 3, 0), 0x300000000),
        ("mad.lo.s64 %rd100, %rd1, %rd2, 5;", (0, 1, 3, 0), 0x300000005),
        ("min.s64 %rd100, %rd1, %rd2;", (0, -1, 3, 0), 0xFFFFFFFF00000000),
        ("max.s64 %rd100, %rd1, %rd2;", (0, -1, 3, 0), 3),
        ("and.b64 %rd100, %rd1, %rd2;", (6, 6, 3, 5), 0x400000002),
        ("or.b64 %rd100, %rd1, %rd2;", (6, 6, 3, 5), 0x700000007),
        ("xor.b64 %rd100, %rd1, %rd2;", (6, 6, 3, 5), 0x300000005),
        ("not.b64 %rd100, %rd1;", (0, -1), 0x00000000FFFFFFFF),
        ("neg.s64 %rd100, %rd1;", (1, 0), 0xFFFFFFFFFFFFFFFF),
        ("shl.b64 %rd100, %rd1, 36;", (3, 0), 0x3000000000),
        ("shr.u64 %rd100, %rd1, 36;", (0, 0x80000000), 0x8000000),
        ("shr.s64 %rd100, %rd1, 36;", (0, 0x80000000), 0xFFFFFFFFF8000000),
        ("mul.wide.s32 %rd100, %r0, %r2;", (-1, 0, 4, 0), 0xFFFFFFFFFFFFFFFC),
        ("mul.wide.u32 %rd100, %r0, %r2;", (-1, 0, 4, 0), 0x3FFFFFFFC),
        ("mad.wide.s32 %rd100, %r0, 4, %rd2;", (-1, 0, 4, 1), 0x100000000),
        ("mad.wide.u32 %rd100, %r0, 4, %rd2;", (-1, 0, 4, 1), 0x500000000),
        ("cvt.s64.s32 %rd100, %r0;", (-3,), 0xFFFFFFFFFFFFFFFD),
        ("cvt.s64.s32 %rd100, %rd1;", (-3, 77), 0xFFFFFFFFFFFFFFFD),  # the low half of a wider source
        ("cvt.u64.u32 %rd100, %r0;", (-3,), 0xFFFFFFFD),
        ("setp.lt.s64 %p1, %rd1, %rd2; selp.b64 %rd100, 1, -1, %p1;", (0, -1, 0, 0), 1),
        ("setp.lt.u64 %p1, %rd1, %rd2; selp.b64 %rd100, 1, -1, %p1;", (0, -1, 0, 0), 0xFFFFFFFFFFFFFFFF),
    ],
)
def test_wide_integers(body: str, words: tuple[int, ...], expected: int) -> None:
    assert pair("mov.b64 %rd1, {%r0, %r1}; mov.b64 %rd2, {%r2, %r3};" + body, *words) == expected


THIRD = float(np.float32(1) / np.float32(3))


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.rn.f32", (1.0, 2.0**-24), 1.0),
        ("add.rn.f32", (1.0, 3 * 2.0**-24), 1.0 + 2.0**-22),  # a tie goes to the even neighbour
        ("sub.rn.f32", (1.0, 2.0**-24), 1.0 - 2.0**-24),
        ("mul.rn.f32", (1 + 2.0**-12, 1 + 2.0**-12), 1 + 2.0**-11),
        ("fma.rn.f32", (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11), 2.0**-24),  # rounded once
        ("fma.rn.ftz.f32", (2.0**-100, 2.0**-40, 0.0), 0.0),
        ("div.rn.f32", (1.0, 3.0), THIRD),
        ("div.full.f32", (1.0, 3.0), THIRD),
        ("neg.f32", (2.5,), -2.5),
        ("abs.f32", (-2.5,), 2.5),
        ("copysign.f32", (-1.0, 2.5), -2.5),
        ("copysign.f32", (0.0, -2.5), 2.5),
        ("sqrt.rn.f32", (2.25,), 1.5),
        ("rsqrt.approx.ftz.f32", (4.0,), 0.5),
        ("ex2.approx.f32", (-3.0,), 0.125),
        ("ex2.approx.f32", (-math.inf,), 0.0),
        ("ex2.approx.ftz.f32", (-130.0,), 0.0),
        ("lg2.approx.f32", (8.0,), 3.0),
        ("min.f32", (math.nan, 2.0), 2.0),  # the operand that is no NaN
        ("max.f32", (2.0, math.nan), 2.0),
        ("min.f32", (0.0, -0.0), -0.0),
        ("max.f32", (-0.0, 0.0), 0.0),
        ("max.f32", (-1.0, 3.0), 3.0),
    ],
)
def test_floats(opcode: str, operands: tuple[float, ...], expected: float) -> None:
    names = ", ".join(f"%r{i}" for i in range(len(operands)))
    assert one(f"{opcode} %r100, {names};", *map(bits, operands)) == bits(expected)


@pytest.mark.parametrize("opcode", ["cvt.rn.f32.s32", "cvt.rn.f32.u32"])
def test_integers_to_floats(opcode: str) -> None:
    expected = float(np.float32(-5 if opcode.endswith("s32") else 0xFFFFFFFB))
    assert one(f"{opcode} %r100, %r0;", -5) == bits(expected)


@pytest.mark.parametrize(
    ("value", "expected"), [(2.9, 2), (-2.9, -2), (math.nan, 0), (3e9, 0x7FFFFFFF), (-3e9, -0x80000000)]
)
def test_floats_to_integers(value: float, expected: int) -> None:
    assert one("cvt.rzi.s32.f32 %r100, %r0;", bits(value)) == expected & 0xFFFFFFFF


def some_floats(count: int, seed: int = 0) -> np.ndarray:
    """Every magnitude, and what lies at the borders of narrow formats."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(count).astype(np.float32) * 2.0 ** random.integers(-30, 17, count)
    borders = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        65504,
        65519.99,
        65520,
        2**-24,
        2**-25,
        2**-25 * 1.0001,
        2**-14,
        1 + 2**-8,
    ]
    return np.concatenate([np.array(borders), values])[:count].astype(np.float32)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_narrow_conversions_round_as_torch_does(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    for seed in range(4):
        values = some_floats(64, seed).reshape(32, 2)
        words = np.zeros((32, 8), np.uint32)
        words[:, :2] = values.view(np.uint32)
        body = f"cvt.rn.{kind}.f32 %rs1, %r0; cvt.u32.u16 %r100, %rs1; cvt.f32.{kind} %r101, %rs1;"
        body += f"cvt.rn.{kind}x2.f32 %r102, %r1, %r0;"
        found = execute(body, words)
        narrow = torch.from_numpy(values).to(dtype)
        codes = narrow.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)
        assert (found[:, 0] == codes[:, 0]).all()
        assert (found[:, 1] == narrow[:, 0].float().numpy().view(np.uint32)).all()
        assert (found[:, 2] == codes[:, 0] | codes[:, 1] << 16).all()
    assert one(f"cvt.rn.{kind}.f32 %rs1, %r0; cvt.u32.u16 %r100, %rs1;", NAN) == 0x7FFF


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["fma", "mul", "add", "sub"])
def test_narrow_arithmetic_rounds_once(kind: str, name: str) -> None:
    """Against float64, in which these results are exact or far from a tie."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    random = torch.Generator().manual_seed(3)
    x, y, z = torch.randn(3, 32, 2, generator=random).to(dtype)
    wide = [t.double() for t in (x, y, z)]
    exact = {
        "fma": wide[0] * wide[1] + wide[2],
        "mul": wide[0] * wide[1],
        "add": wide[0] + wide[1],
        "sub": wide[0] - wide[1],
    }
    expected = exact[name].to(dtype).view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)
    words = np.zeros((32, 8), np.uint32)
    for i, t in enumerate((x, y, z)):
        words[:, i] = t.contiguous().view(torch.int32)[:, 0].numpy().view(np.uint32)
    names = "%r0, %r1, %r2" if name == "fma" else "%r0, %r1"
    body = f"{name}.rn.{kind} %r100, {names};"
    if name != "sub":
        body += f"{name}.rn.{kind}x2 %r101, {names};"
    found = execute(body, words)
    assert (found[:, 0] == expected[:, 0]).all()
    if name != "sub":
        assert (found[:, 1] == expected[:, 0] | expected[:, 1] << 16).all()


@pytest.mark.parametrize(("addend", "expected"), [(0, 0x3F90), (0x1780, 0x3F91), (0x9780, 0x3F90)])
def test_a_narrow_sum_just_past_a_tie(addend: int, expected: int) -> None:
    """(1 + 2^-4)^2 is a tie in bfloat16; 2^-80 more or less decides it, and float64 alone would lose that."""
    assert one("fma.rn.bf16 %r100, %r0, %r0, %r1;", 0x3F88, addend) == expected


@pytest.mark.parametrize("comparison", isa.COMPARISONS)
def test_comparisons_of_floats(comparison: str) -> None:
    def holds(x: float, y: float) -> bool:
        unordered = math.isnan(x) or math.isnan(y)
        if comparison in ("num", "nan"):
            return unordered == (comparison == "nan")
        if unordered:
            return len(comparison) == 3
        return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[
            comparison[:2]
        ]

    for x, y in (
        (1.0, 2.0),
        (2.0, 1.0),
        (1.0, 1.0),
        (0.0, -0.0),
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, math.inf),
    ):
        body = f"setp.{comparison}.f32 %p1, %r0, %r1; selp.b32 %r100, 1, 0, %p1;"
        assert one(body, bits(x), bits(y)) == holds(x, y), (x, y)


@pytest.mark.parametrize(
    ("comparison", "x", "y", "expected"),
    [("lt.s32", -1, 1, 1), ("lt.u32", -1, 1, 0), ("ge.s32", 1, 1, 1), ("gt.u32", -1, 1, 1), ("eq.b32", 4, 4, 1),
     ("ne.b32", 4, 4, 0), ("le.s32", 2, 1, 0), ("eq.b16", 0x10004, 4, 1), ("lt.s16", 0xFFFF, 0, 1)],
)  # fmt: skip
def test_comparisons_of_integers(comparison: str, x: int, y: int, expected: int) -> None:
    assert one(f"setp.{comparison} %p1, %r0, %r1; selp.b32 %r100, 1, 0, %p1;", x, y) == expected


def test_predicates() -> None:
    start = "setp.ne.b32 %p1, %r0, 0; setp.ne.b32 %p2, %r1, 0;"
    for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for name, expected in (("and", x & y), ("or", x | y), ("xor", x ^ y)):
            assert one(f"{start} {name}.pred %p3, %p1, %p2; selp.b32 %r100, 1, 0, %p3;", x, y) == expected
        assert one(f"{start} not.pred %p3, %p1; selp.b32 %r100, 1, 0, %p3;", x, y) == 1 - x
        assert one(f"{start} @!%p1 mov.b32 %r100, 7;", x, y) == (0 if x else 7)
    assert one("mov.pred %p1, -1; selp.b32 %r100, 1, 0, %p1;") == 1
    assert one("mov.pred %p1, 0; mov.pred %p2, %p1; selp.b32 %r100, 1, 0, %p2;") == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shfl.sync.bfly.b32 %r100, %r9000, 5, 31, -1;", [lane ^ 5 for lane in range(32)]),
        ("shfl.sync.idx.b32 %r100, %r9000, 3, 31, -1;", [3] * 32),
        ("shfl.sync.idx.b32 %r100, %r9000, 3, 0x181f, -1;", [3 + lane // 8 * 8 for lane in range(32)]),
        (
            "shfl.sync.up.b32 %r100, %r9000, 2, 0, -1;",
            [lane - 2 if lane >= 2 else lane for lane in range(32)],
        ),
        (
            "shfl.sync.up.b32 %r100, %r9000, 2, 0x1800, -1;",
            [lane - 2 if lane % 8 >= 2 else lane for lane in range(32)],
        ),
        (
            "shfl.sync.down.b32 %r100, %r9000, 2, 31, -1;",
            [lane + 2 if lane < 30 else lane for lane in range(32)],
        ),
        ("mov.b32 %r50, -1; redux.sync.add.s32 %r100, %r9000, %r50;", [496] * 32),
        (
            "mov.b32 %r50, -1; sub.s32 %r51, %r9000, 9; redux.sync.min.s32 %r100, %r51, %r50;",
            [0xFFFFFFF7] * 32,
        ),
        ("mov.b32 %r50, -1; sub.s32 %r51, %r9000, 9; redux.sync.min.u32 %r100, %r51, %r50;", [0] * 32),
        ("mov.b32 %r50, -1; sub.s32 %r51, %r9000, 9; redux.sync.max.s32 %r100, %r51, %r50;", [22] * 32),
        ("mov.b32 %r50, -1; redux.sync.xor.b32 %r100, %r9000, %r50;", [0] * 32),
    ],
)
def test_lanes_exchange(body: str, expected: list[int]) -> None:
    assert execute(body)[:, 0].tolist() == expected


def test_divergent_branches_run_and_meet_again() -> None:
    """Lanes take three ways, loop as often as their index, and exchange values after they met."""
    body = """
        mov.b32 %r10, %r9000;
        and.b32 %r11, %r9000, 3;
        setp.eq.b32 %p1, %r11, 0;
        @%p1 bra $A;
        setp.eq.b32 %p2, %r11, 1;
        @%p2 bra $B;
        add.s32 %r100, %r10, 1000;
        bra.uni $END;
    $A: setp.le.s32 %p3, %r10, 0;
        @%p3 bra $END;
        add.s32 %r100, %r100, 1;
        sub.s32 %r10, %r10, 1;
        bra $A;
    $B: add.s32 %r100, %r10, 2000;
    $END:
        shfl.sync.bfly.b32 %r101, %r100, 1, 31, -1;
    """
    found = execute(body)
    expected = [lane + (0, 2000, 1000, 1000)[lane % 4] for lane in range(32)]
    assert found[:, 0].tolist() == expected
    assert found[:, 1].tolist() == [expected[lane ^ 1] for lane in range(32)]


@pytest.mark.parametrize(
    "opcode",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "bar.sync 1, 64;",
        "ld.local.b32 %r1, [%rd1];",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
    ],
)
def test_an_unknown_instruction_is_named(opcode: str) -> None:
    with pytest.raises(UnknownInstruction, match=opcode.split(" ")[0].replace(".", r"\.")):
        execute(opcode)


def test_widths_of_accesses() -> None:
    body = """
        mov.b32 %r10, global_smem;
        mad.lo.s32 %r11, %r9000, 16, %r10;
        st.shared.v4.b32 [%r11], {%r0, %r1, %r2, %r3};
        ld.shared.b8 %rs1, [%r11 + 1];
        cvt.u32.u16 %r100, %rs1;
        ld.shared.b16 %r101, [%r11 + 2];
        ld.shared.v2.b64 {%rd1, %rd2}, [%r11];
        mov.b64 {_, %r102}, %rd2;
        st.shared.b8 [%r11], %rs1;
        ld.shared.b32 %r103, [%r11];
    """
    words = np.random.default_rng(0).integers(0, 2**32, (32, 8)).astype(np.uint32)
    found = execute(body, words)
    byte = words[:, 0] >> 8 & 255
    assert (
        found == np.stack([byte, words[:, 0] >> 16, words[:, 3], (words[:, 0] & 0xFFFFFF00) | byte], 1)
    ).all()
