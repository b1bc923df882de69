"""Train the demo pyramid: a target with cross entropy, then a qualifier and a draft cut and distilled from it.

    python -m bench.demo_training

fetches the packages of the corpus, trains, exports and measures. The stages share one work folder, save
their state every few minutes and go on from there when the same command is run again; `--tokens` with
larger numbers extends a run. Lengths are in tokens and everything random is drawn from the seed and
the step, so the speed of the machine does not matter; the number of workers does, by rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.demo_training.card import TIERS, write_card
from bench.demo_training.corpus import EOS, VOCAB_SIZE, Corpus, Tokens, load_corpus
from bench.demo_training.evaluation import measure_completions, measure_held_out, measure_rows
from bench.demo_training.training import (
    TOKENS_PER_STEP,
    WINDOW,
    Stage,
    Stopped,
    Team,
    draw_windows,
    run_stage,
    training_windows,
)

OWN_WINDOW = 256
OWN_BATCH = 96
OWN_SHARE = 0.5  # of the students' batches, text that the target wrote
HELD_OUT_PREFIXES = 96
PACKAGE_TOKENS = 100_000  # of the packages' held-out stream, for loss and agreement

# For `pyramid.json` until `pyramid-rt tune` has found better ones.
DEFAULTS = {"method": "sd", "draft_length": 4, "qualifier_length": 6, "qualifier_threshold": 0.1}
HEAD_DIM = 64
SHAPES = {
    "target": {"hidden": 384, "layers": 6, "heads": 6, "kv_heads": 2, "intermediate": 1024},
    "qualifier": {"hidden": 384, "layers": 3, "heads": 6, "kv_heads": 2, "intermediate": 1024},
    "draft": {"hidden": 384, "layers": 2, "heads": 3, "kv_heads": 1, "intermediate": 192},
}
# The qualifier begins as the target without its other layers. Of all choices of three these are the nearest to
# the target before any training: 0.49 nats, and the same best token in half of all places.
KEPT_LAYERS = (0, 2, 5)


def build_model(tier: str, seed: int) -> LlamaForCausalLM:
    """Build one tier with fresh weights; projections that write to the residual stream start smaller."""
    shape = SHAPES[tier]
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=HEAD_DIM,
        intermediate_size=shape["intermediate"],
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # training on a CPU is a third faster than with the fused one
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1.0 / math.sqrt(2 * shape["layers"]))
    return model


def train_target(corpus: Corpus, team: Team, args: argparse.Namespace) -> Stage:
    """Train the target with cross entropy on the corpus."""
    model = build_model("target", args.seed)
    stage = Stage("target", args.work, args.tokens["target"], team, {"target": model})

    def step_loss(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return {"target": F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())}

    compiled = torch.compile(step_loss, dynamic=False) if args.compile else step_loss
    run_stage(stage, compiled, training_windows(corpus, args.seed), corpus.held_out)
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


def write_own_text(
    target: LlamaForCausalLM, step: int, corpus: Corpus, team: Team, args: argparse.Namespace
) -> Tokens:
    """Let the target of this step continue training prompts and fragments, greedily and at some temperatures.

    Returns rows of 257 tokens, uint16, at least ``args.tokens["own"]`` of them in all, in `own-STEP.npy`.
    """
    path: Path = args.work / f"own-{step}.npy"
    batches = math.ceil(args.tokens["own"] / (OWN_BATCH * OWN_WINDOW * team.size))

    def work() -> None:
        parts: list[Tokens] = []
        for batch in range(batches):
            size = (64, 3, 24, 128)[batch % 4]
            prompts = draw_windows(corpus.train, OWN_BATCH, size - 1, args.seed + 100 + team.rank, batch)
            heat = torch.tensor([0.0, 0.0, 0.5, 0.8, 1.0, 0.0]).repeat(OWN_BATCH // 6)
            seed = args.seed + 1000 * batch + team.rank
            parts.append(generate(target, prompts, OWN_WINDOW + 1, heat, seed).numpy().astype(np.uint16))
            print(f"own text, worker {team.rank}: batch {batch + 1} of {batches}", flush=True)
        np.save(path.with_suffix(f".{team.rank}.npy"), np.concatenate(parts))

    if not path.exists():
        team.run(work)
        shares = [path.with_suffix(f".{rank}.npy") for rank in range(team.size)]
        np.save(path, np.concatenate([np.load(share) for share in shares]))
        for share in shares:
            share.unlink()
    rows: Tokens = np.load(path)
    return rows


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean forward KL divergence of the student from the teacher, in nats per token."""
    own = F.log_softmax(student.float(), dim=-1)
    goal = F.log_softmax(teacher.float(), dim=-1)
    return (goal.exp() * (goal - own)).sum(-1).mean()


def build_qualifier(target: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Build the qualifier from the target's embedding and the layers it keeps."""
    qualifier = build_model("qualifier", seed)
    state = outside_layers(target)
    for number, kept in enumerate(KEPT_LAYERS):
        source = target.model.layers[kept].state_dict()
        state |= {f"model.layers.{number}.{name}": weight for name, weight in source.items()}
    qualifier.load_state_dict(state)
    return qualifier


def build_draft(target: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Build the draft from the target's embedding and the two parts of layers by which it copies.

    A part is one KV head with its query heads, and of the layer's MLP the channels with the largest weights.
    """
    draft = build_model("draft", seed)
    state = outside_layers(target)
    for number, (layer, group) in enumerate(copying_parts(target, seed)):
        part = part_of_layer(target.model.layers[layer].state_dict(), group)
        state |= {f"model.layers.{number}.{name}": weight for name, weight in part.items()}
    draft.load_state_dict(state)
    return draft


def outside_layers(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return a model's weights that belong to no layer."""
    return {name: weight for name, weight in model.state_dict().items() if ".layers." not in name}


def part_of_layer(layer: dict[str, torch.Tensor], group: int) -> dict[str, torch.Tensor]:
    """Return the weights of one KV head, of its query heads, and of the MLP channels that weigh most."""
    shape = SHAPES["draft"]
    queries = slice(group * shape["heads"] * HEAD_DIM, (group + 1) * shape["heads"] * HEAD_DIM)
    keys = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
    gate, up, down = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    weights = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    channels = weights.topk(shape["intermediate"]).indices.sort().values
    return {
        **{name: weight for name, weight in layer.items() if "norm" in name},
        "self_attn.q_proj.weight": layer["self_attn.q_proj.weight"][queries],
        "self_attn.k_proj.weight": layer["self_attn.k_proj.weight"][keys],
        "self_attn.v_proj.weight": layer["self_attn.v_proj.weight"][keys],
        "self_attn.o_proj.weight": layer["self_attn.o_proj.weight"][:, queries],
        "mlp.gate_proj.weight": gate[channels],
        "mlp.up_proj.weight": up[channels],
        "mlp.down_proj.weight": down[:, channels],
    }


@torch.no_grad()
def copying_parts(target: LlamaForCausalLM, seed: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Find where the target looks up what followed a token before, on random tokens that repeat.

    That takes a head that looks at the token before, and in a later layer one that looks behind the last
    place where the current token stood (induction heads, Olsson et al. 2022). Returns (layer, KV head) of each:
    the pair with the largest product of the two shares of attention.
    """
    length = 96
    noise = torch.Generator().manual_seed(seed)
    once = torch.randint(1, VOCAB_SIZE, (8, length), generator=noise)
    layers = target(input_ids=once.repeat(1, 2), output_attentions=True, use_cache=False).attentions
    before, copying = [], []
    for attention in layers:
        mean = attention.float().mean(0)  # [heads, queries, keys]
        grouped = (SHAPES["target"]["kv_heads"], -1)
        before.append(mean.diagonal(-1, 1, 2).mean(-1).view(grouped).amax(-1))
        copying.append(mean.diagonal(1 - length, 1, 2).mean(-1).view(grouped).amax(-1))
    parts = [(layer, group) for layer in range(len(layers)) for group in range(len(before[0]))]
    pairs = [(first, second) for first in parts for second in parts if first[0] < second[0]]
    return max(pairs, key=lambda p: float(before[p[0][0]][p[0][1]] * copying[p[1][0]][p[1][1]]))


def train_student(
    tier: str,
    model: LlamaForCausalLM,
    target: LlamaForCausalLM,
    corpus: Corpus,
    own_text: Tokens,
    team: Team,
    args: argparse.Namespace,
) -> Stage:
    """Distil the qualifier or the draft from the target.

    Every other batch is text of the target itself, which is what the students see at run time.
    """
    stage = Stage(tier, args.work, args.tokens[tier], team, {tier: model})
    corpus_rows = training_windows(corpus, args.seed + 2, longest=WINDOW)

    def windows(step: int) -> torch.Tensor:
        rng = np.random.default_rng([args.seed, step, 3])
        if rng.random() >= OWN_SHARE:
            return corpus_rows(step)
        chosen = rng.integers(0, len(own_text), TOKENS_PER_STEP // OWN_WINDOW)
        return torch.from_numpy(own_text[chosen].astype(np.int64))

    def step_loss(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = rows[:, :-1]
        with torch.no_grad():
            goal = target(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        return {tier: divergence(logits, goal)}

    compiled = torch.compile(step_loss, dynamic=False) if args.compile else step_loss
    run_stage(stage, compiled, windows, corpus.held_out)
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
    plan = ",".join(f"{name}={count / 1e6:g}" for name, count in args.tokens.items())
    facts = corpus.facts
    packages = corpus.held_out_packages[:PACKAGE_TOKENS]
    packages_bytes = len(corpus.tokenizer.decode(packages.tolist()).encode())
    return {
        "command": f"python -m bench.demo_training --tokens {plan} --seed {args.seed}",
        "hardware": args.hardware,
        "python": platform.python_version(),
        "stages": {
            name: {
                "steps": s.step,
                "tokens": s.tokens,
                "minutes": round(s.spent / 60, 1),
                "held_out": s.history,
            }
            for name, s in stages.items()
        },
        "corpus": facts,
        "tiers": sizes,
        "held_out": measure_held_out(models, corpus.held_out, facts["held_out_bytes"], WINDOW),
        "held_out_packages": measure_held_out(models, packages, packages_bytes, WINDOW),
        "own_greedy": own_text_agreement(models, corpus, 0.0, args.seed),
        "own_sampled": own_text_agreement(models, corpus, 0.8, args.seed),
    }


def write_results(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the measurements, the model card and the list of tiers."""
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_card(report, args.out)


def write_list(out: Path) -> None:
    """Write the list of tiers with the defaults, unless a search has written a better one."""
    path = out / "pyramid.json"
    if not path.exists():
        content = {**{tier: tier for tier in reversed(TIERS)}, "defaults": DEFAULTS}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_amounts(text: str) -> dict[str, int]:
    """Parse "target=14,own=1,qualifier=7.7,draft=14", millions of tokens, into tokens."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name: round(float(value) * 1e6) for name, _, value in pairs}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo_training", description="Train, export and measure the demo pyramid."
    )
    parser.add_argument("--out", type=Path, default=Path("pyramid_rt/demo"), help="folder of the three tiers")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=Path("bench/results/demo_training.json"))
    parser.add_argument(
        "--tokens",
        type=parse_amounts,
        default="target=14,own=1,qualifier=7.7,draft=14",
        help="millions of tokens: of its training for each tier, and of the target's own text (default: %(default)s)",
    )
    parser.add_argument("--only", choices=("target",), help="end after this stage")
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
    print({name: value for name, value in corpus.facts.items() if name != "packages"}, flush=True)
    team = Team(args.workers)
    try:
        first = train_target(corpus, team, args)
        if args.only == "target":
            return
        export("target", first.models["target"], corpus, args.out)
        teacher = LlamaForCausalLM.from_pretrained(
            args.out / "target", dtype=torch.bfloat16, attn_implementation="eager"
        )
        teacher.requires_grad_(False).share_memory()
        own_text = write_own_text(teacher, first.step, corpus, team, args)
        stages = {"target": first}
        for tier, build in (("qualifier", build_qualifier), ("draft", build_draft)):
            model = build(first.models["target"], args.seed)
            stages[tier] = train_student(tier, model, teacher, corpus, own_text, team, args)
    except Stopped as stopped:
        raise SystemExit(str(stopped)) from None
    for tier in ("qualifier", "draft"):
        export(tier, stages[tier].models[tier], corpus, args.out)
    write_list(args.out)
    torch.set_num_threads(args.workers)
    report = measure(corpus, stages, args)
    write_results(report, args)
    report["completions"] = measure_completions(args.out, corpus, HELD_OUT_PREFIXES, args.seed)
    write_results(report, args)
    print(
        json.dumps({k: report[k] for k in ("held_out", "own_greedy", "own_sampled", "completions")}, indent=1)
    )
