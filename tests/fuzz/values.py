"""Values of every kind that somebody may give where a number, a flag, a text or a list is expected."""

from __future__ import annotations

import decimal
import enum
import fractions
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

# JSON texts that a parser of Python's takes, and some that it does not.
JSON_LITERALS = (
    "null", "true", "false", "0", "-1", "1", "2", "3", "64", "1e400", "-1e400", "NaN", "Infinity", "1e-300", "0.5",
    "1.0", "9" * 30, "9" * 400, "9" * 5000, '""', '"x"', '"\\u0000"', '"\\ud800"', '"' + "y" * 5000 + '"', "[]",
    "{}", "[null]", "[[0]]", '{"a": 1}', "[1, 2, 3]", '["a", "b"]', "[" * 100_000, '{"a":' * 100_000, "\x00", "",
    "2147483648", "9223372036854775808", "-9223372036854775809", "4294967296", '"9"', '"true"', '"/dev/zero"',
    '"../.."', '"' + "a/" * 2000 + '"',
)  # fmt: skip


class Words(str, enum.Enum):  # noqa: UP042 (its str() is not its value, which is the point)
    SD = "sd"
    MATCH = "match"
    OTHER = "other"


class Numbers(enum.IntEnum):
    ONE = 1
    THREE = 3


_MADE: tuple[Callable[[random.Random], Any], ...] = (
    lambda r: r.choice((None, True, False, ..., NotImplemented, object(), print, int, type)),
    lambda r: r.choice((0, -0, 1, 2, 3, 5, 63, 64, 65, 100, 257, 10**6)),
    lambda r: r.choice((1, -1)) * (2 ** r.choice((8, 15, 16, 31, 32, 53, 63, 64, 128, 1024)) - r.choice((0, 1))),
    lambda r: r.choice((10**400, -(10**400), 10**5000)),
    lambda r: r.choice((0.0, -0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 1e-3, 1e-9, 1e-38, 1e-45, 5e-324, 1e38, 1e39, 1e308)),
    lambda r: r.choice((math.nan, math.inf, -math.inf, -1.0, 1 + 1j)),
    lambda r: r.choice((decimal.Decimal("0.5"), decimal.Decimal("sNaN"), decimal.Decimal("1e999"))),
    lambda r: r.choice((fractions.Fraction(1, 3), fractions.Fraction(7))),
    lambda r: r.choice((np.int8(3), np.int64(5), np.uint64(2**63), np.float16(0.5), np.float32(np.nan))),
    lambda r: r.choice((np.float64(2.0), np.str_("sd"), np.bytes_(b"sd"), np.complex64(1), np.bool_(1))),
    lambda r: r.choice((torch.tensor(3), torch.tensor(0.5), torch.tensor(True), torch.tensor(float("inf")))),
    lambda r: r.choice((torch.tensor([3]), torch.tensor([[1, 2]]), torch.empty(0), torch.tensor(1j))),
    lambda r: r.choice((torch.empty((), device="meta"), torch.empty((3,), device="meta"), torch.tensor([1.5, 2.0]))),
    lambda r: r.choice((np.array([1, 2, 3]), np.array(4), np.array([]), np.array([[1]]), np.array(["sd", "psd"]))),
    lambda r: r.choice((np.array([1, None], dtype=object), np.ma.masked_array([1, 2], [False, True]))),
    lambda r: r.choice(("", "0", "1", "sd", "psd", "ar", "js", "match", "raw", "yes", "cpu", "\x00", "\ud800")),
    lambda r: r.choice(("é", "x" * 10_000, "\n", "{}", "[bold]", "%s", "--", "float32", "torch", "host", "round")),
    lambda r: r.choice((b"", b"sd", bytearray(b"1"), memoryview(b"12"))),
    lambda r: r.choice(([], [1], [1, 2], ["a"], ["a", "b"], [""], [None], [[1]], [0.5], [True], ["a", 1], [10**30])),
    lambda r: r.choice(((), (1, 2), ("a",), {1, 2}, frozenset(), {"a": 1}, {}, range(3), range(0))),
    lambda r: r.choice((Words.SD, Words.MATCH, Words.OTHER, Numbers.ONE, Numbers.THREE)),
    lambda r: (x for x in (1, 2)),
    lambda r: r.choice((Path("."), Path("/dev/null"), Path("x" * 300), torch.float32, torch.device("cpu"))),
)  # fmt: skip


def value(dice: random.Random) -> Any:
    """Any value."""
    return dice.choice(_MADE)(dice)


def shown(values: Any) -> str:
    """A value, or a mapping of them, for a report."""
    if isinstance(values, Mapping):
        return ", ".join(f"{name}={shown(one)}" for name, one in values.items())
    if isinstance(values, int) and values.bit_length() > 1000:
        return f"{'-' if values < 0 else ''}<{values.bit_length()} bits>"
    try:
        text = f"{type(values).__name__}:{values!r}".replace("\n", " ")
    except ValueError:  # a list that holds such a number
        text = f"{type(values).__name__} of something huge"
    return text if len(text) < 90 else text[:87] + "..."
