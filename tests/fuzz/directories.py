"""Model directories with something wrong in them: a value, a byte, a header, or what kind of file it is."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyramid_rt
from fuzz.runner import Case, Workspace
from fuzz.values import JSON_LITERALS

TIERS = ("draft", "qualifier", "target")
_NEW_ENTRIES = ("quantization_config", "rope_scaling", "sliding_window", "auto_map", "x", "pretraining_tp")
_SHAPES: tuple[list[Any], ...] = ([], [0], [-1], [2**62, 4], [10**30], ["a"])
_DEVICES = ("/dev/zero", "/dev/null", "/dev/full", "/dev/tty")
_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "generation_config.json",
)
_MARK = "@@fuzz@@"
_EXTRA = (
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "chat_template.jinja",
)


def case(dice: random.Random, place: Workspace) -> Case:
    """Load a directory with one to three things wrong, and decode where that works."""
    directory = place.folder / "weights"
    shutil.copytree(place.tiny, directory)
    done = [_mutate(dice, directory) for _ in range(dice.choice((1, 1, 1, 2, 3)))]

    def run() -> None:
        with pyramid_rt.load(directory, device="cpu", max_seq=dice.choice((None, 48))) as pyramid:
            pyramid.generate("ab", max_new_tokens=3, seed=1)

    return Case("; ".join(done), run, apart=True)


def _mutate(dice: random.Random, directory: Path) -> str:
    chosen = dice.choices(
        (_json_value, _json_value_everywhere, _bytes, _tensors, _kind_of_file, _pyramid_file, _extra_file),
        (40, 5, 12, 20, 8, 12, 6),
    )[0]
    return chosen(dice, directory)


def _json_file(dice: random.Random, directory: Path) -> Path:
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return directory / dice.choice(TIERS) / dice.choice(names)


def _json_value(dice: random.Random, directory: Path) -> str:
    """One entry of a JSON file becomes something else, or goes, or a new one comes."""
    return _change(dice, _json_file(dice, directory))


def _json_value_everywhere(dice: random.Random, directory: Path) -> str:
    """The same change in the same file of every tier, so that the tiers still agree."""
    name, seed = dice.choice(("config.json", "tokenizer.json")), dice.random()
    return " and ".join(_change(random.Random(seed), directory / tier / name) for tier in TIERS)


def _change(dice: random.Random, file: Path) -> str:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return f"{file.name} left as it is"
    places = list(_places(content))
    if not places:
        return f"{file.name} left as it is"
    holder, key = dice.choice(places)
    literal = dice.choice(JSON_LITERALS)
    what = f"{file.parent.name}/{file.name}: {key!r}"
    if dice.random() < 0.12:
        del holder[key]
        file.write_text(json.dumps(content), encoding="utf-8")
        return f"{what} gone"
    if isinstance(holder, dict) and dice.random() < 0.1:
        key = dice.choice(_NEW_ENTRIES)
        what = f"{file.parent.name}/{file.name}: new {key!r}"
    holder[key] = _MARK
    text = json.dumps(content).replace(f'"{_MARK}"', literal)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{what} = {literal[:40]}"


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every entry of a JSON value, as what holds it and its key; a few of each long list or vocabulary."""
    found: list[tuple[Any, Any]] = []
    keys = (
        list(content)
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else ()
    )
    for key in list(keys)[:40]:
        found.append((content, key))
        found += _places(content[key])
    return found


def _bytes(dice: random.Random, directory: Path) -> str:
    """Bytes of any file: cut off, flipped, put in, or all of them other ones."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    file = directory / dice.choice(TIERS) / dice.choice(names)
    if not file.is_file():
        return f"{file.name} left as it is"
    content = bytearray(file.read_bytes())
    way = dice.choice(("cut", "flip", "insert", "empty", "bom", "latin", "zeros"))
    near = min(len(content), 2000)
    if way == "cut":
        content = content[: dice.randrange(len(content) + 1)]
    elif way == "flip" and near:
        content[dice.randrange(near)] ^= 1 << dice.randrange(8)
    elif way == "insert":
        content[near // 2 : near // 2] = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 9)))
    elif way == "empty":
        content = bytearray()
    elif way == "bom":
        content = bytearray(b"\xef\xbb\xbf") + content
    elif way == "latin":
        content = bytearray(b'{"a": "\xff\xfe"}')
    else:
        content = bytearray(len(content))
    file.write_bytes(content)
    return f"{file.parent.name}/{file.name}: bytes {way}"


def _tensors(dice: random.Random, directory: Path) -> str:
    """The header of a safetensors file says something else."""
    file = directory / dice.choice(TIERS) / "model.safetensors"
    if not file.is_file() or file.stat().st_size < 16:
        return f"{file.name} left as it is"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError):
        return f"{file.name} left as it is"
    names = [name for name in header if name != "__metadata__"]
    name = dice.choice(names)
    entry = header[name]
    way = dice.choice(("shape", "dtype", "offsets", "gone", "renamed", "size", "literal", "extra", "swapped"))
    if way == "shape":
        entry["shape"] = dice.choice((*_SHAPES, entry["shape"][::-1], [*entry["shape"], 1]))
    elif way == "dtype":
        entry["dtype"] = dice.choice(("F64", "F16", "BF16", "I8", "I64", "BOOL", "F8_E4M3", "nothing", "", 3))
    elif way == "offsets":
        entry["data_offsets"] = dice.choice(([0, 0], [-4, 4], [0, 2**63], [8, 4], [0], ["a", "b"], None))
    elif way == "gone":
        del header[name]
    elif way == "renamed":
        header[name + dice.choice((".x", " ", "\x00", "_scale"))] = header.pop(name)
    elif way == "extra":
        header["extra.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    elif way == "swapped":
        other = dice.choice(names)
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    if way == "literal":
        header[name] = _MARK
        text = (
            json.dumps(header)
            .replace(f'"{_MARK}"', dice.choice(JSON_LITERALS))
            .encode("utf-8", "surrogatepass")
        )
    length = len(text) if way != "size" else dice.choice((0, 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1))
    file.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])
    return f"{file.parent.name}/{file.name}: {way} of {name}"


def _kind_of_file(dice: random.Random, directory: Path) -> str:
    """A file is missing, or is a directory, a link, a pipe or a device."""
    file = directory / dice.choice(TIERS) / dice.choice((*_FILES, ""))
    what = f"{file.relative_to(directory)}"
    if not file.parent.is_dir():
        return f"{what}: left as it is"
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    ways: dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "a directory": lambda: file.mkdir(),
        "a link to itself": lambda: file.symlink_to(file.name),
        "a link to nothing": lambda: file.symlink_to("/no/such/place"),
        "a link to a device": lambda: file.symlink_to(dice.choice(_DEVICES)),
        "a link to a directory": lambda: file.symlink_to("."),
        "a pipe": lambda: os.mkfifo(file),
    }
    way = dice.choice(list(ways))
    ways[way]()
    return f"{what}: {way}"


def _pyramid_file(dice: random.Random, directory: Path) -> str:
    """A pyramid.json that names the tiers and some defaults, something about it changed."""
    options = {
        "method": "sd", "draft_length": 3, "qualifier_length": 5, "inner_rounds": 2, "qualifier_threshold": 0.2,
        "target_threshold": 0.3, "divergence": "js", "divergence_on": "raw", "lossless_rule": "match", "top_k": 5,
        "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "max_new_tokens": 3,
    }  # fmt: skip
    file = directory / "pyramid.json"
    defaults = {name: options[name] for name in dice.sample(list(options), dice.randrange(1, 5))}
    file.write_text(json.dumps({**{tier: tier for tier in TIERS}, "defaults": defaults}), encoding="utf-8")
    return _change(dice, file)


def _extra_file(dice: random.Random, directory: Path) -> str:
    """A file that need not be there, and says something odd."""
    file = directory / dice.choice(TIERS) / dice.choice(_EXTRA)
    contents = {
        "special_tokens_map.json": '{"eos_token": "<eos>", "bos_token": VALUE}',
        "added_tokens.json": '{"<new>": VALUE}',
        "model.safetensors.index.json": '{"weight_map": {"lm_head.weight": VALUE}}',
        "chat_template.jinja": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    }
    literal = dice.choice(JSON_LITERALS)
    text = contents[file.name].replace("VALUE", literal)
    if file.parent.is_dir():
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{file.parent.name}/{file.name}: {text[:60]}"
