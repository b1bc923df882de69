"""The imports of a tree of sources, read and not run, and the circles among them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path


def modules_of(sources: Mapping[str, Path]) -> dict[str, Path]:
    """Module names to files. `sources` gives a package's name and folder; links to other folders are left out."""
    found = {}
    for package, root in sources.items():
        for file in sorted(root.rglob("*.py")):
            relative = file.relative_to(root)
            if any((root / parent).is_symlink() for parent in relative.parents if parent.name):
                continue
            parts = relative.with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = file
    return found


def imports_of(file: Path, module: str) -> set[str]:
    """Full names that a file imports: `from a import b` gives `a.b`, which may be a module or a name in one.

    Imports under TYPE_CHECKING and inside functions count as any other; relative ones are resolved.
    """
    names = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*above, *filter(None, [node.module])))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def import_graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """The modules that each module imports, among `modules`; a name inside a module counts as the module."""
    graph = {}
    for module, file in modules.items():
        targets = set()
        for name in imports_of(file, module):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            targets.add(name)
        graph[module] = targets - {"", module}
    return graph


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle, first module repeated at the end; empty where there is none."""
    done: set[str] = set()
    for start in sorted(graph):
        path = _circle_from(graph, start, [], done)
        if path:
            return path
    return []


def _circle_from(graph: Mapping[str, set[str]], module: str, path: list[str], done: set[str]) -> list[str]:
    if module in path:
        return [*path[path.index(module) :], module]
    if module in done:
        return []
    for target in sorted(graph[module]):
        circle = _circle_from(graph, target, [*path, module], done)
        if circle:
            return circle
    done.add(module)
    return []
