"""The model card of the demo pyramid, written from its measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TIERS = ("target", "qualifier", "draft")
PAIRS = (("draft", "target"), ("qualifier", "target"), ("draft", "qualifier"))

METHOD_NOTES = {
    "ar": "the target alone",
    "sd": "lossless",
    "psd": "lossless",
    "fsd": "lossy",
    "psd_a": "lossy",
    "psd_f": "lossy",
}


def write_card(report: dict[str, Any], folder: Path) -> None:
    """Write the card of a report into the folder of the pyramid."""
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")


def add_completions(report: dict[str, Any], folder: Path) -> None:
    """Put the part on completions into a card that is there, in the place of an earlier one."""
    path = folder / "README.md"
    head, mark, rest = path.read_text(encoding="utf-8").partition("## Completions\n")
    if mark:
        rest = rest[rest.index("\n## ") + 1 :]
    else:
        head, mark, rest = head.partition("## Data and training\n")
        if not mark:
            raise ValueError(f"{path}: expected a part '## Data and training' to put the completions before")
        rest = mark + rest
    path.write_text(head + "\n".join([*completions_part(report), ""]) + rest, encoding="utf-8")


def model_card(report: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    parts = (tiers_part, agreement_part, completions_part, data_part, licences_part, limits_part)
    return "\n".join(line for part in parts for line in part(report)) + "\n"


def tiers_part(report: dict[str, Any]) -> list[str]:
    """The three models: sizes, files, losses."""
    held = report["held_out"]
    lines = [
        "# The demo pyramid",
        "",
        "Three small Llama models of one family for `pyramid_rt`: they make the runtime usable and testable",
        "without a download. They continue Python source code. They are a toy: their text looks like code",
        "and does nothing useful. Do not use it for anything real.",
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
    return [
        *lines,
        "",
        "Head size 64, tied embeddings, RMSNorm epsilon 1e-5, RoPE base 10000, 1024 positions, bfloat16.",
        "The tokenizer is a byte-level BPE of 4096 tokens with one special token, `<|endoftext|>` (id 0),",
        "which ends a document; no token is added in front of a text.",
        "",
    ]


def agreement_part(report: dict[str, Any]) -> list[str]:
    """The share of positions at which the tiers have the same most likely token."""
    held, foreign = report["held_out"], report["held_out_packages"]
    lines = [
        "## Agreement",
        "",
        "The share of places at which two tiers have the same most likely token, given the same text before",
        "it: on held-out files of the standard library and of the packages, and on text that the target",
        "wrote. The last column is the chance that speculative sampling at temperature 1 keeps a token (the",
        "mean of the sum of min(p, q)) on held-out files of the library.",
        "",
        "| pair | library | packages | target, greedy | target, temperature 0.8 | kept, library |",
        "|---|---|---|---|---|---|",
    ]
    for pair in map("/".join, PAIRS):
        lines.append(
            f"| {pair} | {held['agreement'][pair]:.3f} | {foreign['agreement'][pair]:.3f} "
            f"| {report['own_greedy'][pair]:.3f} | {report['own_sampled'][pair]:.3f} "
            f"| {held['overlap'][pair]:.3f} |"
        )
    nats = ", ".join(f"{tier} {foreign['nats_per_token'][tier]:.3f}" for tier in TIERS)
    return [*lines, "", f"Nats per token on the held-out files of the packages: {nats}.", ""]


def completions_part(report: dict[str, Any]) -> list[str]:
    """The share of texts by each method that is Python; nothing where it was not measured."""
    if "completions" not in report:
        return []
    found = report["completions"]
    lines = [
        "## Completions",
        "",
        f"{found['prefixes']} pieces of held-out files, each ending where a top-level statement begins, were",
        "continued greedily by ten lines that are not blank, and by up to 20 more to finish a statement that",
        "the tenth leaves open. *Parses*: `ast.parse` accepts the ten lines as they stand. *Valid*: it accepts",
        "them with those that finish the statement. Fewer than ten lines, or fewer than two statements, fail",
        "both. *Distinct*: the share of lines that are not repetitions. `bench/demo_training/evaluation.py` has",
        "the rules.",
        "",
        "| method | | parses | valid | distinct |",
        "|---|---|---|---|---|",
    ]
    rows = [("the files themselves", "", found["held_out_text_itself"])]
    rows += [(f"`{name}`", METHOD_NOTES[name], shares) for name, shares in found["methods"].items()]
    for name, note, shares in rows:
        lines.append(
            f"| {name} | {note} | {shares['parses']:.2f} | {shares['valid']:.2f} | {shares['distinct']:.2f} |"
        )
    return [*lines, ""]


def data_part(report: dict[str, Any]) -> list[str]:
    """The training: texts, tokens, course."""
    corpus = report["corpus"]
    packages = corpus["packages"]
    files, size, tokens = (sum(p[key] for p in packages) for key in ("files", "bytes", "tokens"))
    seen = "; ".join(
        f"{name} {stage['steps']} steps, {stage['tokens'] / 1e6:.1f} M tokens, {stage['minutes']:.0f} minutes"
        for name, stage in report["stages"].items()
    )
    return [
        "## Data and training",
        "",
        f"The source of the standard library of Python {report['python']} without its tests, character maps",
        f"and help topics ({corpus['train_files']} files, {corpus['train_bytes'] / 1e6:.1f} MB, "
        f"{corpus['train_tokens'] / 1e6:.1f} M tokens), and",
        f"{len(packages)} packages under permissive licences ({files} files, {size / 1e6:.0f} MB, "
        f"{tokens / 1e6:.1f} M tokens) without tests,",
        "vendored copies, generated files and duplicates; one window in five is from the library. Held out by",
        f"a hash of their path: {corpus['held_out_files']} files of the library "
        f"({corpus['held_out_tokens']} tokens; a quarter of them is",
        f"`locale.py`, mostly a table of names) and {corpus['held_out_package_files']} of the packages "
        f"({corpus['held_out_package_tokens']} tokens); files of",
        "packages that share many lines with them are left out of the training. All figures are from the",
        "weights after rounding to bfloat16.",
        "",
        "The target was trained with cross entropy. The qualifier began as the target without half of its",
        "layers, the draft with the target's embedding and the two parts of its layers by which it copies what",
        "stood before (one KV head each, and some of the MLP's channels). Both were distilled from the target's",
        "distributions (forward KL), half of it on text that the target wrote. Seen:",
        f"{seen}.",
        f"Hardware: {report['hardware']}.",
        *report.get("remarks", []),
        "",
        f"    {report['command']}",
        "",
    ]


def licences_part(report: dict[str, Any]) -> list[str]:
    """Licences of the training text."""
    lines = [
        "## Licences",
        "",
        "The weights and tokenizers: Apache-2.0, like the project. The text they were trained on is not part",
        "of this folder. The standard library is licensed under the PSF License Version 2 (PSF-2.0), the",
        "packages as follows.",
        "",
        "| package | version | licence | files | M tokens |",
        "|---|---|---|---|---|",
    ]
    for package in report["corpus"]["packages"]:
        lines.append(
            f"| {package['name']} | {package['version']} | {package['licence']} | {package['files']} "
            f"| {package['tokens'] / 1e6:.2f} |"
        )
    return [*lines, ""]


def limits_part(report: dict[str, Any]) -> list[str]:
    """Limits of the models."""
    return [
        "## Limits",
        "",
        f"Trained on {report['stages']['target']['tokens'] / 1e6:.0f} M tokens only: greedy text repeats itself, "
        "names and calls are made up, and passages",
        "may come out as they stand in the library or a package. Contexts beyond 1024 tokens were never seen.",
        "Agreement between the tiers is that of this narrow domain and says little about others.",
    ]
