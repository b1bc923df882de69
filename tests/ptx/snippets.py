"""Hand-written PTX for one warp: 32-bit words in, words out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from ptx.machine import Memory, Schedule, run
from ptx.parser import parse

HEADER = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet(
    .param .u64 .ptr .global .align 1 snippet_param_0,
    .param .u64 .ptr .global .align 1 snippet_param_1
)
{
    mov.u32 %r9000, %tid.x;
    mov.u32 %r9009, %ctaid.x;
    ld.param.b64 %rd9000, [snippet_param_0];
    ld.param.b64 %rd9001, [snippet_param_1];
    mul.wide.u32 %rd9002, %r9000, 64;
    add.s64 %rd9003, %rd9000, %rd9002;
    add.s64 %rd9004, %rd9001, %rd9002;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd9003];
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd9003 + 16];
"""
FOOTER = """
    st.global.v4.b32 [%rd9004], {%r100, %r101, %r102, %r103};
    ret;
}
"""


def execute(
    body: str,
    words: np.ndarray | None = None,
    *,
    warps: int = 1,
    blocks: int = 1,
    shared: int = 16384,
    schedule: Schedule | None = None,
) -> np.ndarray:
    """Run a body on `warps` warps of `blocks` blocks.

    Args:
        body: PTX; %r0 to %r7 hold the thread's words, %r9000 is its index, %rd9003 and %rd9004 its places in
            and out; what it leaves in %r100 to %r103 is the result.
        words: [threads, 8] uint32 of the block, each block gets the same; counting numbers if left out.

    Returns:
        [threads, 4] uint32.
    """
    threads = 32 * warps
    given = np.zeros((threads, 16), np.uint32)
    given[:, :8] = np.arange(threads * 8).reshape(threads, 8) if words is None else words
    out = np.zeros((threads, 16), np.uint32)
    names = ["%r100", "%r101", "%r102", "%r103"]
    used = "".join(f"    mov.b32 {name}, 0;\n" for name in names)
    program = parse(HEADER + used + body + FOOTER)
    memory = [Memory("in", given.ctypes.data, given.nbytes), Memory("out", out.ctypes.data, out.nbytes)]
    arguments = [given.ctypes.data, out.ctypes.data]
    run(program, (blocks, 1, 1), warps, shared, arguments, memory, schedule)
    return out[:, :4]


def one(body: str, *words: int) -> int:
    """The word that a body leaves in %r100, all lanes having the same words, and agreeing."""
    rows = np.zeros((32, 8), np.uint32)
    rows[:, : len(words)] = np.array([w & 0xFFFFFFFF for w in words], np.uint32)
    found = execute(body, rows)[:, 0]
    assert (found == found[0]).all()
    return int(found[0])


def pair(body: str, *words: int) -> int:
    """The 64 bits that a body leaves in %rd100, as `one`."""
    unpack = "mov.b64 {%r100, %r101}, %rd100;"
    rows = np.zeros((32, 8), np.uint32)
    rows[:, : len(words)] = np.array([w & 0xFFFFFFFF for w in words], np.uint32)
    found = execute(body + unpack, rows)
    return int(found[0, 0]) | int(found[0, 1]) << 32


def bits(value: float) -> int:
    """A float32's word."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value


def floats(words: Sequence[int] | np.ndarray) -> np.ndarray:
    """Words as float32."""
    return np.asarray(words, np.uint32).view(np.float32)
