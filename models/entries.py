"""Typed access to the entries of a config file; every complaint names the file, the entry, found and expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyramid_rt.errors import WeightsError

# Sizes and counts beyond these fit no tensor's shape, numbers beyond these no float32.
LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Entries:
    """One parsed JSON object; an absent entry and null are the same.

    Attributes:
        values: the object.
        source: what messages call it, e.g. its path.
    """

    values: Mapping[str, Any]
    source: str

    def fail(self, key: str, expected: str) -> WeightsError:
        """The error for an entry that is not what was expected."""
        return WeightsError(f"{self.source}: {key} is {short(self.values.get(key))}, expected {expected}")

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer from 1 to 2^31 - 1."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, "a positive integer")
        if value > LARGEST_SIZE:
            raise self.fail(key, f"at most {LARGEST_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number within float32."""
        value = self.values.get(key)
        value = default if value is None else value
        # Compared before it is converted: an integer of 400 digits fits no float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_NUMBER:
            raise self.fail(key, f"a positive number up to {LARGEST_NUMBER:.3g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; absent is false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return bool(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing. Negative ids mean "none" in some old checkpoints."""
        value = self.values.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            raise self.fail(key, "a token id or a list of them")
        return tuple(item for item in values if item >= 0)


def short(value: object) -> str:
    """A value for a message, in at most 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
