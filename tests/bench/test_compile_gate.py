"""The gate over machine code: its parsers on samples, what it refuses, and the manifest's comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compile_gate import command as compile_kernels
from bench.compile_gate import gate, manifest
from bench.compile_gate.decision_variants import STANDS_FOR_ALL
from bench.compile_gate.variants import LENGTHS, OPS
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.models.shapes import SHAPES

SASS = """\
	.headerflags	@"EF_CUDA_SM90"
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R88, desc[UR44][R88.64] ;
        /*0020*/               @P0 EXIT ;
.L_x_0:
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R8], desc[UR44][R10.64] ;
        /*0040*/                   LDG.E.128.STRONG.GPU R24, desc[UR44][R10.64] ;
        /*0050*/              @!PT LDG.E.64 R4, desc[UR44][R12.64] ;
        /*0060*/                   LDG.E.U16 R4, desc[UR44][R12.64] ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   STG.E.128 desc[UR44][R88.64], R108 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/              @!P2 ATOMG.E.ADD.STRONG.GPU PT, R25, desc[UR44][R108.64], R25 ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*00d0*/                   STG.E desc[UR44][R88.64], RZ ;
        /*00e0*/                   EXIT ;
.L_x_2:
        /*00f0*/                   BRA `(.L_x_2);
"""
PTXAS = """\
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    32 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""
RESOURCES = "Function kernel:\n  REG:238 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:632 TEXTURE:0\n"
CLEAN = PTXAS.splitlines()[0]
TTGIR = """\
#blocked1 = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#blocked2 = #ttg.blocked<{sizePerThread = [4, 1], threadsPerWarp = [4, 8], warpsPerCTA = [1, 4], order = [0, 1]}>
      %total = "tt.reduce"(%parts_46) <{axis = 1 : i32}> ({
      ^bb0(%total_190: f32 loc(#loc1), %total_191: f32 loc(#loc1)):
        %total_192 = arith.addf %total_190, %total_191 : f32 loc(#loc439)
        tt.reduce.return %total_192 : f32 loc(#loc418)
      }) : (tensor<16x32xf32, #blocked2>) -> tensor<16xf32, #ttg.slice<{dim = 1, parent = #blocked2}>> loc(#loc418)
      %peak = "tt.reduce"(%logits) <{axis = 0 : i32}> ({
      ^bb0(%peak_1: f32 loc(#loc1), %peak_2: f32 loc(#loc1)):
        %peak_3 = arith.maxnumf %peak_1, %peak_2 : f32 loc(#loc2)
        tt.reduce.return %peak_3 : f32 loc(#loc2)
      }) : (tensor<64x16xf32, #blocked1>) -> tensor<16xf32, #ttg.slice<{dim = 0, parent = #blocked1}>> loc(#loc2)
"""
LAYOUT = "16x32 [4,1] [4,8] [1,4] [0,1]"
GOOD = gate.Figures(
    registers=128,
    spill_bytes=0,
    stack=0,
    shared=65536,
    local_accesses=0,
    wide_share=0.97,
    bytes_in_flight=65536,
    tensor_core="HGMMA.64x64x16",
    arrivals=1,
    barrier_before_arrival=True,
    warnings=0,
    instructions=900,
    row_sums=LAYOUT,
)
ALL = gate.Needs(tensor_core=True, arrival=True, streams=True, normalises="window")
KERNEL = manifest.Kernel("head", "bfloat16", "plain", "small")


def test_instructions_widths_and_loops() -> None:
    instructions = gate.parse_sass(SASS)
    assert len(instructions) == 16
    loads = [i.load_bytes() for i in instructions if i.name.startswith("LDG")]
    assert loads == [4, 16, 16, 8, 2]
    assert len(gate.loops(SASS)) == 1, "a forward branch and a branch to itself are no loops"
    assert gate.loop_loads(SASS) == [(32, 42, True)]
    outside = SASS.replace("`(.L_x_2)", "`(.L_x_0)")
    assert len(gate.loops(outside)) == 1, "back from behind the EXIT is a return, no loop"
    assert len(gate.loops(outside.replace("EXIT", "NOP"))) == 1
    assert gate.loops(outside.replace("EXIT", "NOP"))[0][1] > gate.loops(SASS)[0][1]


def test_barrier_before_the_arrival() -> None:
    assert gate.barrier_before_arrivals(gate.parse_sass(SASS))
    bare = "\n".join(line for line in SASS.splitlines() if "BAR.SYNC" not in line)
    assert not gate.barrier_before_arrivals(gate.parse_sass(bare))
    late = bare.replace("BRA `(.L_x_1)", "BAR.SYNC.DEFER_BLOCKING 0x0")
    assert not gate.barrier_before_arrivals(gate.parse_sass(late)), "one after the atomic is too late"


def test_logs_of_the_tools() -> None:
    assert gate.parse_ptxas(PTXAS) == (52, 1)
    assert gate.parse_ptxas(CLEAN) == (0, 0)
    assert gate.parse_resources(RESOURCES) == (238, 0, 1024)
    with pytest.raises(ValueError, match="no resource line"):
        gate.parse_resources("")


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "programs"),
    [(90, 238, 114688, 4, 2), (90, 128, 16384, 8, 2), (89, 128, 67072, 8, 1), (90, 32, 0, 4, 16)],
)
def test_programs_per_sm(arch: int, registers: int, shared: int, num_warps: int, programs: int) -> None:
    assert gate.programs_per_sm(arch, registers, shared, num_warps) == programs


def figures(**change: Any) -> gate.Figures:
    given: dict[str, Any] = {"arch": 90, "shared": 114688, "num_warps": 4, "stages": (3,), "programs": 9999}
    return gate.figures(SASS, RESOURCES, CLEAN, TTGIR, **(given | change))


def test_figures_of_a_kernel() -> None:
    found = figures()
    assert found.wide_share == round(32 / 42, 3)
    assert found.bytes_in_flight == 32 * 2 * 128 * 2
    assert found.tensor_core == "HGMMA.64x64x16"
    assert (found.arrivals, found.local_accesses, found.spill_bytes) == (1, 0, 0)
    assert found.row_sums == LAYOUT


def test_bytes_in_flight() -> None:
    assert figures(programs=66).bytes_in_flight == 32 * 2 * 128 // 2, "half of the SMs have a program"
    assert figures(stages=(6, 2)).bytes_in_flight == 32 * 1 * 128 * 2, "one loop, two depths: the least"
    wider = SASS.replace(".L_x", ".L_y").replace("LDG.E.64", "LDGSTS.E.128")
    two = gate.figures(
        SASS + wider, RESOURCES, CLEAN, "", arch=90, shared=114688, num_warps=4, stages=(6, 2), programs=9999
    )
    assert two.bytes_in_flight == 48 * 1 * 128 * 2, "the loop with the fewest: the wide one, at its own depth"


def test_layouts_of_sums() -> None:
    assert gate.sum_layouts("") == ""
    other = TTGIR.replace("16x32xf32, #blocked2", "16x32xf32, #blocked1")
    assert gate.sum_layouts(TTGIR + other) == f"16x32 [1,8] [4,8] [4,1] [1,0] | {LAYOUT}"
    assert gate.sum_layouts(TTGIR + TTGIR.replace("16x32", "16x64")).count("|") == 1
    assert gate.sum_layouts(TTGIR.replace("addf", "maxnumf")) == ""


def test_the_gate_passes_what_is_good() -> None:
    assert gate.gate(GOOD, ALL, 90) == []
    assert gate.gate(replace(GOOD, tensor_core="HMMA.16816"), ALL, 89) == []
    relaxed = replace(GOOD, tensor_core="", arrivals=0, wide_share=0.1, bytes_in_flight=0)
    assert gate.gate(relaxed, gate.Needs(), 90) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 52}, "52 bytes spilled"),
        ({"stack": 32}, "stack frame"),
        ({"local_accesses": 7}, "LDL/STL"),
        ({"shared": 232449}, "shared memory"),
        ({"warnings": 1}, "C75xx"),
        ({"wide_share": 0.949}, "16-byte loads"),
        ({"bytes_in_flight": 32767}, "in flight"),
        ({"tensor_core": "HMMA.16816"}, "expected HGMMA"),
        ({"tensor_core": ""}, "none, expected HGMMA"),
        ({"arrivals": 0}, "no arrival"),
        ({"barrier_before_arrival": False}, "no BAR.SYNC"),
        ({"row_sums": ""}, "layouts none"),
        ({"row_sums": f"{LAYOUT} | 16x64"}, "expected one"),
    ],
)
def test_the_gate_refuses(change: dict[str, Any], message: str) -> None:
    wrong = gate.gate(replace(GOOD, **change), ALL, 90)
    assert len(wrong) == 1
    assert message in wrong[0]


def test_comparison_with_the_manifest() -> None:
    a, b, c = (replace(KERNEL, shape=shape) for shape in "abc")
    kept, found = {a: replace(GOOD, registers=130), c: GOOD}, {a: GOOD, b: GOOD}
    assert manifest.compare(kept, found, whole=True) == [
        "head/bfloat16/plain@a: registers 130 -> 128",
        "head/bfloat16/plain@b: not in the manifest",
        "head/bfloat16/plain@c: in the manifest, not compiled",
    ]
    assert len(manifest.compare(kept, found, whole=False)) == 2


def test_the_manifest_has_a_line_a_binary_and_comes_back_as_it_was(tmp_path: Path) -> None:
    kernels = {replace(KERNEL, shape=shape): GOOD for shape in ("1b", "3b", "8b")}
    kernels[replace(KERNEL, shape="3b")] = replace(GOOD, registers=99)
    kept = {"3.10.0": {"sm_100": kernels, "sm_90": {KERNEL: GOOD}}, "3.9.0": {"sm_90": {KERNEL: GOOD}}}
    path = tmp_path / "manifest.json"
    manifest.save(kept, path)
    assert manifest.load(path) == kept
    assert list(json.loads(path.read_text())["3.10.0"]) == ["sm_90", "sm_100"]
    lines = [line for line in path.read_text().splitlines() if "head/bfloat16/plain@" in line]
    assert len(lines) == 4
    assert '"head/bfloat16/plain@1b+8b"' in lines[1]
    path.write_text(path.read_text().replace('"stack"', '"heap"'))
    with pytest.raises(ValueError, match="other fields"):
        manifest.load(path)


def compiled(kernel: manifest.Kernel, **change: Any) -> compile_kernels.Compiled:
    return compile_kernels.Compiled(kernel, "hash", replace(GOOD, **change), ALL, [])


def test_what_is_not_in_the_manifest_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    kept = {"3.9.0": {"sm_90": {KERNEL: replace(GOOD, registers=130)}}}
    found = [compiled(KERNEL), compiled(replace(KERNEL, dtype="float16"))]
    assert compile_kernels.check_manifest(kept, "3.9.1", "sm_90", found, whole=True)
    assert "Triton 3.9.1 for sm_90 in bfloat16 is not in the manifest" in capsys.readouterr().out
    assert compile_kernels.check_manifest(kept, "3.9.0", "sm_90", found[1:], whole=True)
    assert "sm_90 in float16 is not in the manifest" in capsys.readouterr().out
    assert not compile_kernels.check_manifest(kept, "3.9.0", "sm_90", found, whole=True)
    assert "registers 130 -> 128" in capsys.readouterr().out


def test_kernels_of_a_model_must_normalise_alike() -> None:
    first, second = compiled(KERNEL), compiled(replace(KERNEL, op="qkv"), row_sums="16x32 [1,4]")
    assert len(compile_kernels.unequal_norms([first, second])) == 1
    other_model = replace(second, kernel=replace(second.kernel, shape="large"))
    assert compile_kernels.unequal_norms([first, other_model]) == []
    for needs in (gate.Needs(), replace(ALL, normalises="gather")):
        assert compile_kernels.unequal_norms([first, replace(second, needs=needs)]) == []


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_is_planned_for_every_shape_dtype_and_length(
    op: str,
) -> None:
    """The plans themselves, which refuse what does not fit; the compiler is not needed for that."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for arch in (80, 90, 100):
                plans = [list(OPS[op](shape, dtype, arch, n)) for n in LENGTHS]
                names = [variant.name for variant in plans[0]]
                assert len(set(names)) == len(names)
                stands = (shape.name, str(dtype).removeprefix("torch.")) == STANDS_FOR_ALL
                assert bool(names) == (op != "decision" or stands)
                for variants in plans:
                    assert [variant.name for variant in variants] == names
                    for variant, first in zip(variants, plans[0], strict=True):
                        assert isinstance(variant.launch, Launch)
                        assert variant.launch.kwargs == first.launch.kwargs, "a constexpr depends on T"


def test_the_committed_manifest_has_only_known_kernels_that_pass() -> None:
    kept = manifest.load()
    assert {"sm_89", "sm_90"} <= kept["3.9.0"].keys()
    for architectures in kept.values():
        for arch, kernels in architectures.items():
            assert arch in compile_kernels.ARCHITECTURES
            for kernel, stored in kernels.items():
                assert kernel.op in OPS
                assert gate.gate(stored, gate.Needs(), int(arch[3:])) == [], kernel
