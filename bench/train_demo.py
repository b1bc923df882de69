"""Train the demo pyramid: a target with cross entropy, then a qualifier and a draft distilled from it.

The stages share one work folder, save their state every two minutes and go on from there when the
same command is run again, or one with more minutes. Their length is given in minutes of wall time, so
the weights depend on the speed of the machine; everything random is drawn from the seed and the step.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.demo_corpus import (
    EOS,
    TIERS,
    VOCAB_SIZE,
    Corpus,
    Tokens,
    load_corpus,
    measure_held_out,
    measure_rows,
    model_card,
)
from bench.training import (
    TOKENS_PER_STEP,
    WINDOW,
    Stage,
    Team,
    draw_windows,
    run_stage,
    training_windows,
)

# For `pyramid.json`: the fastest of a few dozen combinations tried on two CPU cores. The pyramid is too flat for
# its qualifier to pay there, so two tiers are the default; the other values serve those who ask for three.
DEFAULTS = {"method": "sd", "draft_length": 3, "qualifier_length": 4, "qualifier_threshold": 0.1}
SHAPES = {
    "target": {"hidden": 384, "layers": 6, "heads": 6, "kv_heads": 2, "intermediate": 1024},
    "qualifier": {"hidden": 192, "layers": 4, "heads": 3, "kv_heads": 1, "intermediate": 512},
    "draft": {"hidden": 128, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 384},
}


def build_model(tier: str, seed: int) -> LlamaForCausalLM:
    """Build one tier with fresh weights; projections that write to the residual stream start smaller."""
    shape = SHAPES[tier]
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=64,
        intermediate_size=shape["intermediate"],
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1.0 / math.sqrt(2 * shape["layers"]))
    return model


def train_target(corpus: Corpus, team: Team, args: argparse.Namespace) -> Stage:
    """Train the target with cross entropy on the corpus."""
    model = build_model("target", args.seed)
    stage = Stage("target", args.work, args.minutes["target"] * 60, team, {"target": model})

    def step_loss(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return {"target": F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())}

    compiled = torch.compile(step_loss, dynamic=False) if args.compile else step_loss
    run_stage(stage, compiled, training_windows(corpus.train, args.seed), corpus.held_out)
    return stage


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, prompts: torch.Tensor, length: int, heat: torch.Tensor, seed: int
) -> torch.Tensor:
    """Extend prompts of equal length to ``length`` tokens; rows whose temperature is 0 are greedy."""
    rows, fed, cache = prompts, prompts, DynamicCache(config=model.config)
    noise = torch.Generator().manual_seed(seed)
    while rows.shape[1] < length:
        output = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        gumbel = -torch.log(torch.empty_like(logits).exponential_(generator=noise))
        fed = torch.argmax(logits + heat[:, None] * gumbel, dim=-1, keepdim=True)
        rows = torch.cat([rows, fed], dim=1)
    return rows


def sample_target(
    target: LlamaForCausalLM, step: int, corpus: Corpus, team: Team, args: argparse.Namespace
) -> Tokens:
    """Let the target of this step continue training prompts and fragments for some minutes."""
    path: Path = args.work / f"selfgen-{step}.npy"

    def work() -> None:
        end = time.monotonic() + args.minutes["selfgen"] * 60
        parts: list[Tokens] = []
        while not parts or time.monotonic() < end:
            size = 64 if len(parts) % 3 else 3
            seed = args.seed + 100 + team.rank
            prompts = draw_windows(corpus.train, 32, size - 1, seed, len(parts))
            heat = torch.tensor([0.0, 0.6, 0.8, 1.0]).repeat(8)
            parts.append(generate(target, prompts, WINDOW + 1, heat, seed).numpy().astype(np.uint16))
            print(f"selfgen worker {team.rank}: {len(parts) * 32} rows", flush=True)
        np.save(path.with_suffix(f".{team.rank}.npy"), np.concatenate(parts))

    if not path.exists():
        team.run(work)
        np.save(path, np.concatenate([np.load(path.with_suffix(f".{r}.npy")) for r in range(team.size)]))
    rows: Tokens = np.load(path)
    return rows


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean forward KL divergence of the student from the teacher, in nats per token."""
    own = F.log_softmax(student.float(), dim=-1)
    goal = F.log_softmax(teacher.float(), dim=-1)
    return (goal.exp() * (goal - own)).sum(-1).mean()


def train_students(
    target: LlamaForCausalLM, corpus: Corpus, own_text: Tokens, team: Team, args: argparse.Namespace
) -> Stage:
    """Distil the qualifier and the draft side by side, so that both share each pass of the target.

    One batch in four is text of the target itself, which is what the students see at run time.
    """
    models = {tier: build_model(tier, args.seed) for tier in ("qualifier", "draft")}
    stage = Stage("students", args.work, args.minutes["students"] * 60, team, models)
    distance = torch.compile(divergence, dynamic=False) if args.compile else divergence
    corpus_rows = training_windows(corpus.train, args.seed + 2)

    def windows(step: int) -> torch.Tensor:
        if step % 4 != 3:
            return corpus_rows(step)
        chosen = np.random.default_rng([args.seed, step]).integers(
            0, len(own_text), TOKENS_PER_STEP // WINDOW
        )
        return torch.from_numpy(own_text[chosen].astype(np.int64))

    def step_loss(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = rows[:, :-1]
        with torch.no_grad():
            goal = target(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        losses = {}
        for tier, model in models.items():
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            losses[tier] = distance(logits, goal)
        return losses

    run_stage(stage, step_loss, windows, corpus.held_out)
    return stage


def export(tier: str, model: LlamaForCausalLM, corpus: Corpus, out: Path) -> None:
    """Write one tier in bfloat16 the way Hugging Face saves a Llama model with its tokenizer."""
    folder = out / tier
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows as well
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)


def own_text_agreement(models: dict[str, Any], corpus: Corpus, heat: float, seed: int) -> dict[str, float]:
    """Let the target continue 24 held-out prompts by 192 tokens and compare the tiers on its text."""
    prompts = draw_windows(corpus.held_out, 24, 63, seed, 0)
    writer = copy.deepcopy(models["target"]).bfloat16()
    rows = generate(writer, prompts, 256, torch.full((24,), heat), seed)
    return measure_rows(models, rows, 64)


def measure(corpus: Corpus, stages: dict[str, Stage], args: argparse.Namespace) -> dict[str, Any]:
    """Measure the exported files, read back as rounded to bfloat16, in float32 arithmetic."""
    models = {tier: LlamaForCausalLM.from_pretrained(args.out / tier, dtype=torch.float32) for tier in TIERS}
    sizes = {
        tier: {
            **SHAPES[tier],
            "parameters": sum(p.numel() for p in model.parameters()),
            "file_bytes": (args.out / tier / "model.safetensors").stat().st_size,
        }
        for tier, model in models.items()
    }
    plan = ",".join(f"{name}={minutes:g}" for name, minutes in args.minutes.items())
    return {
        "command": f"python -m bench.train_demo --minutes {plan} --seed {args.seed}",
        "hardware": args.hardware,
        "python": platform.python_version(),
        "minutes": args.minutes,
        "stages": {
            name: {
                "steps": s.step,
                "tokens": s.tokens,
                "minutes": round(s.spent / 60, 1),
                "held_out": s.history,
            }
            for name, s in stages.items()
        },
        "corpus": corpus.facts,
        "tiers": sizes,
        "held_out": measure_held_out(models, corpus.held_out, corpus.facts["held_out_bytes"], WINDOW),
        "own_greedy": own_text_agreement(models, corpus, 0.0, args.seed),
        "own_sampled": own_text_agreement(models, corpus, 0.8, args.seed),
    }


def write_results(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the measurements, the model card and the list of tiers."""
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(model_card(report), encoding="utf-8")
    content = {**{tier: tier for tier in reversed(TIERS)}, "defaults": DEFAULTS}
    (args.out / "pyramid.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_minutes(text: str) -> dict[str, float]:
    """Parse "target=36,selfgen=2,students=13"."""
    return {name: float(value) for name, _, value in (part.partition("=") for part in text.split(","))}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_demo", description="Train, export and measure the demo pyramid."
    )
    parser.add_argument("--out", type=Path, default=Path("pyramid_rt/demo"), help="folder of the three tiers")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=Path("bench/results/demo_training.json"))
    parser.add_argument(
        "--minutes",
        type=parse_minutes,
        default="target=36,selfgen=2,students=13",
        help="wall time per stage (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hardware", default="2 CPU cores (AMD EPYC)", help="how the card names the machine")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do without torch.compile")
    return parser.parse_args(argv)


def main() -> None:
    """Run all stages that are not complete yet, then export and measure."""
    args = parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers across a fork
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(args.work, args.seed)
    print(corpus.facts, flush=True)
    team = Team(args.workers)
    first = train_target(corpus, team, args)
    export("target", first.models["target"], corpus, args.out)
    teacher = LlamaForCausalLM.from_pretrained(args.out / "target", dtype=torch.bfloat16)
    teacher.requires_grad_(False).share_memory()
    own_text = sample_target(teacher, first.step, corpus, team, args)
    second = train_students(teacher, corpus, own_text, team, args)
    for tier, model in second.models.items():
        export(tier, model, corpus, args.out)
    report = measure(corpus, {"target": first, "students": second}, args)
    write_results(report, args)
    print(json.dumps({key: report[key] for key in ("held_out", "own_greedy", "own_sampled")}, indent=1))


if __name__ == "__main__":
    main()
