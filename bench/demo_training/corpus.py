"""Text and tokens of the demo models: what they are trained on, and what they are measured on.

The corpus is the standard library of the running Python and the packages of `demo_packages`. Of the
library, tests are left out, and so are generated tables (character maps, help topics, build settings),
which are data rather than code.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.demo_training import packages as demo_packages
from bench.demo_training.packages import PACKAGES, fetch_packages, select, wheel_sources

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
HELD_OUT_PERCENT = 4
SPLIT_RATE = 0.01
SKIPPED_DIRS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "ensurepip", "__pycache__", "encodings", "pydoc_data"}
)
# A word, number or operator takes one following space with it, and a line break its indentation, so that
# a prompt ending in "def " or in an indented new line ends exactly where a training token does.
PIECES = r"(?:\r?\n[ \t]*)+|[\p{L}_]+ ?|\p{N}{1,3} ?|[^\s\p{L}\p{N}_]+ ?|\s+"

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """The tokenizer and the token streams, documents joined by EOS (id 0).

    ``train`` begins with ``library_tokens`` tokens of the standard library; the packages follow.
    ``held_out`` is of the standard library alone, ``held_out_packages`` of the packages.
    """

    tokenizer: Tokenizer
    train: Tokens
    library_tokens: int
    held_out: Tokens
    held_out_packages: Tokens
    facts: dict[str, Any]


def source_files(root: Path) -> list[Path]:
    """Return the Python files of a standard library below ``root`` that belong to the corpus, sorted."""
    chosen = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        skipped = any(part in SKIPPED_DIRS or part.startswith("config-") for part in folders)
        if not skipped and not path.name.startswith("_sysconfigdata"):
            chosen.append(path)
    return chosen


def is_held_out(relative: str) -> bool:
    """Decide by a stable hash of the relative path whether a file is held out."""
    digest = hashlib.sha256(relative.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def read_documents(root: Path) -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents; files that are not UTF-8 or empty are left out."""
    train: list[str] = []
    held_out: list[str] = []
    for path in source_files(root):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            side = held_out if is_held_out(path.relative_to(root).as_posix()) else train
            side.append(text)
    return train, held_out


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that adds no tokens of its own around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tokens:
    """Encode documents into one stream in which EOS precedes the first one and follows each."""
    stream = [0]
    for encoding in tokenizer.encode_batch(documents):
        stream.extend(encoding.ids)
        stream.append(0)
    return np.array(stream, dtype=np.uint16)


def split_trailing_spaces(tokenizer: Tokenizer, stream: Tokens, rate: float, seed: int) -> Tokens:
    """Split the trailing spaces off a share of the tokens that end in spaces.

    A prompt may end before the space or indentation that its last token would have carried. The
    split tokens teach the models to go on from there.
    """
    parts: dict[int, list[int]] = {}
    for token in range(1, tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        head = text.rstrip(" ")
        if head and head != text and "\ufffd" not in text:
            parts[token] = tokenizer.encode(head).ids + tokenizer.encode(text[len(head) :]).ids
    chosen = np.random.default_rng(seed).random(len(stream)) < rate
    result: list[int] = []
    for token, split in zip(stream.tolist(), chosen.tolist(), strict=True):
        if split and token in parts:
            result.extend(parts[token])
        else:
            result.append(token)
    return np.array(result, dtype=np.uint16)


def load_corpus(work: Path, seed: int) -> Corpus:
    """Read the standard library and the packages, train or reload the tokenizer, encode all streams.

    The packages, the tokenizer and the streams are kept in ``work``; streams of another seed, Python
    or list of packages are made anew.
    """
    train_docs, held_docs = read_documents(Path(sysconfig.get_paths()["stdlib"]))
    saved = work / "tokenizer.json"
    if saved.exists():
        tokenizer = Tokenizer.from_file(str(saved))
    else:
        tokenizer = train_tokenizer(train_docs)
        tokenizer.save(str(saved))
    rules = (Path(__file__).read_bytes(), Path(demo_packages.__file__).read_bytes(), saved.read_bytes())
    key = hashlib.sha256(b"".join(rules) + f"{platform.python_version()} {seed}".encode()).hexdigest()[:16]
    path = work / f"corpus-{key}.npz"
    if not path.exists():
        write_streams(path, tokenizer, train_docs, held_docs, fetch_packages(work / "packages"), seed)
    with np.load(path) as streams:
        facts = json.loads(str(streams["facts"]))
        return Corpus(
            tokenizer,
            np.concatenate([streams["library"], streams["packages"]]),
            len(streams["library"]),
            streams["held_out"],
            streams["held_out_packages"],
            facts,
        )


def write_streams(
    path: Path,
    tokenizer: Tokenizer,
    train_docs: list[str],
    held_docs: list[str],
    wheels: list[Path],
    seed: int,
) -> None:
    """Encode the standard library and the chosen files of the packages, and save them with the facts."""
    chosen, held = select(map(wheel_sources, wheels), train_docs, held_docs)
    library = split_trailing_spaces(tokenizer, encode(tokenizer, train_docs), SPLIT_RATE, seed)
    packages, rows = [], []
    for number, (sources, (name, version, licence)) in enumerate(zip(chosen, PACKAGES, strict=True)):
        stream = encode(tokenizer, [s.text for s in sources])
        packages.append(split_trailing_spaces(tokenizer, stream, SPLIT_RATE, seed + 1 + number)[1:])
        size = sum(len(s.text.encode()) for s in sources)
        rows.append(
            {"name": name, "version": version, "licence": licence, "files": len(sources), "bytes": size}
            | {"tokens": len(packages[-1])}
        )
        print(rows[-1], flush=True)
    held_out, held_out_packages = encode(tokenizer, held_docs), encode(tokenizer, [s.text for s in held])
    facts = {
        "train_files": len(train_docs),
        "train_bytes": sum(len(text.encode()) for text in train_docs),
        "train_tokens": len(library),
        "held_out_files": len(held_docs),
        "held_out_bytes": sum(len(text.encode()) for text in held_docs),
        "held_out_tokens": len(held_out),
        "held_out_package_files": len(held),
        "held_out_package_bytes": sum(len(s.text.encode()) for s in held),
        "held_out_package_tokens": len(held_out_packages),
        "packages": rows,
    }
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        library=library,
        packages=np.concatenate(packages),
        held_out=held_out,
        held_out_packages=held_out_packages,
        facts=np.array(json.dumps(facts)),
    )
    partial.replace(path)


def texts(tokenizer: Tokenizer, stream: Tokens) -> list[str]:
    """Return the documents of a stream that `encode` made."""
    ends = np.flatnonzero(stream == 0)
    return [tokenizer.decode(stream[a + 1 : b].tolist()) for a, b in pairwise(ends)]
