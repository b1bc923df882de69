"""Our decoding beside transformers', on the same weights, in one process, taking turns.

    python -m bench.peers --device cpu --json bench/results/peers_cpu.json

Three comparisons, all greedy, end-of-sequence ignored so that everyone writes the same number of tokens:
`ar` against transformers' `generate` on SmolLM2-135M; on the demo pyramid the methods against our own `ar`; and
there `sd` against transformers' assisted generation with the same target and draft (the better of its default
schedule and our draft length). A ratio is withheld where the tokens it would compare are not the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pyramid_rt
from bench.harness import Timings, environment, side_by_side, write_json
from bench.smollm2 import cases, load_peer
from bench.smollm2_weights import fetch
from pyramid_rt.cli.command import DEMO_PROMPTS
from pyramid_rt.decoding.methods import LOSSLESS_METHODS, METHODS
from pyramid_rt.params import Options

Contender = Callable[[Sequence[int]], list[int]]
SMOLLM2_CASES = 4  # prompts of the SmolLM2 comparison, taken evenly from all


def ours(pyramid: pyramid_rt.Pyramid, method: str, new_tokens: int) -> Contender:
    """Our greedy decoding by one method, with the pyramid's own defaults for it."""
    request: Options = {
        "method": method,
        "max_new_tokens": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    return lambda ids: pyramid.generate(list(ids), **request).tokens


def theirs(model: Any, new_tokens: int, device: str, **options: Any) -> Contender:
    """transformers' greedy `generate`; `options` may name an assistant."""

    def run(ids: Sequence[int]) -> list[int]:
        inputs = torch.tensor([list(ids)], device=device)
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                do_sample=False,
                **options,
            )
        return [int(i) for i in out[0, inputs.shape[1] :]]

    return run


def compare_smollm2(directory: Path, device: str, dtype: str, repeats: int, new_tokens: int) -> Timings:
    """`ar` and transformers' generate on the SmolLM2 target."""
    model = load_peer(directory, getattr(torch, dtype)).to(device)
    with pyramid_rt.load(
        directory / "target", device=device, dtype=dtype, max_seq=2048, prefix_reuse=False
    ) as pyramid:
        assert pyramid.tokenizer is not None
        every = cases()
        prompts: list[Sequence[int]] = [
            pyramid.tokenizer.encode(case.prompt)
            if isinstance(case.prompt, str)
            else pyramid.tokenizer.encode_chat(case.prompt)
            for case in every[:: len(every) // SMOLLM2_CASES]
        ]
        contenders = {
            "ours": ours(pyramid, "ar", new_tokens),
            "transformers": theirs(model, new_tokens, device),
        }
        return side_by_side(contenders, prompts, repeats)


def compare_demo(device: str, dtype: str, repeats: int, new_tokens: int) -> Timings:
    """All methods on the demo pyramid, and transformers plain and assisted."""
    directory = pyramid_rt.demo_weights()
    target = load_peer(directory, getattr(torch, dtype)).to(device)
    draft = load_peer(directory, getattr(torch, dtype), tier="draft").to(device)
    with pyramid_rt.load(directory, device=device, dtype=dtype, prefix_reuse=False) as pyramid:
        assert pyramid.tokenizer is not None
        prompts: list[Sequence[int]] = [pyramid.tokenizer.encode(prompt) for prompt in DEMO_PROMPTS]
        contenders = {method: ours(pyramid, method, new_tokens) for method in METHODS}
        contenders["transformers"] = theirs(target, new_tokens, device)
        contenders["transformers assisted"] = theirs(target, new_tokens, device, assistant_model=draft)
        fixed = load_peer(directory, getattr(torch, dtype), tier="draft").to(device)
        fixed.generation_config.num_assistant_tokens = pyramid.defaults.get("draft_length", 4)
        fixed.generation_config.num_assistant_tokens_schedule = "constant"
        fixed.generation_config.assistant_confidence_threshold = 0.0
        contenders["transformers assisted, our length"] = theirs(
            target, new_tokens, device, assistant_model=fixed
        )
        return side_by_side(contenders, prompts, repeats)


def ratios(smollm2: Timings | None, demo: Timings) -> dict[str, list[float] | None]:
    """Minimum, median, maximum of each ratio; None where the tokens differ."""

    def guarded(timings: Timings, name: str, baseline: str) -> list[float] | None:
        return timings.ratio(name, baseline) if timings.same_tokens(name, baseline) else None

    lossless = [method for method in LOSSLESS_METHODS if method != "ar"]
    best = max(lossless, key=demo.median)
    assisted = max((name for name in demo.rates if name.startswith("transformers assisted")), key=demo.median)
    found = {
        "demo: best lossless method / ar": guarded(demo, best, "ar"),
        "demo: sd / transformers assisted": guarded(demo, "sd", assisted),
        "demo: ar / transformers generate": guarded(demo, "ar", "transformers"),
    }
    if smollm2 is not None:
        found["SmolLM2: ar / transformers generate"] = guarded(smollm2, "ours", "transformers")
    return found


def show(console: Console, title: str, timings: Timings, baseline: str) -> None:
    """One comparison as a table."""
    table = Table(title=title, title_justify="left")
    for heading in ("contender", "tokens/s", f"x {baseline}", "(min-max)", f"tokens as {baseline}"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for name in timings.rates:
        low, middle, high = timings.ratio(name, baseline)
        same = "same" if timings.same_tokens(name, baseline) else "differ"
        table.add_row(name, f"{timings.median(name):.1f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}", same)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons, print them, and write them to a file where asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--smollm2", type=Path, default=Path("weights/smollm2"), help="fetched when missing")
    parser.add_argument("--skip-smollm2", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128, help="per prompt; half of it for SmolLM2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.new_tokens < 2:
        parser.error("--repeats must be at least 1 and --new-tokens at least 2")
    console = Console()
    common = (options.device, options.dtype, options.repeats)
    smollm2 = None
    if not options.skip_smollm2:
        if not (options.smollm2 / "pyramid.json").exists():
            fetch(options.smollm2, None, "float32")
        smollm2 = compare_smollm2(options.smollm2, *common, options.new_tokens // 2)
        show(console, "SmolLM2-135M", smollm2, "transformers")
    demo = compare_demo(*common, options.new_tokens)
    show(console, "demo pyramid", demo, "ar")
    found = ratios(smollm2, demo)
    for name, values in found.items():
        console.print(f"{name}: " + ("withheld, tokens differ" if values is None else f"{values[1]:.2f}"))
    if options.json:
        content = {
            "what": "greedy decoding, tokens per second; ratios are [min, median, max] over the repeats",
            **environment(options.device),
            "dtype": options.dtype,
            "repeats": options.repeats,
            "new_tokens": {"demo": options.new_tokens, "smollm2": options.new_tokens // 2},
            "rates": {"demo": demo.rates, **({"smollm2": smollm2.rates} if smollm2 else {})},
            "ratios": found,
        }
        write_json(options.json, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
