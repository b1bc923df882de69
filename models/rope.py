"""The rope entry of a config.json, in its old and new spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from pyramid_rt.errors import UnsupportedModelError, WeightsError
from pyramid_rt.models.config import RopeConfig, RopeKind
from pyramid_rt.models.entries import Entries, short

_OWN_ENTRIES: dict[str, frozenset[str]] = {
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
}
_COMMON_ENTRIES = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings"})


def read_rope(entries: Entries, max_positions: int) -> RopeConfig:
    """The rope of a config whose context is `max_positions`.

    Raises:
        UnsupportedModelError: a type that is not computed here, or an entry that would change the computation.
        WeightsError: an entry is missing, mistyped or contradicts another.
    """
    name, values = _rope_entry(entries)
    kind = _kind(values)
    if kind not in get_args(RopeKind):
        known = ", ".join(get_args(RopeKind))
        raise UnsupportedModelError(
            f"{entries.source}: rope type {short(kind)} in {name}, expected one of {known}"
        )
    kind = cast(RopeKind, kind)
    unknown = {key: value for key, value in values.items() if _changes(kind, key, value)}
    if unknown:
        raise UnsupportedModelError(f"{entries.source}: {name} of type {kind} has {short(unknown)}")
    rope = Entries(values, f"{entries.source}: {name}")
    scaled, llama3 = kind != "default", kind == "llama3"
    original = rope.positive("original_max_position_embeddings", max_positions) if scaled else max_positions
    if kind == "dynamic" and original != max_positions:
        raise UnsupportedModelError(
            f"{entries.source}: {name} of type dynamic has original_max_position_embeddings {original}, "
            f"but max_position_embeddings is {max_positions}; expected them equal"
        )
    return RopeConfig(
        kind=kind,
        theta=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        factor=rope.number("factor") if scaled else 1.0,
        low_freq_factor=rope.number("low_freq_factor") if llama3 else 1.0,
        high_freq_factor=rope.number("high_freq_factor") if llama3 else 1.0,
        original_max_position_embeddings=original,
    )


def _rope_entry(entries: Entries) -> tuple[str, Mapping[str, Any]]:
    """Name and content of the rope entry: rope_parameters (new), rope_scaling (old) or nothing."""
    found = {
        key: entries.values[key] for key in ("rope_parameters", "rope_scaling") if entries.values.get(key)
    }
    for key, value in found.items():
        if not isinstance(value, Mapping):
            raise entries.fail(key, "an object")
    if len(found) == 2 and _kind(found["rope_parameters"]) != _kind(found["rope_scaling"]):
        raise WeightsError(f"{entries.source}: rope_parameters and rope_scaling name different rope types")
    return next(iter(found.items()), ("rope_parameters", {}))


def _kind(values: Mapping[str, Any]) -> object:
    # "type" is the oldest spelling; where both stand, transformers reads rope_type.
    return values.get("rope_type") or values.get("type") or "default"


def _changes(kind: RopeKind, key: str, value: object) -> bool:
    """True where an entry that is not read here would change the computation."""
    if value is None or key in _COMMON_ENTRIES:
        return False
    if key == "partial_rotary_factor":  # 1.0 is written out by some exporters and means nothing
        return value != 1
    if kind == "default":
        # Numbers of other types, left behind when scaling was switched off; an object is rope by kind of layer.
        return isinstance(value, Mapping | list)
    return key not in _OWN_ENTRIES[kind]
