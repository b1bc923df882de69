"""Checks of arguments in kind and range: one function a kind, each gives the plain value or an InputError.

A value counts by what it equals: a number or flag of numpy or of a 0-d tensor, an enum whose members are strings
or integers. What merely converts does not: `True` is no number, `"no"` no flag, bytes no text.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from pyramid_rt.errors import InputError

T = TypeVar("T")

INT64_MAX = 2**63 - 1
FLOAT32_MAX = (2 - 2**-23) * 2.0**127

_LONGEST_SHOWN = 80


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer in low..high (both included, None: no bound). A float is none, however round."""
    plain = _plain(value)
    try:
        number = None if isinstance(plain, bool) else int(operator.index(plain))
    except Exception:  # a caller's own type may raise anything
        number = None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        if low is not None and high is not None:
            expected = f" in {low}..{high}"
        else:
            expected = f" >= {low}" if low is not None else f" <= {high}" if high is not None else ""
        raise InputError(f"{name} must be an integer{expected}, found {shown(value)}")
    return number


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> float:
    """A real number, as a float.

    Args:
        name: what the message calls it.
        value: what was given.
        low, high: bounds that are themselves allowed.
        above, below: bounds that are not, in their place.
        infinite: infinities inside the bounds are allowed; NaN never is.
    """
    plain = _plain(value)
    result = math.nan
    if isinstance(plain, Real | Decimal) and not isinstance(plain, bool):
        try:
            result = float(plain)
        except (OverflowError, ValueError):  # 10**400; a signalling NaN
            result = math.nan
    inside = low <= result <= high and (above is None or result > above) and (below is None or result < below)
    if not inside or (math.isinf(result) and not infinite):
        raise InputError(
            f"{name} must be a number{_interval(low, high, above, below, infinite)}, found {shown(value)}"
        )
    return result


def flag(name: str, value: Any) -> bool:
    """True or False; no other number, no text."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise InputError(f"{name} must be True or False, found {shown(value)}")
    return plain


def text(name: str, value: Any, expected: str = "a string") -> str:
    """A string, of an enum whose members are strings too; no bytes."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be {expected}, found {shown(value)}")
    # Not str(value): that is the name of an enum's member.
    return str.__str__(value)


def unicode_text(where: str, value: str) -> str:
    """A string of characters; InputError, beginning with `where`, for one that holds a lone surrogate."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is {value[error.start]!r}, a lone surrogate and no text"
        ) from error
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of several strings."""
    choices = tuple(choices)
    if not isinstance(value, str) or str.__str__(value) not in choices:
        raise InputError(f"unknown {name} {shown(value)}; expected one of {', '.join(choices)}")
    return str.__str__(value)


def path(name: str, value: Any) -> Path:
    """A path that the system could hold: a string or a path object without NUL, in the system's encoding.

    Whether it is too long, or there at all, shows when it is used.
    """
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not given:
        raise InputError(f"{name} must be a path, a string or a pathlib.Path, found {shown(value)}")
    if "\0" in given:
        raise InputError(f"{name} must be a path, and none has a NUL in it: {shown(value)}")
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise InputError(
            f"{name} must be a path, and this one cannot be written in the system's encoding: {shown(value)}"
        ) from None
    return Path(str.__str__(given))


def sequence(name: str, value: Any, of: str) -> list[Any]:
    """The items of an ordered collection, unchecked; `of` says in the plural what was expected.

    Lists, tuples, ranges, arrays and tensors of one dimension; not a string, bytes, a set or a mapping.
    """
    if getattr(value, "ndim", 1) == 1 and not isinstance(
        value, str | bytes | bytearray | memoryview | Mapping | Set
    ):
        # Looked for in the classes themselves: those of an enum's member have a metaclass with a length.
        methods = {name for base in type(value).__mro__ for name in vars(base)}
        try:
            if "tolist" in methods:
                return list(value.tolist())
            if {"__len__", "__getitem__"} <= methods:
                return list(value)
        except Exception:
            pass
    raise InputError(f"{name} must be a list of {of}, found {shown(value)}")


def instance(name: str, value: Any, kind: type[T], expected: str) -> T:
    """An object of a class; `expected` describes it."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {expected}, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value for a message: its repr in at most 80 characters, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 512:
        # repr of a very long integer takes long, or is refused by Python.
        return f"an integer of {value.bit_length()} bits"
    try:
        short = _SHORT.repr(value).replace("\n", " ")
    except Exception:  # the repr of a foreign object may raise anything
        short = f"an object of {type(value).__name__}"
    return short if len(short) <= _LONGEST_SHOWN else short[: _LONGEST_SHOWN - 3] + "..."


def _short_repr() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _LONGEST_SHOWN
    return short


_SHORT = _short_repr()


def _plain(value: Any) -> Any:
    """The Python number in a scalar of numpy or a 0-d tensor, None for larger ones; anything else as it is."""
    if not (hasattr(value, "shape") and hasattr(value, "item")):
        return value
    try:
        return value.item() if tuple(value.shape) == () else None
    except Exception:  # a tensor without data
        return None


def _interval(low: float, high: float, above: float | None, below: float | None, infinite: bool) -> str:
    """Bounds in words: `in (0, 1]`, `finite and >= 0`."""
    least = above if above is not None else low if low > -math.inf else None
    most = below if below is not None else high if high < math.inf else None
    if least is not None and most is not None:
        return (
            f" in {'(' if above is not None else '['}{least:g}, {most:g}{')' if below is not None else ']'}"
        )
    signs = (
        (least, ">" if above is not None else ">="),
        (most, "<" if below is not None else "<="),
    )
    bound = next((f" {sign} {limit:g}" for limit, sign in signs if limit is not None), "")
    if infinite:
        return bound
    return f" finite and{bound}" if bound else ", and finite"
