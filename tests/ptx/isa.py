"""The instruction set of the PTX machine: which opcodes it knows, and the numbers it shares with its C core."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


# One opcode, one operation of the core, named after it: destinations of one unit (32 bits) or of two.
NARROW = _words("""
    add.s32 sub.s32 mul.lo.s32 mad.lo.s32 neg.s32 abs.s32 mul.hi.u32 mul.hi.s32 min.s32 max.s32 min.u32 max.u32
    min.relu.s32 max.relu.s32
    and.b32 or.b32 xor.b32 not.b32 mov.b32 shl.b32 shr.u32 shr.s32 bfe.u32 bfe.s32 prmt.b32 popc.b32 clz.b32
    and.b16 or.b16 xor.b16 mov.b16 add.s16 shl.b16 shr.u16 cvt.u16.u32 cvt.u32.u16 cvt.s32.s16 cvt.u32.u8 cvt.s32.s8
    cvt.rn.f32.s32 cvt.rn.f32.u32 cvt.rzi.s32.f32 cvt.rn.f32.u64 cvt.rn.f32.s64 popc.b64
    add.rn.f32 sub.rn.f32 mul.rn.f32 div.rn.f32 div.full.f32 neg.f32 abs.f32 copysign.f32 sqrt.rn.f32
    fma.rn.f32 fma.rn.ftz.f32 min.f32 max.f32 rsqrt.approx.ftz.f32 ex2.approx.f32 ex2.approx.ftz.f32 lg2.approx.f32
    cvt.rn.bf16.f32 cvt.rn.f16.f32 cvt.f32.bf16 cvt.f32.f16 cvt.rn.bf16x2.f32 cvt.rn.f16x2.f32
    fma.rn.bf16 mul.rn.bf16 add.rn.bf16 sub.rn.bf16 fma.rn.bf16x2 mul.rn.bf16x2 add.rn.bf16x2
    fma.rn.f16 mul.rn.f16 add.rn.f16 sub.rn.f16 fma.rn.f16x2 mul.rn.f16x2 add.rn.f16x2
""")
WIDE = _words("""
    add.s64 sub.s64 mul.lo.s64 mad.lo.s64 neg.s64 min.s64 max.s64 min.u64 max.u64 and.b64 or.b64 xor.b64 not.b64
    mov.b64 shl.b64 shr.u64 shr.s64 mul.wide.s32 mul.wide.u32 mad.wide.s32 mad.wide.u32 cvt.s64.s32 cvt.u64.u32
    cvt.u64.u16 pack.b64
""")
# The same operation under another name.
ALIASES = {
    "add.u32": "add.s32",
    "sub.u32": "sub.s32",
    "mul.lo.u32": "mul.lo.s32",
    "mad.lo.u32": "mad.lo.s32",
    "add.f32": "add.rn.f32",
    "sub.f32": "sub.rn.f32",
    "mul.f32": "mul.rn.f32",
    "add.u64": "add.s64",
    "sub.u64": "sub.s64",
    "mul.lo.u64": "mul.lo.s64",
    "mov.u32": "mov.b32",
    "mov.s32": "mov.b32",
    "mov.f32": "mov.b32",
    "mov.u64": "mov.b64",
    "mov.s64": "mov.b64",
    "mov.u16": "mov.b16",
    "mov.s16": "mov.b16",
    "add.u16": "add.s16",
    "cvt.u32.u64": "mov.b32",
    "cvt.s32.s64": "mov.b32",
    "cvt.u16.u64": "cvt.u16.u32",
    "cvt.s16.s32": "cvt.u16.u32",
    "cvt.u64.s32": "cvt.s64.s32",
    "cvt.u32.s16": "cvt.s32.s16",
}

# Operations with a handler of their own; the parser knows their operands.
HANDLED = _words("""
    selp setp_s32 setp_u32 setp_s64 setp_u64 setp_f32 setp_u16 setp_s16
    and_pred or_pred xor_pred not_pred mov_pred ld st atom_add atom_max_s atom_max_u atom_exch
    cp_async cp_commit cp_wait param special unpack shfl_bfly shfl_idx shfl_up shfl_down
    redux_add redux_min_s redux_max_s redux_min_u redux_max_u redux_and redux_or redux_xor
    mma ldmatrix stmatrix wgmma wgmma_commit wgmma_wait fence nop bra ret bar
""")

FAULTS = (
    "none", "unknown", "bounds", "shared_bounds", "alignment", "uninitialised", "in_flight", "shared_race",
    "global_race", "lanes", "descriptor", "endless",
)  # fmt: skip
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
SPECIALS = (
    "tid",
    "ntid",
    "laneid",
    "zero",
    "ctaid_x",
    "ctaid_y",
    "ctaid_z",
    "nctaid_x",
    "nctaid_y",
    "nctaid_z",
)

# As in core/machine.h.
CACHE_L2, ACQUIRE, RELEASE, TRANS, SIGNED, BF16, FTZ, SHARED, A_REGS = (1 << bit for bit in range(9))


def _identifier(opcode: str) -> str:
    return opcode.replace(".", "_").upper()


OPERATIONS = {
    name: number
    for number, name in enumerate(
        [_identifier(op) for op in NARROW + WIDE] + ["LAST_ALU"] + [op.upper() for op in HANDLED]
    )
}


def operation(name: str) -> int:
    """Number of an operation, by opcode or by the name of its handler."""
    return OPERATIONS[_identifier(ALIASES.get(name, name))]


def header() -> str:
    """C enums of what this file names."""
    enums = {
        "OP": OPERATIONS,
        "FAULT": {name.upper(): i for i, name in enumerate(FAULTS)},
        "CMP": {name.upper(): i for i, name in enumerate(COMPARISONS)},
        "SPECIAL": {name.upper(): i for i, name in enumerate(SPECIALS)},
    }
    return "".join(
        "enum {" + ", ".join(f"{kind}_{name} = {number}" for name, number in values.items()) + "};\n"
        for kind, values in enums.items()
    )
