"""What an install would carry: packages, data, links and names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_dirs() -> dict[str, Path]:
    """Packages in the tree: each folder of Python files below the three source folders."""
    roots = {
        "pyramid_rt": ROOT / "pyramid_rt",
        "pyramid_rt.kernels": ROOT / "kernels",
        "pyramid_rt.models": ROOT / "models",
    }
    found = {}
    for name, root in roots.items():
        for folder, subfolders, files in os.walk(root, followlinks=False):
            subfolders[:] = [sub for sub in subfolders if sub != "__pycache__"]
            if any(file.endswith(".py") for file in files):
                parts = Path(folder).relative_to(root).parts
                found[".".join((name, *parts))] = Path(folder)
    return found


def test_declared_packages_equal_the_tree(project: dict[str, Any]) -> None:
    declared = project["tool"]["setuptools"]
    assert sorted(declared["packages"]) == sorted(package_dirs())
    for name, folder in declared["package-dir"].items():
        assert package_dirs()[name] == ROOT / folder
    for folder in package_dirs().values():
        assert (folder / "__init__.py").exists(), folder


@pytest.mark.parametrize("name", ["kernels", "models"])
def test_links_point_at_the_folders(name: str) -> None:
    link = ROOT / "pyramid_rt" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_imports_go_down_only() -> None:
    forbidden = {
        "kernels": r"pyramid_rt(?!\.kernels)[\w.]*",
        "models": r"pyramid_rt(?!\.kernels|\.models|\.errors)[\w.]*",
    }
    for folder, pattern in forbidden.items():
        for file in (ROOT / folder).rglob("*.py"):
            lines = file.read_text(encoding="utf-8").splitlines()
            bad = [line for line in lines if re.match(rf"\s*(from|import) {pattern}(\s|$)", line)]
            assert not bad, (file, bad)


def test_everything_a_wheel_needs_is_there(project: dict[str, Any]) -> None:
    for file in (project["project"]["readme"], *project["project"]["license-files"]):
        assert (ROOT / file).is_file(), file
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    module, function = project["project"]["scripts"]["pyramid-rt"].split(":")
    assert (module, function) == ("pyramid_rt.cli", "main")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel, built with the setuptools at hand so that no network is needed."""
    pytest.importorskip("setuptools", minversion="77")
    out = tmp_path_factory.mktemp("wheel")
    tree = out / "tree"
    # A copy, so that a build folder in the checkout neither matters nor is left behind.
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "pyramid_rt", "kernels", "models"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(tree / name)], check=True)
    build = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_a_wheel_holds_every_module_and_no_bare_names(wheel: list[str]) -> None:
    modules = {
        "/".join((*name.split("."), file.name))
        for name, folder in package_dirs().items()
        for file in folder.glob("*.py")
    }
    assert modules == {name for name in wheel if name.endswith(".py")}
    tops = {name.split("/")[0] for name in wheel}
    assert tops - {"pyramid_rt"} == {top for top in tops if top.endswith(".dist-info")}
    assert "pyramid_rt/py.typed" in wheel


def test_a_wheel_holds_the_demo(wheel: list[str]) -> None:
    demo = ROOT / "pyramid_rt" / "demo"
    expected = {f"pyramid_rt/{file.relative_to(demo.parent)}" for file in demo.rglob("*") if file.is_file()}
    assert expected <= set(wheel)
    for tier in ("draft", "qualifier", "target"):
        assert f"pyramid_rt/demo/{tier}/model.safetensors" in wheel


def test_the_embedded_weights_stay_small() -> None:
    demo = ROOT / "pyramid_rt" / "demo"
    assert sum(file.stat().st_size for file in demo.rglob("*.safetensors")) <= 40 * 10**6
