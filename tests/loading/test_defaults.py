"""Writing defaults: what is kept, what is made, and that nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pyramid_rt
from pyramid_rt import InputError, WeightsError
from pyramid_rt.loading.defaults import check_tunable, write_defaults
from pyramid_rt.loading.directory import PyramidDirectory


def a_directory(tmp_path: Path, tiny_dir: Path, content: object = None) -> Path:
    target = tmp_path / "pyramid"
    shutil.copytree(tiny_dir, target)
    if content is not None:
        (target / "pyramid.json").write_text(json.dumps(content))
    return target


TIERS = {"target": "target", "draft": "draft"}


def test_other_content_is_kept(tmp_path: Path, tiny_dir: Path) -> None:
    defaults = {"temperature": 0.7, "method": "sd", "draft_length": 4, "inner_rounds": 2}
    directory = a_directory(tmp_path, tiny_dir, {**TIERS, "defaults": defaults})
    file = write_defaults(directory, {"method": "sd", "draft_length": 7})
    expected = {"temperature": 0.7, "method": "sd", "draft_length": 7, "inner_rounds": 2}
    assert json.loads(file.read_text()) == {**TIERS, "defaults": expected}
    assert list(json.loads(file.read_text())) == ["target", "draft", "defaults"]
    # A number of inner rounds would override the length that was just chosen.
    write_defaults(directory, {"method": "psd", "qualifier_length": 8})
    del expected["inner_rounds"]
    expected |= {"method": "psd", "qualifier_length": 8}
    assert json.loads(file.read_text())["defaults"] == expected


def test_the_file_is_made_where_there_is_none(tmp_path: Path, tiny_dir: Path) -> None:
    directory = a_directory(tmp_path, tiny_dir)
    before = PyramidDirectory.open(directory)
    file = write_defaults(directory, {"method": "sd", "draft_length": 3})
    assert file == directory / "pyramid.json"
    after = PyramidDirectory.open(directory)
    assert {name: path.resolve() for name, path in after.tiers.items()} == {
        name: path.resolve() for name, path in before.tiers.items()
    }
    assert after.defaults == {"method": "sd", "draft_length": 3}


def test_a_link_stays_a_link(tmp_path: Path, tiny_dir: Path) -> None:
    directory = a_directory(tmp_path, tiny_dir)
    real = tmp_path / "kept.json"
    real.write_text(json.dumps(TIERS))
    (directory / "pyramid.json").symlink_to(real)
    assert write_defaults(directory, {"method": "ar"}) == real
    assert (directory / "pyramid.json").is_symlink()
    assert json.loads(real.read_text()) == {**TIERS, "defaults": {"method": "ar"}}


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ({"temperature": float("nan")}, "'temperature' must be of type float, found nan"),
        ({"temperature": 10**400}, "'temperature' must be of type float, found an integer of 1329 bits"),
        ({"temperature": "x"}, "'temperature' must be of type float, found 'x'"),
        ({"temperature": b"x"}, "'temperature' must be of type float"),
        ({"temperature": True}, "'temperature' must be of type float, found True"),
        ({"temperature": -1.0}, "'defaults': temperature"),
        ({"draft_length": 2.0}, "'draft_length' must be of type int, found 2.0"),
        ({"draft_length": 0}, "'defaults': draft_length"),
        ({"method": "\ud800"}, "'defaults': .*method"),
        ({"methd": "sd"}, "unknown keys 'methd'"),
    ],
)
def test_nothing_is_written_that_load_would_refuse(
    tmp_path: Path, tiny_dir: Path, defaults: dict[str, object], words: str
) -> None:
    directory = a_directory(tmp_path, tiny_dir, TIERS)
    with pytest.raises((InputError, WeightsError), match=rf"pyramid\.json.*{words}"):
        write_defaults(directory, defaults)
    assert json.loads((directory / "pyramid.json").read_text()) == TIERS


def test_what_equals_a_number_is_written_as_one(tmp_path: Path, tiny_dir: Path) -> None:
    directory = a_directory(tmp_path, tiny_dir, TIERS)
    file = write_defaults(
        directory, {"draft_length": np.int64(3), "top_p": np.float32(0.5), "temperature": torch.tensor(1.5)}
    )
    assert json.loads(file.read_text())["defaults"] == {"draft_length": 3, "top_p": 0.5, "temperature": 1.5}


def test_a_link_to_itself_and_a_file_without_a_target_are_named(tmp_path: Path, tiny_dir: Path) -> None:
    directory = a_directory(tmp_path, tiny_dir, {"draft": "draft"})
    with pytest.raises(WeightsError, match=r"pyramid\.json: the target tier is missing"):
        write_defaults(directory, {"draft_length": 2})
    (directory / "pyramid.json").unlink()
    (directory / "pyramid.json").symlink_to("pyramid.json")
    with pytest.raises(WeightsError, match=r"pyramid\.json: cannot look at it"):
        write_defaults(directory, {"draft_length": 2})


def test_a_failed_write_leaves_the_file_as_it_was(
    tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = a_directory(tmp_path, tiny_dir, TIERS)
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WeightsError, match="cannot write it: No space left"):
        write_defaults(directory, {"method": "ar"})
    assert {path: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before


def test_only_a_weights_directory_of_several_tiers_can_be_tuned(tmp_path: Path, tiny_dir: Path) -> None:
    check_tunable(tiny_dir, writing=True)
    with pytest.raises(InputError, match="target: there is nothing to tune"):
        check_tunable(tiny_dir / "target", writing=False)
    with pytest.raises(WeightsError, match="holds no model"):
        check_tunable(tmp_path, writing=False)


def test_a_directory_that_cannot_be_written_is_refused(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, so the answer is made up.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match="cannot be written to; --dry-run only prints"):
        check_tunable(tiny_dir, writing=True)
    check_tunable(tiny_dir, writing=False)


def test_defaults_of_methods_are_kept_beside_those_of_others(tiny_dir: Path, tmp_path: Path) -> None:
    tiers = {name: str(tiny_dir / name) for name in ("draft", "qualifier", "target")}
    before = {"draft_length": 2, "methods": {"fsd": {"draft_length": 6}, "psd_f": {"qualifier_length": 9}}}
    file = tmp_path / "pyramid.json"
    file.write_text(json.dumps({**tiers, "defaults": before}))
    write_defaults(tmp_path, {"method": "sd", "methods": {"psd_f": {"draft_length": 7}}})
    assert json.loads(file.read_text())["defaults"] == {
        "draft_length": 2,
        "method": "sd",
        "methods": {"fsd": {"draft_length": 6}, "psd_f": {"draft_length": 7}},
    }
    with pyramid_rt.load(tmp_path, device="cpu") as rt:
        assert rt.method_defaults == {"fsd": {"draft_length": 6}, "psd_f": {"draft_length": 7}}
    with pytest.raises(WeightsError, match=r"'methods', 'sd' has unknown keys 'tempo'"):
        write_defaults(tmp_path, {"methods": {"sd": {"tempo": 1}}})
