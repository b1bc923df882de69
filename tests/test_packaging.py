"""The contents of an install: packages, data, links and names."""

from __future__ import annotations

import email
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
    root = ROOT / declared["package-dir"][""]
    for name, folder in package_dirs().items():
        assert root.joinpath(*name.split(".")).resolve() == folder, name
        assert (folder / "__init__.py").exists(), folder


def test_the_source_folder_holds_nothing_but_the_package() -> None:
    link = ROOT / "src" / "pyramid_rt"
    assert link.is_symlink()
    assert os.readlink(link) == "../pyramid_rt"
    names = {path.name for path in (ROOT / "src").iterdir() if path.suffix != ".egg-info"}
    assert names == {"pyramid_rt"}, "an editable install would put these on the import path"


@pytest.mark.parametrize("name", ["kernels", "models"])
def test_links_point_at_the_folders(name: str) -> None:
    link = ROOT / "pyramid_rt" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_everything_a_wheel_needs_is_there(project: dict[str, Any]) -> None:
    for file in (project["project"]["readme"], *project["project"]["license-files"]):
        assert (ROOT / file).is_file(), file
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    module, function = project["project"]["scripts"]["pyramid-rt"].split(":")
    assert (module, function) == ("pyramid_rt.cli", "main")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an install reads: a build folder in the checkout neither matters nor is left behind."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "pyramid_rt", "kernels", "models"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(tree / name)], check=True)
    return tree


def build(tree: Path, kind: str, out: Path) -> Path:
    """The wheel, or the editable one, built with the setuptools at hand so that no network is needed."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_file(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> list[str]:
    with zipfile.ZipFile(wheel_file) as archive:
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


def test_the_metadata_leads_to_the_project(wheel_file: Path) -> None:
    with zipfile.ZipFile(wheel_file) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= urls.keys()
    assert all(url.startswith("https://") for url in urls.values()), urls
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True)
    assert description == (ROOT / "README.md").read_bytes()


def install(wheel_file: Path, folder: Path) -> Path:
    """An environment that holds the wheel alone; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(site)
    return folder / "bin" / "python"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_mypy_finds_the_package_from_a_user_project(kind: str, tree: Path, tmp_path: Path) -> None:
    """A user's type checker sees the signatures, from every room of the package."""
    pytest.importorskip("mypy")
    python = install(build(tree, kind, tmp_path / "wheel"), tmp_path / "venv")
    user = tmp_path / "user"
    user.mkdir()
    (user / "app.py").write_text(
        "import pyramid_rt\nfrom pyramid_rt.kernels.launch import Launch\n"
        "from pyramid_rt.models.config import LlamaConfig\n"
        "reveal_type(pyramid_rt.load)\nreveal_type(LlamaConfig.__init__)\nreveal_type(Launch.__init__)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, "--python-executable", str(python), "app.py"],
        cwd=user,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True,
        text=True,
    )
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(revealed) == 3, done.stdout
    assert revealed[0].startswith("def (weights_dir:"), revealed
    assert "pyramid_rt.pyramid.Pyramid" in revealed[0], revealed
    assert "pyramid_rt.models.config.LlamaConfig" in revealed[1], revealed
    assert revealed[2].startswith("def (self: pyramid_rt.kernels.launch.Launch"), revealed


def test_the_embedded_weights_stay_small() -> None:
    demo = ROOT / "pyramid_rt" / "demo"
    assert sum(file.stat().st_size for file in demo.rglob("*.safetensors")) <= 40 * 10**6


def test_every_commit_is_checked_by_the_versions_of_ci(project: dict[str, Any]) -> None:
    pins = dict(pin.split("==") for pin in project["project"]["optional-dependencies"]["lint"] if "==" in pin)
    assert pins.keys() == {"ruff", "mypy"}
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    repeated = re.findall(r'"(\w+)==([^"]+)"', config)
    assert repeated, "no pinned hook"
    assert all(pins[name] == version for name, version in repeated), (repeated, pins)
    # The hook for types runs what CI runs, in the environment that the pins made.
    assert "entry: make types" in config
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("ruff check", "ruff format --check", "mypy"):
        assert re.search(rf"^\t@\$\(BIN\)/{command}", makefile, re.MULTILINE), command


def test_cleaning_leaves_weights() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nclean:")[1].split("\n\n")[0]
    assert "weights" not in recipe.split("\n\t", 1)[1]
