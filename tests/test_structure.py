"""The structure of the tree: no circle of imports, one direction between its rooms, rooms of a readable size."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.imports import circle_in, import_graph, imports_of, modules_of

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "pyramid_rt": ROOT / "pyramid_rt",
    "pyramid_rt.kernels": ROOT / "kernels",
    "pyramid_rt.models": ROOT / "models",
    "bench": ROOT / "bench",
}
MODULES = modules_of(SOURCES)
GRAPH = import_graph(MODULES)
MOST_MODULES = 17

# The face has two storeys: what every room may name, and what stands above decoding and loading.
RECORDS = {
    f"pyramid_rt.{name}"
    for name in (
        "checks",
        "errors",
        "gate",
        "json_files",
        "params",
        "result",
        "stats",
        "streaming",
        "trace",
        "trace_view",
    )
}
# Rooms of pyramid_rt, each with those below it that it may import; kernels and models lie below all of them.
BELOW = {
    "text": set(),
    "decoding": {"text"},
    "loading": {"decoding", "text"},
    "profiling": {"loading", "decoding", "text"},
    "face": {"profiling", "loading", "decoding", "text"},
    "tuning": {"face", "loading", "decoding", "text"},
    "cli": {"face", "tuning", "profiling", "loading", "decoding", "text"},
}


def room_of(module: str) -> str:
    """The room of a module of pyramid_rt: "records" and "face" for its top level."""
    if module in RECORDS:
        return "records"
    if module == "pyramid_rt.__main__":
        return "cli"
    name = module.removeprefix("pyramid_rt").removeprefix(".").split(".")[0]
    return name if f"pyramid_rt.{name}" in MODULES and (ROOT / "pyramid_rt" / name).is_dir() else "face"


def names(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_map_of_modules_is_whole() -> None:
    files = [file for root in SOURCES.values() for file in root.rglob("*.py")]
    assert {file.resolve() for file in files} == {file.resolve() for file in MODULES.values()}
    assert [
        name
        for name in SOURCES
        if not sum(bool(targets) for module, targets in GRAPH.items() if names(module, name))
    ] == []


def test_no_circle_of_imports() -> None:
    assert circle_in(GRAPH) == []


def test_a_circle_is_found_wherever_an_import_stands(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("from pack import b\n")
    (tmp_path / "b.py").write_text("def late():\n    import pack.room.c\n")
    (tmp_path / "room" / "c.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..a import thing\n"
    )
    graph = import_graph(modules_of({"pack": tmp_path}))
    assert circle_in(graph) == ["pack.a", "pack.b", "pack.room.c", "pack.a"]
    (tmp_path / "b.py").write_text("")
    assert circle_in(import_graph(modules_of({"pack": tmp_path}))) == []


def test_imports_go_down_only() -> None:
    """pyramid_rt -> models -> kernels, and nothing of the package imports what measures or tests it."""
    for module, file in MODULES.items():
        for target in imports_of(file, module):
            if not names(module, "bench"):
                assert target.split(".")[0] not in ("bench", "tests", "helpers"), (module, target)
            if names(module, "pyramid_rt.kernels"):
                assert not names(target, "pyramid_rt") or names(target, "pyramid_rt.kernels"), (
                    module,
                    target,
                )
            elif names(module, "pyramid_rt.models") and names(target, "pyramid_rt"):
                allowed = ("pyramid_rt.kernels", "pyramid_rt.models", "pyramid_rt.errors")
                assert any(names(target, package) for package in allowed), (module, target)


def test_rooms_of_the_package_import_downwards() -> None:
    for module, targets in GRAPH.items():
        room = room_of(module)
        if not names(module, "pyramid_rt") or room in ("kernels", "models", "records"):
            continue
        assert room in BELOW, f"{module}: say in BELOW where the room {room!r} stands"
        for target in targets:
            if names(target, "pyramid_rt") and target != "pyramid_rt":
                allowed = BELOW[room] | {room, "records", "kernels", "models"}
                assert room_of(target) in allowed, f"{module} ({room}) imports {target} ({room_of(target)})"


def test_records_lean_on_facts_alone() -> None:
    """The records of a call name rules, methods and limits by their modules, never a device, a model or a tier."""
    facts = {"decoding.methods", "decoding.rules", "decoding.counters", "text.detokenizer", "text.tokenizer"}
    for module in RECORDS:
        for target in GRAPH[module] - RECORDS:
            name = target.removeprefix("pyramid_rt.")
            assert name in facts or names(name, "kernels.reference"), (module, target)


def test_each_room_is_on_the_map() -> None:
    rooms = {room_of(module) for module in GRAPH if names(module, "pyramid_rt")}
    assert rooms - {"kernels", "models", "records"} <= BELOW.keys()


@pytest.mark.parametrize("root", ["pyramid_rt", "kernels", "models", "bench"])
def test_rooms_stay_small(root: str) -> None:
    folders = {ROOT / root, *(file.parent for file in (ROOT / root).rglob("*.py"))}
    sizes = {
        folder: len([file for file in folder.glob("*.py") if file.stem != "__init__"]) for folder in folders
    }
    crowded = {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > MOST_MODULES}
    assert not crowded, f"more than {MOST_MODULES} modules: {crowded}"
