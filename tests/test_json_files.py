"""JSON files: what is refused, how fast, and that a write is whole or not at all."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from pyramid_rt import WeightsError, json_files
from pyramid_rt.json_files import kind_of, read_object, resolved, write_object


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".part"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff", "not valid JSON"),
        (b'{"a": ' + b"[" * 20000 + b"]" * 20000 + b"}", "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["half", "list", "bytes", "deep", "digits"],
)
def test_bad_content_is_refused_by_the_files_name(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=rf"config\.json: .*{words}"):
        read_object(tmp_path / "config.json")


def test_constants_that_are_no_json_are_refused_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": Infinity}')
    assert read_object(path) == {"a": float("inf")}
    with pytest.raises(WeightsError, match="Infinity is no JSON number"):
        read_object(path, constants=False)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_fifo, "is a FIFO, expected a file"),
        (a_device, "is a device, expected a file"),
        (a_folder, "directory"),
        (a_loop, "cannot read it: Too many levels"),
        (lambda path: None, "cannot read it: No such file"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / "x.json")
    begin = time.monotonic()
    with pytest.raises(WeightsError, match=rf"x\.json: .*{words}"):
        read_object(tmp_path / "x.json")
    assert time.monotonic() - begin < 2.0


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "\ud800"], ids=["long", "nul", "surrogate"])
def test_names_that_the_system_cannot_hold(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for act in (kind_of, read_object, lambda path: write_object(path, {})):
        with pytest.raises(WeightsError) as caught:
            act(path)
        assert str(tmp_path) in str(caught.value)
        str(caught.value).encode()


def test_a_file_of_gigabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(5 * 2**30)  # no block of it is taken
    with pytest.raises(WeightsError, match=r"big\.json: has 5368709120 bytes, expected at most"):
        read_object(path)


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    a_fifo(tmp_path / "fifo")
    assert kind_of(tmp_path) == "directory"
    assert kind_of(tmp_path / "file") == "file"
    assert kind_of(tmp_path / "fifo") == "FIFO"
    assert kind_of(tmp_path / "gone") is None
    assert kind_of(tmp_path / "file" / "below") is None
    a_loop(tmp_path / "loop")
    for act in (kind_of, resolved):
        with pytest.raises(WeightsError, match="loop: cannot"):
            act(tmp_path / "loop")


# Writing.


def test_what_is_written_is_read_and_has_the_usual_rights(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.json", tmp_path / "plain"
    write_object(path, {"a": ["é", 1.5]})
    plain.touch()
    assert read_object(path) == {"a": ["é", 1.5]}
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "plain"]


@pytest.mark.parametrize(
    "content",
    [{"a": float("nan")}, {"a": b"x"}, {"a": "\ud800"}, {"a": {1}}],
    ids=["nan", "bytes", "half", "set"],
)
def test_what_is_no_json_is_not_written(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"kept": 1}')
    with pytest.raises(WeightsError, match=r"a\.json: cannot write it"):
        write_object(path, content)
    assert read_object(path) == {"kept": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"kept": 1}')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WeightsError, match=r"a\.json: cannot write it: No space left on device"):
        write_object(path, {"a": 1})
    assert (read_object(path), os.listdir(tmp_path)) == ({"kept": 1}, ["a.json"])


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, end = tmp_path / "a.json", time.monotonic() + 1.5
    wrong: list[BaseException] = []
    write_object(path, {"n": 0, "padding": "x" * 5000})

    def repeat(act: Callable[[], None]) -> None:
        try:
            while time.monotonic() < end:
                act()
        except BaseException as error:
            wrong.append(error)

    def write() -> None:
        write_object(path, {"n": random.randrange(10), "padding": "x" * 5000})

    def read() -> None:
        assert len(read_object(path)["padding"]) == 5000

    threads = [threading.Thread(target=repeat, args=(act,)) for act in (write, write, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_object(path, {})
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: time.sleep(60)
        write_object(path, {"never": 1})
        os._exit(0)
    deadline = time.monotonic() + 20
    while not leftovers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    (part,) = leftovers(tmp_path)
    # While its writer lives, it is nobody else's to remove.
    write_object(path, {"a": 1})
    assert leftovers(tmp_path) == [part]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    write_object(path, {"a": 2})
    assert (leftovers(tmp_path), json.loads(path.read_text())) == ([], {"a": 2})


def test_a_writer_whose_file_was_taken_for_abandoned_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.json", json_files._lock
    taken: list[str] = []

    def lock(file: BinaryIO, *, wait: bool) -> bool:
        if wait and not taken:  # between its making and its locking
            taken.append(file.name)
            os.unlink(file.name)
        return real(file, wait=wait)

    monkeypatch.setattr(json_files, "_lock", lock)
    write_object(path, {"a": 1})
    assert len(taken) == 1
    assert (read_object(path), os.listdir(tmp_path)) == ({"a": 1}, ["a.json"])
