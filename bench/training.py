"""Training a small Llama on a few CPU cores: workers, optimizer, and stages that survive being stopped.

Every worker process computes on one thread with its share of each batch; weights and gradients are
in shared memory. This loses less to other load on the machine than threads that wait for each other
in every operation. A stage lasts a given wall time, saves its state every two minutes and goes on from
there when it is run again.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from bench.demo_corpus import (
    Tokens,
)

WINDOW = 512
TOKENS_PER_STEP = 4096
SAVE_SECONDS = 120.0
LOG_STEPS = 20
PEAK_LR = 3e-3


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
