"""PTX text to instructions of the machine: fixed-size records, registers as units of 32 lanes by 32 bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx import isa

INSTRUCTION = np.dtype(
    [
        ("op", "u2"),
        ("size", "u1"),
        ("vec", "u1"),
        ("guard", "i4"),
        ("d", "i4"),
        ("a", "i4"),
        ("b", "i4"),
        ("c", "i4"),
        ("list", "i4"),
        ("flags", "u2"),
        ("wide", "u2"),
        ("imm", "i8"),
    ],
    align=True,
)
SHARED_BASE = 1024
SPECIALS = {
    "%tid.x": "tid",
    "%ntid.x": "ntid",
    "%laneid": "laneid",
    **{f"%{prefix}ctaid.{axis}": f"{prefix}ctaid_{axis}" for prefix in ("", "n") for axis in "xyz"},
    **dict.fromkeys(("%tid.y", "%tid.z"), "zero"),
}
_STATEMENT = re.compile(r"\s*(?:(?P<label>[$\w]+):|(?P<brace>[{}])|(?P<body>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_REGISTER = re.compile(r"%(?:rd|rs|r|fd|f)\d+")
_DEBUG = re.compile(r"^[ \t]*\.(?:loc|file)\s.*$|//.*$", re.MULTILINE)


class UnknownInstruction(ValueError):
    """An instruction or an operand that the machine does not know; the message has its text."""


@dataclass
class Program:
    """A kernel's instructions.

    Attributes:
        name: of the entry.
        code: [n] records of `INSTRUCTION`.
        lists: operands of instructions with many.
        constants: [units] values of the units that hold immediates.
        units, predicates: registers of a warp.
        parameters: (offset, bytes) of each, in order.
        text: each instruction as PTX has it.
    """

    name: str
    code: np.ndarray
    lists: np.ndarray
    constants: np.ndarray
    units: int
    predicates: int
    parameters: list[tuple[int, int]]
    text: list[str]


@dataclass
class _Parser:
    parameters: dict[str, tuple[int, int]]
    labels: dict[str, int]
    symbols: dict[str, int]
    registers: dict[str, int]
    # Immediates take the units after the registers.
    first_constant: int
    rows: list[dict[str, int]] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)
    # Predicate 0 is true.
    predicates: dict[str, int] = field(default_factory=lambda: {"true": 0})

    # --- operands ---

    def unit(self, operand: str) -> int:
        """The first unit of a register or an immediate; -1 for a result that nobody wants."""
        if operand == "_":
            return -1
        if operand.startswith("%"):
            if operand not in self.registers:
                raise UnknownInstruction(f"register {operand}")
            return self.registers[operand]
        value = self.number(operand) & (1 << 64) - 1
        if value not in self.known:
            self.known[value] = self.first_constant + len(self.constants)
            self.constants += [value & 0xFFFFFFFF, value >> 32]
        return self.known[value]

    def number(self, operand: str) -> int:
        if operand in self.symbols:
            return self.symbols[operand]
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            return int(match[1] or match[2], 16)
        try:
            return int(operand.removesuffix("U"), 0)
        except ValueError:
            raise UnknownInstruction(f"operand {operand}") from None

    def predicate(self, operand: str) -> int:
        if not operand.startswith("%p"):
            raise UnknownInstruction(f"predicate {operand}")
        return self.predicates.setdefault(operand, len(self.predicates))

    def units_of(self, operand: str) -> list[int]:
        """Of `{a, b}` or of a lone register."""
        return [self.unit(x) for x in operand.strip("{} ").replace(",", " ").split()]

    def keep(self, *units: int) -> int:
        """Its place in the lists."""
        self.lists += units
        return len(self.lists) - len(units)

    def address(self, operand: str) -> dict[str, int]:
        """Unit and offset of `[register + offset]`."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return {"a": self.unit(base), "imm": int(offset or "0", 0)}

    # --- statements ---

    def statement(self, text: str) -> None:
        """Append one instruction."""
        guard = 0
        rest = text
        if match := re.match(r"@(!?)(%p\d+)\s+", rest):
            guard = (self.predicate(match[2]) + 1) * (-1 if match[1] else 1)
            rest = rest[match.end() :]
        opcode, _, tail = rest.partition(" ")
        operands = [x.strip() for x in _OPERAND.findall(tail)]
        row = self.instruction(opcode, operands)
        self.rows.append(
            {"d": -1, "a": 0, "b": 0, "c": 0, "list": 0, "flags": 0, "wide": 0, "imm": 0, "size": 4, "vec": 1}
            | row
            | {"guard": guard}
        )

    def instruction(self, opcode: str, operands: list[str]) -> dict[str, int]:
        parts = opcode.split(".")
        special: Callable[[list[str], list[str]], dict[str, int] | None] | None = getattr(
            self, "_" + parts[0], None
        )
        if special is not None and (row := special(parts, operands)) is not None:
            return row
        known = isa.ALIASES.get(opcode, opcode)
        if known not in isa.NARROW and known not in isa.WIDE:
            raise UnknownInstruction(opcode)
        for operand in operands[1:]:
            if operand.startswith("{") or operand.startswith("%p"):
                raise UnknownInstruction(f"{opcode} {', '.join(operands)}")
        if len(operands) not in (2, 3, 4):
            raise UnknownInstruction(f"{opcode} with {len(operands)} operands")
        sources = dict(zip("abc", (self.unit(x) for x in operands[1:]), strict=False))
        return {
            "op": isa.operation(known),
            "d": self.unit(operands[0]),
            "wide": int(known in isa.WIDE),
        } | sources

    def _mov(self, parts: list[str], operands: list[str]) -> dict[str, int] | None:
        to, source = operands
        if parts[1] == "pred":
            if source.startswith("%"):
                return {"op": isa.operation("mov_pred"), "d": self.predicate(to), "a": self.predicate(source)}
            # From an immediate: a comparison of constants.
            d, a, b = self.predicate(to), self.unit("0"), self.unit("1" if int(source) else "0")
            return {
                "op": isa.operation("setp_s32"),
                "d": d,
                "a": a,
                "b": b,
                "vec": isa.COMPARISONS.index("ne"),
            }
        if source in SPECIALS:
            imm = isa.SPECIALS.index(SPECIALS[source])
            return {"op": isa.operation("special"), "d": self.unit(to), "imm": imm}
        if to.startswith("{"):
            units = self.units_of(to)
            size = {"b64": 8, "b32": 4}.get(parts[1], 0)
            if len(units) != 2 or not size:
                raise UnknownInstruction(f"{'.'.join(parts)} {to}")
            return {
                "op": isa.operation("unpack"),
                "a": self.unit(source),
                "list": self.keep(*units),
                "size": size,
            }
        if source.startswith("{"):
            low, high = self.units_of(source)
            if parts[1] == "b64":
                return {"op": isa.operation("pack.b64"), "d": self.unit(to), "a": low, "b": high, "wide": 1}
            # Two halves: bytes 0 and 1 of each.
            selector = self.unit(str(0x5410))
            return {"op": isa.operation("prmt.b32"), "d": self.unit(to), "a": low, "b": high, "c": selector}
        return None

    def _logic(self, parts: list[str], operands: list[str]) -> dict[str, int] | None:
        if parts[1] != "pred":
            return None
        return {"op": isa.operation(f"{parts[0]}_pred"), "d": self.predicate(operands[0])} | dict(
            zip("ab", map(self.predicate, operands[1:]), strict=False)
        )

    _and = _or = _xor = _not = _logic

    def _setp(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        if len(parts) != 3 or parts[1] not in isa.COMPARISONS or len(operands) != 3:
            raise UnknownInstruction(f"{'.'.join(parts)} {', '.join(operands)}")
        kind = {"b16": "u16", "b32": "u32", "b64": "u64"}.get(parts[2], parts[2])
        if kind not in ("s16", "u16", "s32", "u32", "s64", "u64", "f32"):
            raise UnknownInstruction(".".join(parts))
        d, a, b = self.predicate(operands[0]), *(self.unit(x) for x in operands[1:])
        return {
            "op": isa.operation(f"setp_{kind}"),
            "d": d,
            "a": a,
            "b": b,
            "vec": isa.COMPARISONS.index(parts[1]),
        }

    def _selp(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        d, a, b = (self.unit(x) for x in operands[:3])
        wide = int(parts[1] in ("b64", "s64", "u64", "f64"))
        return {
            "op": isa.operation("selp"),
            "d": d,
            "a": a,
            "b": b,
            "c": self.predicate(operands[3]),
            "wide": wide,
        }

    def _access(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        name, where, *more, kind = parts
        if name == "ld" and where == "param":
            offset, _ = self.parameters[operands[1].strip("[]")]
            wide = int(operands[0].startswith("%rd"))
            flags = isa.SIGNED if kind[0] == "s" else 0
            size = int(kind[1:]) // 8
            return {
                "op": isa.operation("param"),
                "d": self.unit(operands[0]),
                "imm": offset,
                "size": size,
            } | {
                "wide": wide,
                "flags": flags,
            }
        vec = next((int(x[1]) for x in more if x in ("v2", "v4")), 1)
        unknown = set(more) - {"v2", "v4", "cg", "ca"}
        if where not in ("global", "shared", "shared::cta") or unknown:
            raise UnknownInstruction(".".join(parts))
        data, at = (operands[0], operands[1]) if name == "ld" else (operands[1], operands[0])
        units = self.units_of(data)
        if len(units) != vec or (where != "global" and more[:1] in (["cg"], ["ca"])):
            raise UnknownInstruction(f"{'.'.join(parts)} {', '.join(operands)}")
        flags = (isa.SHARED if where != "global" else 0) | (isa.CACHE_L2 if "cg" in more else 0)
        flags |= isa.SIGNED if kind[0] == "s" else 0
        return self.address(at) | {
            "op": isa.operation(name),
            "list": self.keep(*units),
            "vec": vec,
            "size": int(kind[1:]) // 8,
            "flags": flags,
            "wide": int(name == "ld" and "%rd" in data),
        }

    _ld = _st = _access

    def _atom(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        # atom.global.gpu.acq_rel.add.u32
        if len(parts) != 6 or parts[1:3] != ["global", "gpu"] or parts[5] not in ("u32", "s32", "b32"):
            raise UnknownInstruction(".".join(parts))
        orders = {
            "acq_rel": isa.ACQUIRE | isa.RELEASE,
            "acquire": isa.ACQUIRE,
            "release": isa.RELEASE,
            "relaxed": 0,
        }
        names = {"add": "atom_add", "exch": "atom_exch", "max": f"atom_max_{parts[5][0]}"}
        if parts[3] not in orders or parts[4] not in names:
            raise UnknownInstruction(".".join(parts))
        row = {"op": isa.operation(names[parts[4]]), "d": self.unit(operands[0]), "flags": orders[parts[3]]}
        return row | {"b": self.unit(operands[2])} | self.address(operands[1])

    def _cp(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        opcode = ".".join(parts)
        if opcode == "cp.async.commit_group":
            return {"op": isa.operation("cp_commit")}
        if opcode in ("cp.async.wait_group", "cp.async.wait_all"):
            return {"op": isa.operation("cp_wait"), "imm": int(operands[0]) if operands else 0}
        if opcode not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
            raise UnknownInstruction(opcode)
        source = self.address(operands[1])
        size = operands[3] if len(operands) > 3 else operands[2]
        return self.address(operands[0]) | {
            "op": isa.operation("cp_async"),
            "b": source["a"],
            "list": self.keep(source["imm"]),
            "c": self.unit(size),
            "size": int(operands[2], 0),
            "flags": isa.SHARED,
        }

    def _shfl(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        if parts[1] != "sync" or parts[3] != "b32" or "|" in operands[0]:
            raise UnknownInstruction(f"{'.'.join(parts)} {operands[0]}")
        d, a, b, c, mask = (self.unit(x) for x in operands)
        return {
            "op": isa.operation(f"shfl_{parts[2]}"),
            "d": d,
            "a": a,
            "b": b,
            "c": c,
            "list": self.keep(mask),
        }

    def _redux(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        name = parts[2] if parts[2] in ("add", "and", "or", "xor") else f"{parts[2]}_{parts[3][0]}"
        d, a, b = (self.unit(x) for x in operands)
        return {"op": isa.operation(f"redux_{name}"), "d": d, "a": a, "b": b}

    def _bar(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        if parts == ["bar", "warp", "sync"]:
            return {"op": isa.operation("nop")}
        if parts != ["bar", "sync"] or operands != ["0"]:
            raise UnknownInstruction(f"{'.'.join(parts)} {', '.join(operands)}")
        return {"op": isa.operation("bar")}

    def _bra(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        return {"op": isa.operation("bra"), "imm": self.labels[operands[0]]}

    def _ret(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        return {"op": isa.operation("ret")}

    def _fence(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        if parts[1] == "proxy":
            return {"op": isa.operation("nop")}
        return {"op": isa.operation("fence")}

    _membar = _fence

    def _mma(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        kind = parts[7] if len(parts) > 7 else ""
        if ".".join(parts) != f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" or kind not in (
            "f16",
            "bf16",
        ):
            raise UnknownInstruction(".".join(parts))
        units = [u for operand in operands for u in self.units_of(operand)]
        return {
            "op": isa.operation("mma"),
            "list": self.keep(*units),
            "flags": isa.BF16 if kind == "bf16" else 0,
        }

    def _matrix(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        plain = [x for x in parts if x not in ("trans", "x1", "x2", "x4")]
        if plain[1:] != ["sync", "aligned", "m8n8", "shared", "b16"]:
            raise UnknownInstruction(".".join(parts))
        at, data = (operands[1], operands[0]) if parts[0] == "ldmatrix" else (operands[0], operands[1])
        units = self.units_of(data)
        flags = isa.SHARED | (isa.TRANS if "trans" in parts else 0)
        row = {"op": isa.operation(parts[0]), "list": self.keep(*units), "vec": len(units), "flags": flags}
        return row | self.address(at)

    _ldmatrix = _stmatrix = _matrix

    def _wgmma(self, parts: list[str], operands: list[str]) -> dict[str, int]:
        if parts[1] == "fence":
            return {"op": isa.operation("nop")}
        if parts[1] == "commit_group":
            return {"op": isa.operation("wgmma_commit")}
        if parts[1] == "wait_group":
            return {"op": isa.operation("wgmma_wait"), "imm": int(operands[0])}
        match = re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2", ".".join(parts)
        )
        if not match:
            raise UnknownInstruction(".".join(parts))
        results, a, b, scale, scale_a, scale_b, *transposed = operands
        in_registers = a.startswith("{")
        units = self.units_of(results) + (self.units_of(a) if in_registers else [])
        if (scale_a, scale_b) != ("1", "1") or (not in_registers and transposed[0] != "0"):
            raise UnknownInstruction(f"{'.'.join(parts)} ..., {', '.join(operands[3:])}")
        flags = (isa.BF16 if match[2] == "bf16" else 0) | (isa.TRANS if transposed[-1] == "1" else 0)
        predicated = scale.startswith("%p")
        return {
            "op": isa.operation("wgmma"),
            "list": self.keep(*units),
            "vec": int(match[1]),
            "a": 0 if in_registers else self.unit(a),
            "b": self.unit(b),
            "c": self.predicate(scale) if predicated else -1,
            "imm": 0 if predicated else int(scale),
            "flags": flags | (isa.A_REGS if in_registers else 0),
        }


def parse(ptx: str) -> Program:
    """The one kernel of a PTX text.

    Raises:
        UnknownInstruction: names the instruction that the machine does not know.
    """
    ptx = _DEBUG.sub("", ptx)
    entry = re.search(r"\.entry\s+([$\w]+)\s*\((.*?)\)([^{]*)\{(.*)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("no .entry in the PTX")
    name, parameters, _, body = entry.groups()
    statements, labels = _statements(body)
    registers = sorted(set(_REGISTER.findall(" ".join(statements))))
    units = {}
    count = 2  # the first two are the constant 0
    for register in registers:
        units[register] = count
        count += 2 if register.startswith(("%rd", "%fd")) else 1
    parser = _Parser(_parameters(parameters), labels, {"global_smem": SHARED_BASE}, units, count)
    for statement in statements:
        try:
            parser.statement(statement)
        except UnknownInstruction as error:
            raise UnknownInstruction(f"{name}: the machine does not know {error} in `{statement};`") from None
    code = np.zeros(len(parser.rows), INSTRUCTION)
    for column in INSTRUCTION.names or ():
        code[column] = [row[column] for row in parser.rows]
    return Program(
        name,
        code,
        np.array(parser.lists or [0], np.int32),
        np.array(parser.constants, np.uint32),
        count + len(parser.constants),
        len(parser.predicates),
        list(parser.parameters.values()),
        statements,
    )


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    """Offset and bytes of each, laid out as a launch passes them."""
    found, offset = {}, 0
    for kind, name in re.findall(r"\.param\s+\.([a-z]\d+)[^,]*?([$\w]+)\s*(?:,|$)", text):
        size = int(kind[1:]) // 8
        offset = -(-offset // size) * size
        found[name] = offset, size
        offset += size
    return found


def _statements(body: str) -> tuple[list[str], dict[str, int]]:
    """Instructions up to the end of the function, and the place of each label."""
    statements: list[str] = []
    labels: dict[str, int] = {}
    depth, at = 0, 0
    while match := _STATEMENT.match(body, at):
        at = match.end()
        if match["brace"]:
            depth += 1 if match["brace"] == "{" else -1
            if depth < 0:
                break
        elif match["label"]:
            labels[match["label"]] = len(statements)
        else:
            statement = " ".join(match["body"].split())
            if not statement.startswith((".reg", ".pragma")):
                statements.append(statement)
    return statements, labels
