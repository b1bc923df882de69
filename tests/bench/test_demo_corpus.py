"""The contents of the demo's corpus: skip lists, caps, duplicates, held-out files, licences."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from bench.demo_training import packages as demo_packages
from bench.demo_training.corpus import encode, source_files, split_trailing_spaces, texts, train_tokenizer
from bench.demo_training.packages import (
    PACKAGES,
    Source,
    check_licence,
    is_code,
    is_held_out_package_file,
    is_wanted_path,
    select,
    wheel_sources,
    without_notice,
)


def module(name: str, functions: int = 8) -> str:
    """A module of which every line has `name` in it."""
    return "".join(
        f"def {name}_{i}(argument_{name}):\n    return {name}_value + argument_{name} * {i}\n\n\n"
        for i in range(functions)
    )


def training_path(package: str, number: int = 0) -> str:
    """A path that is not held out."""
    return next(
        path
        for path in (f"{package}/file{i}.py" for i in range(1000 * number, 1000 * number + 1000))
        if not is_held_out_package_file(path)
    )


def held_out_path(package: str) -> str:
    return next(
        path for path in (f"{package}/file{i}.py" for i in range(100_000)) if is_held_out_package_file(path)
    )


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("pkg/core.py", True),
        ("pkg/sub/tests/core.py", False),
        ("pkg/_vendor/six.py", False),
        ("pkg/locale/de/formats.py", False),
        ("pkg/test_core.py", False),
        ("pkg/core_test.py", False),
        ("pkg/conftest.py", False),
        ("pkg/service_pb2.py", False),
        ("pkg/core.pyi", False),
        ("pkg-1.0.data/scripts/tool.py", False),
        ("tests.py", True),  # a module of that name is no folder of tests
    ],
)
def test_paths(path: str, wanted: bool) -> None:
    assert is_wanted_path(path) is wanted


def test_only_written_code_counts() -> None:
    good = module("alpha")
    assert is_code(good)
    assert not is_code("x = 1\n")  # too short
    assert not is_code(good + "def broken(:\n")
    assert not is_code("# This file is auto-generated. Do not edit.\n" + good)
    assert not is_code(good + "table = '" + "a" * demo_packages.LONGEST_LINE + "'\n")
    assert not is_code(("x = '" + "a" * 100 + "'\n") * 20)  # a table: long lines on the average
    assert not is_code(good * (demo_packages.LARGEST_FILE // len(good) + 1))


def test_a_licence_notice_is_dropped_and_other_comments_stay() -> None:
    assert without_notice("# Copyright 2020 X\n# Licensed under Y\nimport os\n") == "import os\n"
    assert without_notice("#!/usr/bin/env python\n# Licence: Z\nimport os\n").startswith("#!/usr")
    assert without_notice("# How it works\nimport os\n") == "# How it works\nimport os\n"
    assert without_notice("import os\n# Copyright\n") == "import os\n# Copyright\n"


def test_a_package_is_capped() -> None:
    sources = [Source(training_path("a", i), module(f"name{i}")) for i in range(6)]
    size = len(sources[0].text)
    [chosen], _ = select([sources], [], [], cap=3 * size + 1)
    assert [s.path for s in chosen] == [s.path for s in sources[:3]]


def test_the_same_text_counts_once() -> None:
    library, other = module("known"), module("other")
    first = [Source(training_path("a"), library), Source(training_path("a", 1), other)]
    second = [Source(training_path("b"), other.replace("\n\n\n", "  \n\n\n"))]  # but for spaces at line ends
    train, _ = select([first, second], [library], [])
    assert [[s.text for s in chosen] for chosen in train] == [[other], []]


def test_copies_of_held_out_text_stay_out_of_training() -> None:
    held_out = module("secret")
    half = module("secret", 4) + module("mine", 4)
    little = module("secret", 1) + module("mine", 12)
    sources = [Source(training_path("a", i), text) for i, text in enumerate([held_out, half, little])]
    [chosen], _ = select([sources], [], [held_out])
    assert [s.text for s in chosen] == [little]


def test_held_out_files_of_packages_are_in_neither_stream_twice() -> None:
    own = module("owned")
    sources = [Source(held_out_path("a"), own), Source(training_path("a"), module("owned") + "\n\nx = 1\n")]
    [chosen], held = select([sources], [], [])
    assert [s.text for s in held] == [own]
    assert chosen == []  # shares its lines with the held-out file


def write_wheel(path: Path, metadata: str, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg-1.0.dist-info/METADATA", metadata)
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_wheel_gives_its_wanted_files_in_a_stable_order(tmp_path: Path) -> None:
    files = {f"pkg/m{i}.py": f"x = {i}\r\n" for i in range(5)} | {"pkg/tests/t.py": "", "pkg/data.txt": ""}
    one = write_wheel(tmp_path / "pkg-1.0-py3-none-any.whl", "", files)
    first = list(wheel_sources(one))
    backwards = dict(reversed(files.items()))
    second = list(wheel_sources(write_wheel(tmp_path / "pkg-1.0-py3-none-any.whl", "", backwards)))
    assert first == second
    assert sorted(s.path for s in first) == [f"pkg/pkg/m{i}.py" for i in range(5)]
    assert [s for s in first if not (s.text.endswith("\n") and "\r" not in s.text)] == []


def test_a_wheel_under_another_licence_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "p.whl", "Name: p\nLicense: GPL-3.0\n\nlike MIT but not\n", {})
    with pytest.raises(ValueError, match=r"expected to be MIT.*GPL-3\.0"):
        check_licence(wheel, "MIT")
    check_licence(write_wheel(tmp_path / "q.whl", "Name: q\nLicense-Expression: MIT\n\n", {}), "MIT")


def test_the_list_names_permissive_licences_and_each_package_once() -> None:
    assert {licence for _, _, licence in PACKAGES} <= {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0"}
    assert len({name for name, _, _ in PACKAGES}) == len(PACKAGES)


def test_the_library_leaves_out_tests_and_tables(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "json/b.py",
        "test/c.py",
        "encodings/d.py",
        "config-3.11/e.py",
        "_sysconfigdata_x.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert [p.name for p in source_files(tmp_path)] == ["a.py", "b.py"]


def test_a_stream_gives_its_documents_back() -> None:
    documents = [module("alpha"), module("beta") + "# ünïcode\n"]
    tokenizer = train_tokenizer(documents)
    stream = encode(tokenizer, documents)
    assert texts(tokenizer, stream) == documents
    split = split_trailing_spaces(tokenizer, stream, 1.0, 1)
    assert len(split) > len(stream)
    assert texts(tokenizer, split) == documents
    assert np.array_equal(split_trailing_spaces(tokenizer, stream, 0.0, 1), stream)
