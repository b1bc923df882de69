"""The worth of the demo pyramid: agreement of its tiers, and the share of its texts that is Python.

    python -m bench.demo_training.evaluation --weights pyramid_rt/demo --work build/demo

A prefix is a piece of a held-out file that ends where a statement of the module's top level begins: as
many whole statements before that place as fit into `PREFIX_TOKENS` tokens. A completion is the greedy
continuation by ten lines that are not blank, and by up to twenty more to finish what the tenth leaves open
(a call, a docstring, a `try`). Of the completions:

- `parses`: `ast.parse` accepts the ten lines as they stand. Strict: ending after the tenth line often
  means ending inside a statement, which is not the model's fault.
- `valid`: `ast.parse` accepts the first ten to thirty lines. Only an end that comes too early is forgiven;
  no line makes good an error before it.
- `distinct`: the mean share of the ten lines that differ from all before them, since `ast.parse` likes
  repetition.

The first two are shares of all prefixes. A completion of fewer than ten lines fails both, and so does one
in which fewer than `STATEMENTS` statements other than bare strings are accepted: neither silence nor
comments nor one long docstring pass.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import warnings
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyramid_rt
from bench.demo_training.card import PAIRS, add_completions
from bench.demo_training.corpus import Corpus, Tokens, load_corpus, texts
from pyramid_rt.decoding.methods import METHODS

LINES = 10
MOST_LINES = 30
STATEMENTS = 2
PREFIX_TOKENS = 384
LONGEST_COMPLETION = 512
ALLOW_INCOMPLETE_INPUT = 0x4000  # codeop.PyCF_ALLOW_INCOMPLETE_INPUT, which the type stubs lack
INCOMPLETE = "incomplete input"


@dataclass(frozen=True)
class Verdict:
    """Python's verdict on one completion; `distinct` is the share of different lines."""

    parses: bool
    valid: bool
    distinct: float


def parse(text: str) -> ast.Module | None:
    """Return the tree of a text, or None where Python does not accept it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_open(text: str) -> bool:
    """Tell whether Python's only complaint about a text is that it ends too early."""
    flags = ALLOW_INCOMPLETE_INPUT | ast.PyCF_ONLY_AST
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "completion", "exec", flags)
    except SyntaxError as error:
        return INCOMPLETE in str(error)
    except (ValueError, RecursionError, MemoryError):
        return False
    return False


def count_statements(tree: ast.Module | None) -> int:
    """Count the statements of a tree at all levels, without bare strings (docstrings)."""
    if tree is None:
        return 0
    return sum(
        isinstance(node, ast.stmt)
        and not (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        for node in ast.walk(tree)
    )


def first_lines(text: str, count: int = LINES) -> list[str] | None:
    """Return a text's lines up to the ``count``-th that is not blank, or None where it has fewer."""
    lines = text.split("\n")
    filled = [number for number, line in enumerate(lines) if line.strip()]
    return lines[: filled[count - 1] + 1] if len(filled) >= count else None


def judge(completion: str) -> Verdict | None:
    """Judge whole lines that begin where a top-level statement may begin; None while more lines may decide."""
    head = first_lines(completion)
    if head is None:
        return None
    filled = [line for line in head if line.strip()]
    distinct = len(set(filled)) / len(filled)
    for count in range(LINES, MOST_LINES + 1):
        lines = first_lines(completion, count)
        if lines is None:
            return None
        text = "\n".join(lines) + "\n"
        tree = parse(text)
        if tree is not None:
            enough = count_statements(tree) >= STATEMENTS
            return Verdict(enough and count == LINES, enough, distinct)
        if not is_open(text):
            break
    return Verdict(False, False, distinct)


def judge_to_end(text: str) -> Verdict:
    """Judge a completion after which nothing follows: what is undecided has failed."""
    verdict = judge(text)
    if verdict is not None:
        return verdict
    filled = [line for line in text.split("\n") if line.strip()][:LINES]
    return Verdict(False, False, len(set(filled)) / len(filled) if filled else 0.0)


def boundaries(source: str) -> list[int]:
    """Return the line numbers (from 0) at which the top-level statements of a module begin."""
    tree = ast.parse(source)
    starts = []
    for node in tree.body:
        decorators = getattr(node, "decorator_list", [])
        starts.append(min([node.lineno, *(d.lineno for d in decorators)]) - 1)
    return starts


def prefix_of(source: str, encode: Callable[[str], Sized], choice: float) -> str | None:
    """Cut a prefix from a module.

    Args:
        source: text that `ast.parse` accepts.
        encode: text to tokens; only their number counts.
        choice: in [0, 1), which of the possible places.

    Returns: the prefix, or None where no place has ten lines behind it and a statement before it that fits.
    """
    lines = source.split("\n")
    starts = boundaries(source)
    places = [
        number
        for number in range(1, len(starts))
        if first_lines("\n".join(lines[starts[number] :])) is not None
        and len(encode("\n".join(lines[starts[number - 1] : starts[number]]))) <= PREFIX_TOKENS
    ]
    if not places:
        return None
    place = places[int(choice * len(places))]
    begin = place - 1
    while begin and len(encode("\n".join(lines[starts[begin - 1] : starts[place]]))) <= PREFIX_TOKENS:
        begin -= 1
    return "\n".join(lines[starts[begin] : starts[place]]) + "\n"


def prefixes(documents: Sequence[str], encode: Callable[[str], Sized], count: int, seed: int) -> list[str]:
    """Cut ``count`` different prefixes from the documents in turn, or fewer where they do not give as many."""
    rng = np.random.default_rng([seed, 7])
    usable = [text for text in documents if parse(text) is not None]
    found: dict[str, None] = {}
    for _ in range(4 * -(-count // max(1, len(usable)))):
        for text in usable:
            prefix = prefix_of(text, encode, float(rng.random()))
            if prefix is not None and len(found) < count:
                found[prefix] = None
    return list(found)


def complete(pyramid: pyramid_rt.Pyramid, prefix: str, method: str) -> tuple[str, Verdict]:
    """Continue a prefix greedily by one method until Python's verdict is clear; returns the text as well."""
    text = ""
    with pyramid.stream(prefix, method=method, max_new_tokens=LONGEST_COMPLETION, temperature=0.0) as pieces:
        for piece in pieces:
            text += piece
            if "\n" in piece:
                verdict = judge(text[: text.rindex("\n") + 1])
                if verdict is not None:
                    return text, verdict
    return text, judge_to_end(text)


def mean_verdict(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the mean of each field."""
    return {
        name: round(float(np.mean([getattr(verdict, name) for verdict in verdicts])), 4)
        for name in ("parses", "valid", "distinct")
    }


def completion_shares(
    pyramid: pyramid_rt.Pyramid, starts: Sequence[str], methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Judge one completion per prefix and method; returns the shares by method."""
    shares = {}
    for method in methods:
        shares[method] = mean_verdict([complete(pyramid, prefix, method)[1] for prefix in starts])
        print(method, shares[method], flush=True)
    return shares


def measure_completions(weights: Path, corpus: Corpus, count: int, seed: int) -> dict[str, Any]:
    """Measure the completions of all methods the pyramid can run, half of them from each held-out stream."""
    with pyramid_rt.load(weights, device="cpu") as pyramid:
        assert pyramid.tokenizer is not None
        library = texts(corpus.tokenizer, corpus.held_out)
        packages = texts(corpus.tokenizer, corpus.held_out_packages)
        encode = pyramid.tokenizer.encode
        starts = prefixes(library, encode, count // 2, seed) + prefixes(
            packages, encode, count - count // 2, seed
        )
        own = [judge_to_end(text) for text in true_continuations(library + packages, starts)]
        methods = [method for method in METHODS if method in pyramid.methods]
        return {
            "prefixes": len(starts),
            "held_out_text_itself": mean_verdict(own),
            "methods": completion_shares(pyramid, starts, methods),
        }


def true_continuations(documents: Sequence[str], starts: Sequence[str]) -> list[str]:
    """Return what follows each prefix in the file it was cut from: the yardstick for the shares."""
    found = []
    for prefix in starts:
        text = next(text for text in documents if prefix in text)
        found.append(text[text.index(prefix) + len(prefix) :])
    return found


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the completions of a pyramid and add them to its results and its card."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo_training.evaluation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--weights", type=Path, default=Path("pyramid_rt/demo"))
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where the corpus is kept")
    parser.add_argument("--results", type=Path, default=Path("bench/results/demo_training.json"))
    parser.add_argument("--prefixes", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.prefixes < 2:
        parser.error("--prefixes must be at least 2")
    corpus = load_corpus(options.work, options.seed)
    report = json.loads(options.results.read_text(encoding="utf-8"))
    report["completions"] = measure_completions(options.weights, corpus, options.prefixes, options.seed)
    options.results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    add_completions(report, options.weights)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
