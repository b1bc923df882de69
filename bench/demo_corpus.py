"""Text and tokens of the demo models: what they are trained on, and what they are measured on.

The corpus is the standard library of the running Python. Its tests are left out, and so are
generated tables (character maps, help topics, build settings), which are data rather than code.
The measurements and the model card are here too, because both are about this text.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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

PAIRS = (("draft", "target"), ("qualifier", "target"), ("draft", "qualifier"))
TIERS = ("target", "qualifier", "draft")

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """The tokenizer with the training and held-out token streams, documents joined by EOS (id 0)."""

    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens
    facts: dict[str, int]


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
    """Read the standard library, train or reload the tokenizer in ``work`` and encode both streams."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train_docs, held_docs = read_documents(root)
    saved = work / "tokenizer.json"
    if saved.exists():
        tokenizer = Tokenizer.from_file(str(saved))
    else:
        tokenizer = train_tokenizer(train_docs)
        tokenizer.save(str(saved))
    train = split_trailing_spaces(tokenizer, encode(tokenizer, train_docs), SPLIT_RATE, seed)
    held_out = encode(tokenizer, held_docs)
    facts = {
        "train_files": len(train_docs),
        "train_bytes": sum(len(text.encode()) for text in train_docs),
        "train_tokens": len(train),
        "held_out_files": len(held_docs),
        "held_out_bytes": sum(len(text.encode()) for text in held_docs),
        "held_out_tokens": len(held_out),
    }
    return Corpus(tokenizer, train, held_out, facts)


@torch.no_grad()
def measure_held_out(models: dict[str, Any], stream: Tokens, text_bytes: int, window: int) -> dict[str, Any]:
    """Measure loss per tier, and agreement per pair of tiers, over the whole held-out stream.

    Windows share one token, so every token but the first is predicted once. ``agreement`` is the
    share of places with the same most likely token; ``overlap`` is the mean of the sum over the
    vocabulary of min(p, q), the chance that speculative sampling at temperature 1 keeps a token.
    """
    nats = dict.fromkeys(models, 0.0)
    same = dict.fromkeys(PAIRS, 0)
    overlap = dict.fromkeys(PAIRS, 0.0)
    for start in range(0, len(stream) - 1, window):
        row = torch.from_numpy(stream[start : start + window + 1].astype(np.int64))
        logs = {
            tier: torch.log_softmax(model(input_ids=row[None, :-1]).logits[0], dim=-1)
            for tier, model in models.items()
        }
        for tier, log in logs.items():
            nats[tier] -= float(log.gather(1, row[1:, None]).sum())
        for pair in PAIRS:
            first, second = logs[pair[0]], logs[pair[1]]
            same[pair] += int((first.argmax(-1) == second.argmax(-1)).sum())
            overlap[pair] += float(torch.minimum(first, second).exp().sum())
    count = len(stream) - 1
    return {
        "nats_per_token": {tier: round(total / count, 4) for tier, total in nats.items()},
        "bits_per_byte": {tier: round(total / math.log(2) / text_bytes, 4) for tier, total in nats.items()},
        "agreement": {"/".join(pair): round(same[pair] / count, 4) for pair in PAIRS},
        "overlap": {"/".join(pair): round(overlap[pair] / count, 4) for pair in PAIRS},
    }


@torch.no_grad()
def measure_rows(models: dict[str, Any], rows: torch.Tensor, prompt: int) -> dict[str, float]:
    """Return the greedy agreement per pair of tiers on the part of ``rows`` after the prompt."""
    best = {
        tier: torch.cat([model(input_ids=row[None, :-1]).logits.argmax(-1) for row in rows])[:, prompt - 1 :]
        for tier, model in models.items()
    }
    return {"/".join(p): round(float((best[p[0]] == best[p[1]]).float().mean()), 4) for p in PAIRS}


def model_card(report: dict[str, Any]) -> str:
    """Write the model card from the measurements."""
    held, corpus = report["held_out"], report["corpus"]
    lines = [
        "# The demo pyramid",
        "",
        "Three small Llama models of one family for `pyramid_rt`: they make the runtime usable and testable",
        "without a download. They continue Python source code. They are a toy: their text looks like code,",
        "repeats itself and does not work. Do not use it for anything real.",
        "",
        "| tier | hidden | layers | heads (kv) | parameters | file | held-out nats/token | bits/byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tier in TIERS:
        size = report["tiers"][tier]
        lines.append(
            f"| {tier} | {size['hidden']} | {size['layers']} | {size['heads']} ({size['kv_heads']}) "
            f"| {size['parameters'] / 1e6:.2f} M | {size['file_bytes'] / 1e6:.1f} MB "
            f"| {held['nats_per_token'][tier]:.3f} | {held['bits_per_byte'][tier]:.3f} |"
        )
    lines += [
        "",
        "Head size 64, tied embeddings, RMSNorm epsilon 1e-5, RoPE base 10000, 1024 positions, bfloat16.",
        "The tokenizer is a byte-level BPE of 4096 tokens with one special token, `<|endoftext|>` (id 0),",
        "which ends a document; no token is added in front of a text.",
        "",
        "## Agreement",
        "",
        "The share of places at which two tiers have the same most likely token, given the same text before",
        "it. The last column is the chance that speculative sampling at temperature 1 keeps a token",
        "(the mean of the sum of min(p, q)) on held-out text.",
        "",
        "| pair | held-out | target, greedy | target, temperature 0.8 | kept, held-out |",
        "|---|---|---|---|---|",
    ]
    for pair in map("/".join, PAIRS):
        lines.append(
            f"| {pair} | {held['agreement'][pair]:.3f} | {report['own_greedy'][pair]:.3f} "
            f"| {report['own_sampled'][pair]:.3f} | {held['overlap'][pair]:.3f} |"
        )
    return "\n".join(lines + card_sources(report, corpus))


def card_sources(report: dict[str, Any], corpus: dict[str, int]) -> list[str]:
    """Return the lines of the card on data, training, licences and limits."""
    spent = ", ".join(f"{name} {minutes:g}" for name, minutes in report["minutes"].items())
    seen = "; ".join(
        f"{name} {stage['steps']} steps, {stage['tokens'] / 1e6:.2f} M tokens"
        for name, stage in report["stages"].items()
    )
    return [
        "",
        "## Data and training",
        "",
        f"The source of the standard library of Python {report['python']} without its tests, character maps",
        f"and help topics: {corpus['train_files']} files, {corpus['train_bytes'] / 1e6:.1f} MB, "
        f"{corpus['train_tokens'] / 1e6:.2f} M tokens.",
        f"{corpus['held_out_files']} more files ({corpus['held_out_bytes'] / 1e6:.2f} MB, "
        f"{corpus['held_out_tokens']} tokens), chosen by a hash of their path, were held out",
        "of the training; the figures above are from them, after rounding the weights to bfloat16. One of",
        "them, `locale.py`, is a quarter of these tokens and mostly a table of names.",
        "",
        "The target was trained with cross entropy; the qualifier and the draft were then distilled from its",
        "distributions (forward KL, a quarter of it on text that the target sampled). Hardware: "
        f"{report['hardware']}.",
        f"Minutes per stage: {spent}. Seen: {seen}.",
        "The schedule follows wall time: another machine gives other weights.",
        "",
        f"    {report['command']}",
        "",
        "## Licences",
        "",
        "The weights and tokenizers: Apache-2.0, like the project. The text they were trained on is licensed",
        "under the PSF License Version 2 (PSF-2.0); it is not part of this folder.",
        "",
        "## Limits",
        "",
        "Trained for an hour on few tokens: greedy text soon repeats itself, names and calls are made up,",
        "and passages may come out as they stand in the standard library. Contexts beyond 1024 tokens were",
        "never seen. Agreement between the tiers is that of this narrow domain and says little about others.",
        "",
    ]
