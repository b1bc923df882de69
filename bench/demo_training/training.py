"""Training a small Llama on a few CPU cores: workers, optimizer, and stages that survive being stopped.

Every worker process computes on one thread with its share of each batch; weights and gradients are
in shared memory. This loses less to other load on the machine than threads that wait for each other
in every operation. A stage lasts a given number of tokens, so neither the speed of the machine nor a
pause changes it; it saves its state every few minutes and goes on from there when it is run again.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from bench.demo_training.corpus import Corpus, Tokens

WINDOW = 512
TOKENS_PER_STEP = 8192
SAVE_SECONDS = 240.0  # of the processor's time, so that a starved run does not mostly save
LONGEST_STEP = 60.0  # seconds; what goes beyond was a pause of the process and does not count as spent
LOG_STEPS = 20
PEAK_LR = 3e-3
WARM_TOKENS = 400_000
DECAY_SHARE = 0.25
LIBRARY_SHARE = 0.2  # of the windows that are drawn, from the standard library


def schedule(tokens: int, total: int, previous: float, step_tokens: int) -> float:
    """Return the learning rate of a step as a share of the peak: warm-up, constant, linear decay to 0.

    ``tokens`` of ``total`` were seen before the step, the one before ran at ``previous``. The last
    `DECAY_SHARE` of the tokens decay. The share never rises by more than 1 in `WARM_TOKENS`, so a
    run that is extended after its decay warms up again, and raising ``total`` before the decay has
    begun changes nothing but its beginning.
    """
    left = max(0, total - tokens) / (DECAY_SHARE * total)
    return min(1.0, left, previous + step_tokens / WARM_TOKENS)


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT); its state is saved."""


class Team:
    """Worker processes that step together; worker 0 is the process that was started by the user."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = 0
        self.context = multiprocessing.get_context("fork")
        self.doors = [[self.context.Semaphore(0) for _ in range(size)] for _ in range(size)]
        self.control = torch.zeros(2, dtype=torch.float64).share_memory_()
        self.leader = os.getpid()
        self.others: list[Any] = []

    def wait(self) -> None:
        """Wait until all workers are here, however long: a pause of the machine does not break the team.

        Each worker opens a door for every other one and passes one of each. Raises RuntimeError if
        another worker has ended.
        """
        for other in range(self.size):
            if other != self.rank:
                self.doors[self.rank][other].release()
        for other in range(self.size):
            while other != self.rank and not self.doors[other][self.rank].acquire(timeout=5.0):
                self.check()

    def check(self) -> None:
        """Raise RuntimeError if a worker that this one can see has ended."""
        if self.rank and os.getppid() != self.leader:
            raise RuntimeError("worker 0 has ended")
        if not self.rank and any(process.exitcode is not None for process in self.others):
            raise RuntimeError("a worker has ended early")

    def run(self, work: Callable[[], None]) -> None:
        """Run ``work`` in all workers and return when all are done."""

        def enter(rank: int) -> None:
            self.rank = rank
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # worker 0 decides when all stop
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            work()

        self.others = [
            self.context.Process(target=enter, args=(r,), daemon=True) for r in range(1, self.size)
        ]
        for process in self.others:
            process.start()
        work()
        for process in self.others:
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

    def step(self, rate: float) -> None:
        """Clip the mean gradient and update at this share of the peak learning rate."""
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
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = PEAK_LR * rate
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
    """Position of one training stage, kept across restarts.

    ``total`` and ``tokens`` count training tokens, planned and seen; ``spent`` are seconds of work
    without pauses; ``rate`` is the last step's share of the peak learning rate.
    """

    name: str
    work: Path
    total: int
    team: Team
    models: dict[str, LlamaForCausalLM]
    step: int = 0
    spent: float = 0.0
    tokens: int = 0
    rate: float = 0.0
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
            self.rate = state.get("rate", 0.0)
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
                "rate": self.rate,
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
    """Train all models of a stage until its tokens are used up, logging and saving on the way.

    SIGTERM or SIGINT ends it early with its state saved, by raising Stopped.
    """
    if stage.tokens >= stage.total:
        return
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: asked.append(1))
    try:
        stage.team.run(lambda: work_on_stage(stage, step_loss, windows, held, asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stage.tokens < stage.total:
        raise Stopped(f"{stage.name}: stopped after {stage.tokens} of {stage.total} tokens; state saved")


def work_on_stage(
    stage: Stage,
    step_loss: StepLoss,
    windows: Callable[[int], torch.Tensor],
    held: Tokens,
    asked: list[int],
) -> None:
    """Train as one worker of the team; worker 0 watches for the wish to stop, logs and measures."""
    team, control = stage.team, stage.team.control
    stage.join()
    last = time.monotonic()
    saved, logged = time.process_time(), (stage.spent, stage.tokens)
    while stage.tokens < stage.total:
        if team.rank == 0:
            control[0] = float(bool(asked))
            control[1] = float(time.process_time() - saved > SAVE_SECONDS)
        team.wait()
        stop, due = control.tolist()
        team.wait()
        if stop:
            break
        if due:
            if team.rank == 0:
                note_held_out(stage, held)
            stage.save()
            saved = time.process_time()
        rows = windows(stage.step)
        count = rows.shape[0] * (rows.shape[1] - 1)
        stage.rate = schedule(stage.tokens, stage.total, stage.rate, count)
        losses = step_loss(rows[team.rank :: team.size])
        # Once for all: the gradients of a compiled step are one graph.
        torch.stack(list(losses.values())).sum().backward()
        for optimizer in stage.optimizers.values():
            optimizer.step(stage.rate)
        stage.step += 1
        stage.tokens += count
        now = time.monotonic()
        stage.spent += min(now - last, LONGEST_STEP)
        last = now
        if stage.step % LOG_STEPS == 0 and team.rank == 0:
            speed = (stage.tokens - logged[1]) / (stage.spent - logged[0])
            shown = " ".join(f"{tier} {float(loss.detach()):.3f}" for tier, loss in losses.items())
            print(
                f"{time.strftime('%H:%M', time.gmtime())} {stage.name} step {stage.step} "
                f"{stage.tokens / 1e6:.2f} of {stage.total / 1e6:g} M tokens, {stage.spent / 60:.1f} min, "
                f"{speed:.0f} tok/s, rate {stage.rate:.2f}: {shown}",
                flush=True,
            )
            logged = (stage.spent, stage.tokens)
    if team.rank == 0:
        note_held_out(stage, held)
    stage.save()


def note_held_out(stage: Stage, held: Tokens) -> None:
    """Add the held-out loss of every model to the stage's history."""
    record = {tier: held_out_loss(model, held) for tier, model in stage.models.items()}
    stage.history.append({"step": stage.step, "tokens": stage.tokens, "minutes": stage.spent / 60, **record})
    print(f"{stage.name} step {stage.step} held-out {record}", flush=True)


def training_windows(corpus: Corpus, seed: int, longest: int = 2 * WINDOW) -> Callable[[int], torch.Tensor]:
    """Return the batch of each step: windows of 512 tokens, at every fifth step of ``longest``.

    One in five comes from the standard library, the others from the packages.
    """
    library, packages = corpus.train[: corpus.library_tokens], corpus.train[corpus.library_tokens :]

    def windows(step: int) -> torch.Tensor:
        length = longest if step % 5 == 4 else WINDOW
        count = TOKENS_PER_STEP // length
        share = np.random.default_rng([seed, step, 1]).binomial(count, LIBRARY_SHARE)
        rows = [draw_windows(library, share, length, seed, step)] if share else []
        if share < count:
            rows.append(draw_windows(packages, count - share, length, seed + 1_000_000, step))
        # Interleaved below the workers by a stride, so the order must not follow the source.
        order = np.random.default_rng([seed, step, 2]).permutation(count)
        return torch.cat(rows)[torch.from_numpy(order)]

    return windows
