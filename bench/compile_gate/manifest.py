"""The committed figures of every kernel's machine code: one line a binary, and what differs from them.

{"fields": [...], version of Triton: {architecture: {kernel: figures}}}, where a kernel is `op/dtype/variant` and,
after an @, the shapes that this one binary serves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.compile_gate.gate import Figures

PATH = Path(__file__).parent.parent / "results" / "kernels_manifest.json"
FIELDS = [field.name for field in fields(Figures)]


@dataclass(frozen=True, slots=True, order=True)
class Kernel:
    """A kernel's key: its op, and the model that it was compiled for.

    Attributes:
        op, dtype, variant: as in `bench.compile_gate`.
        shape: of the model.
    """

    op: str
    dtype: str
    variant: str
    shape: str

    def __str__(self) -> str:
        return f"{self.op}/{self.dtype}/{self.variant}@{self.shape}"


# Per version and architecture.
Manifest = dict[str, dict[str, dict[Kernel, Figures]]]


def load(path: Path = PATH) -> Manifest:
    """The committed figures, one entry for every shape.

    Raises:
        ValueError: the file's fields are not those of `Figures`.
    """
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.pop("fields") != FIELDS:
        raise ValueError(f"{path} has other fields than {FIELDS}: write it anew with --update")
    return {
        version: {arch: _unfold(kernels) for arch, kernels in architectures.items()}
        for version, architectures in stored.items()
    }


def save(manifest: Manifest, path: Path = PATH) -> None:
    """Write it, one line for every binary, in a fixed order."""
    versions = []
    for version in sorted(manifest):
        parts = []
        for arch in sorted(manifest[version], key=lambda name: int(name.removeprefix("sm_"))):
            lines = ",\n".join(
                f"  {json.dumps(name)}: {json.dumps(values, separators=(',', ':'))}"
                for name, values in _fold(manifest[version][arch])
            )
            parts.append(f' "{arch}": {{\n{lines}\n }}')
        versions.append(f'"{version}": {{\n' + ",\n".join(parts) + "\n}")
    body = ",\n".join([f'"fields": {json.dumps(FIELDS)}', *versions])
    path.write_text(f"{{\n{body}\n}}\n", encoding="utf-8")


def _fold(kernels: dict[Kernel, Figures]) -> Iterable[tuple[str, list[object]]]:
    served: dict[tuple[str, Figures], list[str]] = {}
    for kernel in sorted(kernels):
        name = f"{kernel.op}/{kernel.dtype}/{kernel.variant}"
        served.setdefault((name, kernels[kernel]), []).append(kernel.shape)
    for (name, figures), shapes in served.items():
        yield f"{name}@{'+'.join(shapes)}", list(asdict(figures).values())


def _unfold(stored: dict[str, list[object]]) -> dict[Kernel, Figures]:
    found = {}
    for name, values in stored.items():
        kernel, _, shapes = name.partition("@")
        op, dtype, variant = kernel.split("/")
        figures = Figures(**dict(zip(FIELDS, values, strict=True)))  # type: ignore[arg-type]
        found.update({Kernel(op, dtype, variant, shape): figures for shape in shapes.split("+")})
    return found


def compare(kept: dict[Kernel, Figures], found: dict[Kernel, Figures], *, whole: bool) -> list[str]:
    """Differences from figures of the manifest.

    Args:
        kept: the manifest's, of what `found` may hold.
        found: what was compiled.
        whole: nothing was filtered out, so that kernels only in the manifest are differences too.
    """
    lines = []
    for kernel in sorted(found.keys() | kept.keys()):
        if kernel not in kept:
            lines.append(f"{kernel}: not in the manifest")
        elif kernel not in found:
            if whole:
                lines.append(f"{kernel}: in the manifest, not compiled")
        else:
            old, new = asdict(kept[kernel]), asdict(found[kernel])
            changed = [f for f in FIELDS if old[f] != new[f]]
            if changed:
                lines.append(f"{kernel}: " + ", ".join(f"{f} {old[f]} -> {new[f]}" for f in changed))
    return lines
