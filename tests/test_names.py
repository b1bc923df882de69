"""The package's names: imported at first use, and all there for tools and for readers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyramid_rt


def test_every_name_is_there_and_comes_from_where_type_checkers_see_it() -> None:
    tree = ast.parse(Path(pyramid_rt.__file__).read_text(encoding="utf-8"))
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(pyramid_rt.__all__)
    for name, module in seen.items():
        assert getattr(pyramid_rt, name) is getattr(sys.modules[str(module)], name), name
    assert set(pyramid_rt.__all__) <= set(dir(pyramid_rt))


def test_a_star_import_gives_all_names() -> None:
    space: dict[str, object] = {}
    exec("from pyramid_rt import *", space)
    assert set(pyramid_rt.__all__) <= space.keys()


def test_modules_are_attributes_and_other_names_are_errors() -> None:
    program = "import pyramid_rt; print(pyramid_rt.errors.InputError.__name__, pyramid_rt.text.__name__)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["InputError", "pyramid_rt.text"]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pyramid_rt.nonsense


@pytest.mark.parametrize("statement", ["import pyramid_rt", "from pyramid_rt.cli import main"])
def test_importing_is_light(statement: str) -> None:
    program = f"{statement}; import sys; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
