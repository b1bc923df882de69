"""The search of the kernel tuner without a device: what to try, how to compare, what to paste."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from bench.compile_gate.gate import SHARED_LIMIT
from bench.kernel_check.traffic import matrix
from pyramid_rt.kernels.configs import ProjectionConfig
from pyramid_rt.kernels.forward.attention_configs import AttentionConfig, Splits
from pyramid_rt.models.shapes import SHAPES, Shape

AnyConfig = ProjectionConfig | AttentionConfig

# One configuration serves every T, for the splits and steps along K decide the bits. So what counts is the time
# over these T, each relative to the shipped configuration: decoding first, then verifying, then prefill.
WEIGHTS = {1: 4.0, 4: 2.0, 8: 2.0, 16: 2.0, 64: 1.0}
CONTEXT_WEIGHTS = {1024: 3.0, 8192: 2.0, 32768: 1.0}
# Less than this is noise: the shipped configuration stays.
LEAST_GAIN = 0.01

_CHOICES: dict[str, tuple[int, ...]] = {
    "block_n": (64, 128),
    "splits": (1, 2, 4, 8),
    "sub_tiles": (1, 4),
    "num_warps": (4, 8),
    "narrow_stages": (2, 3, 4, 5, 6, 8),
    "wide_stages": (2, 3, 4, 5, 6),
}
_BYTES_K = (128, 256, 512)
_ATTENTION_CHOICES: dict[str, tuple[int, ...]] = {
    "block_n": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "fold_rows": (4, 8, 16, 32),
}
_SPLITS = (
    Splits(),
    Splits((128, 512, 2048), (8192, 32768)),
    Splits((256, 512, 1024), (8192, 32768)),
    Splits((256, 1024, 2048), (16384, 65536)),
    Splits((512, 1024, 2048), (8192, 32768)),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One item of the search: a matrix product at one shape, or attention of one head size.

    Attributes:
        op: as in `gpu_traffic`.
        shapes: that are timed for it.
        contexts: cached rows before the window.
    """

    op: str
    shapes: tuple[Shape, ...]
    contexts: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.op}/{'+'.join(shape.name for shape in self.shapes)}"


def items(ops: Iterable[str], shapes: Iterable[str]) -> list[Item]:
    """All things to tune, largest traffic first.

    Raises:
        ValueError: an op that has no configuration.
    """
    chosen = [shape for shape in SHAPES if shape.name in set(shapes)]
    found = []
    for op in ops:
        if op == "attention":
            for dim in dict.fromkeys(shape.head_dim for shape in chosen):
                same = tuple(shape for shape in chosen if shape.head_dim == dim)
                found.append(Item(op, same, tuple(CONTEXT_WEIGHTS)))
        elif op in ("qkv", "out", "gate_up", "down", "head"):
            found += [Item(op, (shape,), (1024,)) for shape in reversed(chosen)]
        else:
            raise ValueError(f"op is {op!r}, expected qkv, out, gate_up, down, head or attention")
    return found


def shared_bytes(config: ProjectionConfig, itemsize: int) -> int:
    """Least shared memory of a product's pipeline: tiles in flight of weights and of the window.

    The stage that is being multiplied may be counted or not, by version: it is left out, so that nothing that
    would run is refused.
    """
    narrow = (config.block_n + 16) * (config.narrow_stages - 1)
    wide = (config.block_n + 16 * config.sub_tiles) * (config.wide_stages - 1)
    return max(narrow, wide) * config.block_k * itemsize


def attention_shared_bytes(config: AttentionConfig, head_dim: int, itemsize: int) -> int:
    """The same of K and V."""
    return 2 * config.block_n * head_dim * itemsize * (config.num_stages - 1)


def fits(item: Item, config: AnyConfig, *, arch: int, itemsize: int) -> bool:
    """True where a configuration may be worth compiling."""
    limit = SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))
    if isinstance(config, AttentionConfig):
        return attention_shared_bytes(config, item.shapes[0].head_dim, itemsize) <= limit
    if item.op == "head" and config.splits != 1:
        return False
    return shared_bytes(config, itemsize) <= limit


def _changed(config: AnyConfig, **change: Any) -> AnyConfig | None:
    try:
        return replace(config, **change)
    except ValueError:
        return None


def neighbours(op: str, config: AnyConfig, itemsize: int) -> list[AnyConfig]:
    """Configurations that differ in one field by one step of its choices (splits tables: by any)."""
    choices: dict[str, tuple[Any, ...]] = dict(
        _ATTENTION_CHOICES if isinstance(config, AttentionConfig) else _CHOICES
    )
    if isinstance(config, AttentionConfig):
        choices["splits"] = _SPLITS
    else:
        choices["block_k"] = tuple(size // itemsize for size in _BYTES_K)
    found: list[AnyConfig] = []
    for name, values in choices.items():
        now = getattr(config, name)
        if name == "splits" and isinstance(config, AttentionConfig):
            steps = [value for value in values if value != now]
        else:
            below = [value for value in values if value < now]
            above = [value for value in values if value > now]
            steps = below[-1:] + above[:1]
        found += [made for value in steps if (made := _changed(config, **{name: value})) is not None]
    if isinstance(config, ProjectionConfig):
        # Depth and step trade against each other: half the step, twice the stages, and back.
        for block, factor in ((config.block_k // 2, 2), (config.block_k * 2, 0.5)):
            depth = {
                "narrow_stages": max(2, int(config.narrow_stages * factor)),
                "wide_stages": max(2, int(config.wide_stages * factor)),
            }
            if (
                block * itemsize in _BYTES_K
                and (made := _changed(config, block_k=block, **depth)) is not None
            ):
                found.append(made)
    return list(dict.fromkeys(found))


def first_round(op: str, shipped: AnyConfig, itemsize: int) -> list[AnyConfig]:
    """The shipped configuration first, then a coarse grid around it, then its neighbours."""
    grid: list[AnyConfig] = [shipped]
    if isinstance(shipped, ProjectionConfig):
        for block_n, splits, warps in product(_CHOICES["block_n"], _CHOICES["splits"], _CHOICES["num_warps"]):
            made = _changed(shipped, block_n=block_n, splits=splits, num_warps=warps)
            if made is not None:
                grid.append(made)
    else:
        for block_n, warps, stages in product(
            _ATTENTION_CHOICES["block_n"], _ATTENTION_CHOICES["num_warps"], (2, 3, 4)
        ):
            made = _changed(shipped, block_n=block_n, num_warps=warps, num_stages=stages)
            if made is not None:
                grid.append(made)
    return list(dict.fromkeys([*grid, *neighbours(op, shipped, itemsize)]))


# Microseconds by (shape, context, T).
Times = Mapping[tuple[str, int, int], float]


def score(times: Times, shipped: Times) -> float:
    """Weighted mean of the times relative to the shipped configuration's: below 1 is faster.

    Raises:
        ValueError: the two were not timed on the same.
    """
    if times.keys() != shipped.keys() or not times:
        raise ValueError(f"timed on {sorted(times)}, the shipped configuration on {sorted(shipped)}")
    total = weight = 0.0
    for key, value in times.items():
        _, context, length = key
        part = WEIGHTS.get(length, 1.0) * CONTEXT_WEIGHTS.get(context, 1.0)
        total, weight = total + part * value / shipped[key], weight + part
    return total / weight


def choose(scores: Mapping[AnyConfig, float], shipped: AnyConfig) -> AnyConfig:
    """The fastest, or the shipped one if the gain is within the noise."""
    best = min(scores, key=lambda config: scores[config])
    return best if scores[best] < scores[shipped] - LEAST_GAIN else shipped


def literal(config: AnyConfig) -> str:
    """A configuration as source."""
    parts = []
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Splits):
            if value == Splits():
                continue
            value = f"Splits({value.sizes}, {value.edges})"
        parts.append(f"{item.name}={value}")
    return f"{type(config).__name__}({', '.join(parts)})"


def entry(item: Item, config: AnyConfig, arch: int, dtype: str) -> str:
    """A line of `TUNED` in kernels/configs.py or kernels/forward/attention_configs.py."""
    if isinstance(config, AttentionConfig):
        return f"    ({arch}, {item.shapes[0].head_dim}, torch.{dtype}): {literal(config)},"
    rows, width = matrix(item.op, item.shapes[0])
    kind = "project" if item.op in ("out", "down") else item.op
    return f'    ("{kind}", {arch}, {rows}, {width}, torch.{dtype}): {literal(config)},'


def as_json(config: AnyConfig) -> dict[str, Any]:
    """For the result file."""
    return {
        item.name: (
            {"sizes": list(value.sizes), "edges": list(value.edges)}
            if isinstance(value := getattr(config, item.name), Splits)
            else value
        )
        for item in fields(config)
    }


def as_sizes(config: AnyConfig) -> dict[str, int]:
    """For the sizes of a `problems.base.Case`, which are numbers."""
    found: dict[str, int] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Splits):
            found |= {f"size{i}": size for i, size in enumerate(value.sizes)}
            found |= {f"edge{i}": edge for i, edge in enumerate(value.edges)}
        else:
            found[item.name] = value
    return found
