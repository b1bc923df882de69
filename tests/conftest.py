"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from ptx.device import architecture, install

# Without a GPU the kernels run under Triton's interpreter, which reads this when a kernel is defined. With
# PYRAMID_PTX=sm_80 they are compiled for that architecture, and the machine of tests/ptx takes a GPU's place.
if architecture():
    install(architecture())
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.tiny import write_tiny_pyramid

from pyramid_rt import Pyramid, load


def add_bench() -> None:
    """Make `bench` importable without the root on the path, where `kernels` would shadow another project's."""
    folder = Path(__file__).resolve().parent.parent / "bench"
    spec = importlib.util.spec_from_file_location(
        "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules.setdefault("bench", importlib.util.module_from_spec(spec))


add_bench()


@pytest.fixture
def children_find_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes take over the import path; there they find `bench` as a command run from the root does.

    At its end, so that nothing takes our `kernels` for the package of that name.
    """
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).resolve().parent.parent)])


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pyramid(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Pyramid:
    """Loaded once; tests must leave it usable, which is what it promises."""
    return load(tiny_dir, device="cpu")
