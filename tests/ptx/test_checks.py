"""Faults that the machine must catch, and code that it must let pass, in hand-written PTX."""

from __future__ import annotations

from typing import Any

import pytest

from ptx import machine
from ptx.machine import AT_ONCE, LATE, Fault, Schedule
from ptx.snippets import execute

pytestmark = pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING)

# Thread i's place in shared memory, and its neighbour's in the next warp.
PLACES = """
    mov.b32 %r10, global_smem;
    mad.lo.s32 %r11, %r9000, 16, %r10;
    xor.b32 %r12, %r9000, 32;
    mad.lo.s32 %r13, %r12, 16, %r10;
"""


def caught(
    kinds: str, body: str, *, seeds: int = 6, warps: int = 2, blocks: int = 1, **schedule: Any
) -> None:
    """A fault of this kind, or of one of these, whatever the seed."""
    for seed in range(seeds):
        with pytest.raises(Fault) as found:
            execute(body, warps=warps, blocks=blocks, schedule=Schedule(seed=seed, quantum=3, **schedule))
        assert found.value.kind in kinds.split(), found.value


def passes(body: str, *, warps: int = 2, blocks: int = 1) -> None:
    for seed in range(6):
        execute(body, warps=warps, blocks=blocks, schedule=Schedule.drawn(seed))


def verdict(body: str) -> str:
    """The kind of fault of a body, "none" where it runs through."""
    try:
        execute(body, warps=2)
    except Fault as fault:
        return fault.kind
    return "none"


def test_a_missing_barrier_is_a_race_either_way() -> None:
    store, load = "st.shared.b32 [%r11], %r0;", "ld.shared.b32 %r100, [%r13];"
    passes(f"{PLACES} {store} bar.sync 0; {load}")
    initial = f"{PLACES} {store} bar.sync 0;"
    caught("shared_race", f"{initial} {store} {load}")
    caught("shared_race", f"{initial} {load} {store}")
    caught("shared_race", f"{initial} st.shared.b32 [%r10], %r0;")


def test_a_race_names_both_instructions_and_where() -> None:
    body = f"{PLACES} st.shared.b32 [%r11], %r0; bar.sync 0; st.shared.b32 [%r11], %r1; ld.shared.b32 %r100, [%r13];"
    with pytest.raises(Fault) as found:
        execute(body, warps=2, schedule=Schedule())
    text = str(found.value)
    assert "ld.shared.b32 %r100, [%r13]" in text
    assert "st.shared.b32 [%r11], %r1" in text
    assert "warp 0" in text
    assert "warp 1" in text
    assert "lane" in text
    assert "shared memory + " in text


def test_warps_may_store_one_value_to_one_place() -> None:
    passes(f"{PLACES} st.shared.b32 [%r10], 7; bar.sync 0; ld.shared.b32 %r100, [%r10];")


def test_neighbouring_bytes_are_no_race() -> None:
    passes(f"{PLACES} add.s32 %r14, %r10, %r9000; cvt.u16.u32 %rs1, %r0; st.shared.b8 [%r14], %rs1;")


COPY = "cp.async.cg.shared.global [%r11], [%rd9003], 16, 16; cp.async.commit_group;"


def test_a_copy_arrives_when_it_was_waited_for() -> None:
    wait = f"{COPY} cp.async.wait_group 0;"
    passes(f"{PLACES} {wait} ld.shared.b32 %r100, [%r11];")
    for copies in (AT_ONCE, LATE):
        caught("in_flight", f"{PLACES} {COPY} ld.shared.b32 %r100, [%r11];", copies=copies)
        caught(
            "in_flight", f"{PLACES} {COPY} cp.async.wait_group 1; ld.shared.b32 %r100, [%r11];", copies=copies
        )
        caught("in_flight", f"{PLACES} {COPY} st.shared.b32 [%r11], %r0;", copies=copies)
    # The wait is each warp's own: the data of others needs a barrier after it.
    caught("shared_race in_flight", f"{PLACES} {wait} bar.sync 0; {wait} ld.shared.b32 %r100, [%r13];")
    passes(f"{PLACES} {wait} bar.sync 0; ld.shared.b32 %r100, [%r13];")


def test_a_copy_fills_with_zeros() -> None:
    body = f"""{PLACES}
        cp.async.cg.shared.global [%r11], [%rd9003], 16, %r14; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {{%r100, %r101, %r102, %r103}}, [%r11];
    """
    assert (execute("mov.b32 %r14, 0;" + body) == 0).all()
    assert execute("mov.b32 %r14, 16;" + body)[3].tolist() == [24, 25, 26, 27]


def test_bounds_and_alignment() -> None:
    caught("bounds", "ld.global.b32 %r100, [%rd9003 + 4096];")
    caught("bounds", "st.global.b32 [%rd9001 + -4], %r0;")
    caught("alignment", "ld.global.b32 %r100, [%rd9003 + 2];")
    caught("alignment", "ld.global.v4.b32 {%r100, %r101, %r102, %r103}, [%rd9003 + 8];")
    caught("shared_bounds", "mov.b32 %r10, global_smem; st.shared.b32 [%r10 + 16384], %r0;")
    caught("shared_bounds", "mov.b32 %r10, 0; st.shared.b32 [%r10], %r0;")
    caught("alignment", "mov.b32 %r10, global_smem; st.shared.v2.b32 [%r10 + 4], {%r0, %r1};")
    # A guarded lane touches nothing.
    passes("setp.ne.b32 %p1, %r0, %r0; @%p1 ld.global.b32 %r100, [%rd9003 + 4096];")


def test_what_was_never_written_may_not_matter() -> None:
    caught("uninitialised", "add.s32 %r100, %r55, 1;")
    caught("uninitialised", "@%p5 mov.b32 %r100, 1;")
    caught("uninitialised", "@%p5 bra $X; mov.b32 %r100, 1; $X:")
    caught(
        "uninitialised", "cvt.u64.u32 %rd5, %r55; add.s64 %rd6, %rd9003, %rd5; ld.global.b32 %r100, [%rd6];"
    )
    caught("uninitialised", "mov.b32 %r10, global_smem; ld.shared.b32 %r100, [%r10];")
    caught("uninitialised", "shfl.sync.bfly.b32 %r100, %r55, 1, 31, -1;")
    # Half of the lanes were given a value.
    caught("uninitialised", "setp.lt.s32 %p1, %r9000, 40; @%p1 mov.b32 %r55, 1; mov.b32 %r100, %r55;")
    # A word may be put together of bytes of which some are: those that are may be used, the others not.
    word = "prmt.b32 %r56, %r55, %r0, 0x7650; prmt.b32 %r57, %r55, %r56, 0x7654; or.b32 %r57, %r57, 0x100;"
    passes(f"{word} prmt.b32 %r100, %r57, 0, 0x4321;")
    caught("uninitialised", f"{word} prmt.b32 %r100, %r57, 0, 0x4320;")
    caught("uninitialised", f"{word} add.s32 %r100, %r57, 1;")
    caught(
        "uninitialised",
        f"{word} mov.b32 %r10, global_smem; ld.shared.b32 %r57, [%r10]; prmt.b32 %r100, %r57, 0, 0x4321;",
        warps=1,
    )
    # It may be carried about, as long as no result depends on it.
    passes("setp.eq.b32 %p1, %r0, %r0; add.s32 %r56, %r55, 1; selp.b32 %r100, %r0, %r56, %p1;")


# A word with one half written, as compilers pack halves of which they want one.
LOW_HALF = "cvt.u16.u32 %rs1, %r0; mov.b32 %r56, {%rs1, %rs2};"
HIGH_HALF = "cvt.u16.u32 %rs1, %r0; mov.b32 %r56, {%rs2, %rs1};"


@pytest.mark.parametrize(
    ("written", "missing"),
    [
        ("mov.b32 {%rs3, _}, %r56; st.global.b16 [%rd9004], %rs3;", "low"),
        ("mov.b32 {_, %rs3}, %r56; st.global.b16 [%rd9004], %rs3;", "high"),
        ("cvt.u16.u32 %rs3, %r56; cvt.f32.bf16 %r100, %rs3;", "low"),
        ("cvt.u32.u16 %r100, %r56;", "low"),
        ("and.b32 %r100, %r56, 65535;", "low"),
        ("and.b32 %r100, %r56, -65536;", "high"),
        ("shl.b32 %r100, %r56, 16;", "low"),
        ("shl.b32 %r100, %r56, 19;", "low"),
        ("shr.u32 %r100, %r56, 16;", "high"),
        ("shr.s32 %r100, %r56, 20;", "high"),
        ("prmt.b32 %r100, %r56, 0, 0x4410;", "low"),
        ("st.global.b16 [%rd9004], %r56;", "low"),
        ("st.global.b8 [%rd9004], %r56;", "low"),
        ("mul.rn.bf16x2 %r57, %r56, %r0; cvt.u16.u32 %rs3, %r57; cvt.u32.u16 %r100, %rs3;", "low"),
        ("mov.b32 %r57, %r56; or.b32 %r58, %r57, %r0; mov.b32 {_, %rs3}, %r58; cvt.u32.u16 %r100, %rs3;", "high"),
        ("mov.b32 {%rs3, _}, %r56; mov.b32 %r100, {%rs3, %rs3};", "low"),
        ("setp.eq.b32 %p1, %r0, %r0; selp.b32 %r57, %r56, %r55, %p1; cvt.u32.u16 %r100, %r57;", "low"),
        ("shfl.sync.bfly.b32 %r57, %r56, 1, 31, -1; shr.u32 %r100, %r57, 16;", "high"),
        (f"{PLACES} st.shared.b32 [%r11], %r56; ld.shared.v2.b16 {{%rs3, %rs4}}, [%r11];"
         "cvt.u32.u16 %r100, %rs3;", "low"),
        (f"{PLACES} st.shared.b32 [%r11], %r56; ld.shared.b16 %rs3, [%r11 + 2]; cvt.u32.u16 %r100, %rs3;", "high"),
        (f"{PLACES} st.shared.v2.b32 [%r11], {{%r56, %r55}}; ld.shared.v2.b32 {{%r57, %r58}}, [%r11];"
         "cvt.u32.u16 %r100, %r57;", "low"),
        (f"{PLACES} stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r11], {{%r56, %r56, %r56, %r56}};"
         "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r57, %r58, %r59, %r60}, [%r11];"
         "shr.u32 %r100, %r60, 16;", "high"),
        ("mov.b64 %rd5, {%r56, %r55}; mov.b64 %rd6, %rd5; mov.b64 {%r57, _}, %rd6; cvt.u32.u16 %r100, %r57;", "low"),
    ],
)  # fmt: skip
def test_a_half_that_was_written_may_be_used(written: str, missing: str) -> None:
    """And its neighbour that was not, may not: the same code on a word whose other half is there is a fault."""
    there, other = (LOW_HALF, HIGH_HALF) if missing == "low" else (HIGH_HALF, LOW_HALF)
    passes(there + written)
    caught("uninitialised", other + written, seeds=1)


@pytest.mark.parametrize("word", [LOW_HALF, HIGH_HALF])
@pytest.mark.parametrize(
    "use",
    [
        "st.global.b32 [%rd9004], %r56;",
        "st.global.v2.b32 [%rd9004], {%r0, %r56};",
        "add.s32 %r57, %r56, 1; mov.b32 {%rs3, %rs4}, %r57; st.global.v2.b16 [%rd9004], {%rs3, %rs4};",
        "setp.eq.b32 %p1, %r56, 0; @%p1 bra $X; mov.b32 %r100, 1; $X:",
        "setp.eq.b32 %p1, %r56, 0; @%p1 mov.b32 %r100, 1;",
        "cvt.u64.u32 %rd5, %r56; add.s64 %rd6, %rd9003, %rd5; ld.global.b32 %r100, [%rd6];",
        "mov.b64 %rd5, {%r0, %r56}; ld.global.b32 %r100, [%rd5];",
        "mov.b64 %rd5, {%r0, %r56}; st.global.b64 [%rd9004], %rd5;",
        "mov.b64 %rd5, {%r0, %r56}; setp.eq.b64 %p1, %rd5, 0; @%p1 mov.b32 %r100, 1;",
        "mov.b64 %rd5, {%r0, %r56}; add.s64 %rd6, %rd5, 1; cvt.u32.u64 %r100, %rd6;",
        PLACES + "ld.shared.b32 %r100, [%r56];",
        PLACES + "st.shared.b32 [%r11], %r56; ld.shared.b32 %r100, [%r11];",
        PLACES + "cp.async.cg.shared.global [%r11], [%rd9003], 16, %r56;",
        "atom.global.gpu.relaxed.add.u32 %r57, [%rd9004], %r56;",
        "redux.sync.or.b32 %r100, %r56, -1;",
        "mul.rn.bf16x2 %r100, %r56, %r0;",
        "shr.u32 %r100, %r56, 12;",
        "{mma} {%r56, %r0, %r0, %r0}, {%r0, %r0}, {%r0, %r0, %r0, %r0};",
        "{mma} {%r0, %r0, %r0, %r0}, {%r0, %r56}, {%r0, %r0, %r0, %r0};",
        "{mma} {%r0, %r0, %r0, %r0}, {%r0, %r0}, {%r0, %r56, %r0, %r0};",
    ],
)  # fmt: skip
def test_a_word_counts_as_written_when_both_halves_are(word: str, use: str) -> None:
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r100, %r101, %r102, %r103},"
    use = use.replace("{mma}", mma)
    caught("uninitialised", word + use, seeds=1)
    # With the missing half given it is no fault of that kind; an address may be one of another.
    assert verdict("mov.b16 %rs2, 1;" + word + use) != "uninitialised"


def test_a_word_counts_as_written_again() -> None:
    """Knowledge of single bytes ends when all of a register is lost, and when it is given anew."""
    lost = "add.s32 %r56, %r55, 1;"
    caught("uninitialised", f"{LOW_HALF} {lost} cvt.u32.u16 %r100, %r56;", seeds=1)
    passes(f"{LOW_HALF} mov.b32 %r56, %r0; mov.b32 %r100, %r56;")
    caught("uninitialised", f"{LOW_HALF} mov.b32 %r56, %r0; {lost} cvt.u32.u16 %r100, %r56;", seeds=1)
    # In some lanes alone.
    half = "setp.lt.s32 %p1, %r9000, 40; @%p1 mov.b32 %r56, %r0;"
    caught("uninitialised", f"{LOW_HALF} {half} mov.b32 %r100, %r56;", seeds=1)
    passes(f"{LOW_HALF} {half} cvt.u32.u16 %r100, %r56;")


def test_a_packed_conversion_leaves_each_half_as_its_operand_was() -> None:
    low, high = "{%rs3, _}", "{_, %rs3}"
    for operands, there, missing in (("%r55, %r0", low, high), ("%r0, %r55", high, low)):
        convert = f"cvt.rn.bf16x2.f32 %r56, {operands};"
        passes(f"{convert} mov.b32 {there}, %r56; st.global.b16 [%rd9004], %rs3;")
        caught("uninitialised", f"{convert} mov.b32 {missing}, %r56; st.global.b16 [%rd9004], %rs3;", seeds=1)


def test_zeros_of_a_mask_decide_only_where_they_are_written() -> None:
    passes("and.b32 %r100, %r55, 0;")
    passes("and.b64 %rd6, %rd5, 0; mov.b64 {%r100, %r101}, %rd6;")
    caught("uninitialised", "and.b32 %r100, %r55, 256;", seeds=1)
    caught("uninitialised", "and.b32 %r100, %r55, %r56;", seeds=1)


def test_lanes_must_meet() -> None:
    caught("lanes", "setp.lt.s32 %p1, %r9000, 5; @%p1 shfl.sync.bfly.b32 %r100, %r0, 1, 31, -1;")
    caught("lanes", "setp.lt.s32 %p1, %r9000, 5; @%p1 bar.sync 0;")


def test_an_endless_loop_ends() -> None:
    caught("endless", "$X: bra $X;", budget=10000, seeds=1)


# Blocks count in the first word of `in` and leave their share in `out` (second KiB of the same 2 KiB).
ARRIVE = """
    mov.b32 %r100, 0; mov.b32 %r20, 1;
    setp.eq.b32 %p1, %r9000, 0;
    mul.wide.u32 %rd10, %r9009, 4;
    add.s64 %rd11, %rd9001, %rd10;
    @%p1 st.global.b32 [%rd11 + 48], %r20;
    {barrier}
    @%p1 atom.global.gpu.{order}.add.u32 %r21, [%rd9000 + 32], %r20;
    @!%p1 bra $END;
    setp.ne.b32 %p2, %r21, 2;
    @%p2 bra $END;
    ld.global.b32 %r30, [%rd9001 + 48];
    ld.global.b32 %r31, [%rd9001 + 52];
    ld.global.b32 %r32, [%rd9001 + 56];
    $END: ret;
"""


def arriving(order: str) -> str:
    return ARRIVE.format(order=order, barrier="")


def test_blocks_are_ordered_by_release_and_acquire_only() -> None:
    passes(arriving("acq_rel"), blocks=3)
    for order in ("relaxed", "release", "acquire"):
        caught("global_race", arriving(order), blocks=3)


def test_a_release_covers_what_its_warp_met_at_a_barrier() -> None:
    other = arriving("acq_rel").replace("@%p1 st.global", "setp.eq.b32 %p3, %r9000, 32; @%p3 st.global")
    passes(other.replace("@%p1 atom", "bar.sync 0; @%p1 atom"), blocks=3)
    caught("global_race", other, blocks=3)


def test_two_blocks_write_one_cell() -> None:
    caught("global_race", "st.global.b32 [%rd9004 + 32], %r9009;", blocks=2)
    passes(
        "mul.wide.u32 %rd10, %r9009, 4; add.s64 %rd11, %rd9004, %rd10; st.global.b32 [%rd11 + 32], %r0; ret;",
        blocks=2,
    )


def test_stores_stay_invisible_until_released() -> None:
    """With the detector off: the last block reads what the others left only behind a release."""
    body = arriving("{order}").replace("$END: ret;", """
        add.s32 %r33, %r30, %r31; add.s32 %r33, %r33, %r32;
        st.global.b32 [%rd9001], %r33; $END: ret;""")  # fmt: skip
    sums: dict[str, set[int]] = {"acq_rel": set(), "relaxed": set()}
    for order, found in sums.items():
        for seed in range(6):
            schedule = Schedule(seed=seed, detect=False, quantum=3)
            found.add(int(execute(body.format(order=order), blocks=3, schedule=schedule)[0, 0]))
    assert sums["acq_rel"] == {3}
    assert min(sums["relaxed"]) < 3
