"""The gate over machine code: its parsers on samples, what it refuses, and the manifest's comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from bench import compile_gate as gate
from bench import compile_kernels

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
)
ALL = gate.Needs(tensor_core=True, arrival=True, streams=True)


def test_instructions_widths_and_loops() -> None:
    instructions = gate.parse_sass(SASS)
    assert len(instructions) == 16
    loads = [i.load_bytes() for i in instructions if i.name.startswith("LDG")]
    assert loads == [4, 16, 16, 8, 2]
    assert len(gate.loops(SASS)) == 1, "a forward branch and a branch to itself are no loops"
    assert gate.loop_loads(SASS) == [(32, 42, True)]


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


def test_figures_of_a_kernel() -> None:
    found = gate.figures(SASS, RESOURCES, CLEAN, arch=90, shared=114688, num_warps=4, num_stages=3)
    assert found.wide_share == round(32 / 42, 3)
    assert found.bytes_in_flight == 32 * 2 * 128 * 2
    assert found.tensor_core == "HGMMA.64x64x16"
    assert (found.arrivals, found.local_accesses, found.spill_bytes) == (1, 0, 0)


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
    ],
)
def test_the_gate_refuses(change: dict[str, Any], message: str) -> None:
    wrong = gate.gate(replace(GOOD, **change), ALL, 90)
    assert len(wrong) == 1
    assert message in wrong[0]


def test_comparison_with_the_manifest() -> None:
    found = {"a": GOOD.json(), "b": GOOD.json()}
    manifest = {"3.9.0": {"sm_90": {"a": GOOD.json() | {"registers": 130}, "c": GOOD.json()}}}
    assert gate.compare(manifest, "3.9.0", "sm_90", found, whole=True) == [
        "a: registers 130 -> 128",
        "b: not in the manifest",
        "c: in the manifest, not compiled",
    ]
    assert len(gate.compare(manifest, "3.9.0", "sm_90", found, whole=False)) == 2
    for version, arch in (("3.8.0", "sm_90"), ("3.9.0", "sm_80")):
        with pytest.raises(KeyError):
            gate.compare(manifest, version, arch, found, whole=True)


def test_what_is_not_in_the_manifest_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    compiled = [compile_kernels.Compiled("a", GOOD, [])]
    assert compile_kernels.check_manifest({}, "3.9.1", "sm_90", compiled, whole=True)
    assert "Triton 3.9.1 for sm_90 is not in the manifest" in capsys.readouterr().out


def test_the_committed_manifest_has_only_known_figures_that_pass() -> None:
    manifest = json.loads(compile_kernels.MANIFEST.read_text(encoding="utf-8"))
    assert manifest
    for architectures in manifest.values():
        for arch, kernels in architectures.items():
            assert arch in compile_kernels.ARCHITECTURES
            for key, stored in kernels.items():
                assert key.split("/")[0] in compile_kernels.OPS
                assert gate.gate(gate.Figures(**stored), gate.Needs(), int(arch[3:])) == [], key
