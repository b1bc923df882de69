"""Train the demo pyramid: a target with cross entropy, then a qualifier and a draft distilled from it.

The stages share one work folder, save their state every two minutes and go on from there when the
same command is run again, or one with more minutes. Their length is given in minutes of wall time, so
the weights depend on the speed of the machine; everything random is drawn from the seed and the step.

Every worker process computes on one thread with its share of each batch; weights and gradients are
in shared memory. This loses less to other load on the machine than threads that wait for each other
in every operation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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

WINDOW = 512
TOKENS_PER_STEP = 4096
SAVE_SECONDS = 120.0
LOG_STEPS = 20
PEAK_LR = 3e-3
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


class Team:
    """Worker processes that step together; worker 0 is the process that was started by the user."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = 0
        self.context = multiprocessing.get_context("fork")
        self.barrier = self.context.Barrier(size)
        self.control = torch.zeros(2, dtype=torch.float64).share_memory_()

    def wait(self) -> None:
        """Wait until all workers are here; a worker that lost its team stops after ten minutes."""
        self.barrier.wait(timeout=600)

    def run(self, work: Callable[[], None]) -> None:
        """Run ``work`` in all workers and return when all are done."""

        def enter(rank: int) -> None:
            self.rank = rank
            work()

        others = [self.context.Process(target=enter, args=(r,), daemon=True) for r in range(1, self.size)]
        for process in others:
            process.start()
        work()
        for process in others:
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"a worker ended with exit code {process.exitcode}")


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the tied embedding and the norms.

    Each worker updates every n-th weight, with the mean of the gradients of all workers.
    """

    def __init__(self, model: LlamaForCausalLM, team: Team) -> None:
        self.team = team
        self.weights = list(model.parameters())
        model.share_memory()
        self.gradients = [
            [torch.zeros_like(p).share_memory_() for p in self.weights] for _ in range(team.size)
        ]
        self.norms = torch.zeros(team.size).share_memory_()
        self.matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        self.rest = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]

    def join(self) -> None:
        """Set up this worker's own part; called once in every worker."""
        rank, size = self.team.rank, self.team.size
        for weight, gradient in zip(self.weights, self.gradients[rank], strict=True):
            weight.grad = gradient
        mine = self.matrices[rank::size] + self.rest[rank::size]
        self.mine = [i for i, p in enumerate(self.weights) if any(p is own for own in mine)]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                self.matrices[rank::size], lr=PEAK_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                [{"params": [p], "weight_decay": 0.1 if p.ndim == 2 else 0.0} for p in self.rest[rank::size]],
                lr=PEAK_LR,
                betas=(0.9, 0.95),
            ),
        ]

    def step(self, progress: float) -> None:
        """Clip the mean gradient and update with the learning rate of this share of the planned time."""
        rank, size = self.team.rank, self.team.size
        own = self.gradients[rank]
        self.team.wait()
        for index in self.mine:
            for other in range(size):
                if other != rank:
                    own[index].add_(self.gradients[other][index])
            own[index].div_(size)
        self.norms[rank] = sum(float(own[index].square().sum()) for index in self.mine)
        self.team.wait()
        scale = min(1.0, 1.0 / (math.sqrt(float(self.norms.sum())) + 1e-6))
        for index in self.mine:
            own[index].mul_(scale)
        warm = min(1.0, (progress + 1e-3) / 0.02)
        rate = PEAK_LR * warm * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        for gradient in own:
            gradient.zero_()
        self.team.wait()

    def state(self) -> list[dict[str, Any]]:
        """Return the states of this worker's part for a checkpoint."""
        return [part.state_dict() for part in self.parts]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Restore what ``state`` returned."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


@dataclass
class Stage:
    """Position of one training stage: steps, wall seconds and tokens so far, kept across restarts."""

    name: str
    work: Path
    seconds: float
    team: Team
    models: dict[str, LlamaForCausalLM]
    step: int = 0
    spent: float = 0.0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Load an earlier checkpoint if there is one, then move the weights to shared memory."""
        path = self.work / f"{self.name}.pt"
        if path.exists():
            state = torch.load(path, weights_only=False)
            for tier, model in self.models.items():
                model.load_state_dict(state["models"][tier])
            self.step, self.spent, self.tokens = state["position"]
            self.history = state["history"]
        self.optimizers = {tier: Optimizer(model, self.team) for tier, model in self.models.items()}

    def own_path(self) -> Path:
        """The checkpoint file of this worker's share of the optimizers' state."""
        return self.work / f"{self.name}.{self.team.rank}of{self.team.size}.pt"

    def join(self) -> None:
        """Set up this worker's share of the optimizers, from its checkpoint if there is one."""
        saved = torch.load(self.own_path(), weights_only=False) if self.own_path().exists() else {}
        for tier, optimizer in self.optimizers.items():
            optimizer.join()
            if tier in saved:
                optimizer.load(saved[tier])

    def save(self) -> None:
        """Write the checkpoint, replacing the previous one only when the new one is complete."""
        write_whole(self.own_path(), {tier: o.state() for tier, o in self.optimizers.items()})
        if self.team.rank == 0:
            state = {
                "models": {tier: model.state_dict() for tier, model in self.models.items()},
                "position": (self.step, self.spent, self.tokens),
                "history": self.history,
            }
            write_whole(self.work / f"{self.name}.pt", state)


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Save ``state`` so that the file is either the previous one or complete."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def draw_windows(stream: Tokens, count: int, length: int, seed: int, step: int) -> torch.Tensor:
    """Draw ``count`` windows of ``length`` + 1 tokens that start at random places of the stream."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(stream) - length - 1, size=count)
    rows = np.stack([stream[start : start + length + 1] for start in starts])
    return torch.from_numpy(rows.astype(np.int64))


def held_out_loss(model: LlamaForCausalLM, stream: Tokens, windows: int = 16) -> float:
    """Return the mean loss over evenly spaced windows of the held-out stream, for the log."""
    starts = np.linspace(0, len(stream) - WINDOW - 1, windows).astype(np.int64)
    total = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for chunk in np.array_split(starts, max(1, windows // 8)):
            rows = torch.from_numpy(np.stack([stream[s : s + WINDOW + 1] for s in chunk]).astype(np.int64))
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
            total += float(loss) * len(chunk)
    return total / windows


StepLoss = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def run_stage(
    stage: Stage, step_loss: StepLoss, windows: Callable[[int], torch.Tensor], held: Tokens
) -> None:
    """Train all models of a stage until its wall time is used up, logging and saving on the way."""
    if stage.spent < stage.seconds:
        stage.team.run(lambda: work_on_stage(stage, step_loss, windows, held))


def work_on_stage(
    stage: Stage, step_loss: StepLoss, windows: Callable[[int], torch.Tensor], held: Tokens
) -> None:
    """Train as one worker of the team; worker 0 keeps the time, logs and measures."""
    team, control = stage.team, stage.team.control
    stage.join()
    last_save = last_log = begin = time.monotonic()
    before, logged_tokens = stage.spent, stage.tokens
    while True:
        if team.rank == 0:
            control[0] = stage.spent / stage.seconds
            control[1] = float(time.monotonic() - last_save > SAVE_SECONDS)
        team.wait()
        progress, due = control.tolist()
        team.wait()
        if progress >= 1.0:
            break
        if due:
            if team.rank == 0:
                record = {tier: held_out_loss(model, held) for tier, model in stage.models.items()}
                stage.history.append({"step": stage.step, "minutes": stage.spent / 60, **record})
                print(f"{stage.name} step {stage.step} held-out {record}", flush=True)
            stage.save()
            last_save = time.monotonic()
        rows = windows(stage.step)
        losses = step_loss(rows[team.rank :: team.size])
        for loss in losses.values():
            loss.backward()
        for optimizer in stage.optimizers.values():
            optimizer.step(progress)
        stage.step += 1
        stage.tokens += rows.shape[0] * (rows.shape[1] - 1)
        now = time.monotonic()
        stage.spent = before + now - begin
        if stage.step % LOG_STEPS == 0 and team.rank == 0:
            rate = (stage.tokens - logged_tokens) / (now - last_log)
            shown = " ".join(f"{tier} {float(loss.detach()):.3f}" for tier, loss in losses.items())
            print(
                f"{stage.name} step {stage.step} {stage.spent / 60:.1f} min {rate:.0f} tok/s {shown}",
                flush=True,
            )
            last_log, logged_tokens = now, stage.tokens
    stage.save()


def training_windows(stream: Tokens, seed: int) -> Callable[[int], torch.Tensor]:
    """Return the batch of each step: windows of 512 tokens, at every fifth step of 1024."""

    def windows(step: int) -> torch.Tensor:
        length = 2 * WINDOW if step % 5 == 4 else WINDOW
        return draw_windows(stream, TOKENS_PER_STEP // length, length, seed, step)

    return windows


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
    tiers = {tier: tier for tier in reversed(TIERS)}
    (args.out / "pyramid.json").write_text(json.dumps(tiers, indent=2) + "\n", encoding="utf-8")


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
