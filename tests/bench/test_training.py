"""The demo's training: its schedule, its team of workers, and that a stopped run goes on as if it had not stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.equality import assert_equal_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from bench.demo_training import training
from bench.demo_training.corpus import Corpus
from bench.demo_training.training import (
    DECAY_SHARE,
    LIBRARY_SHARE,
    TOKENS_PER_STEP,
    WARM_TOKENS,
    WINDOW,
    Stage,
    Stopped,
    Team,
    run_stage,
    schedule,
    training_windows,
)

STEP = 8192


def rates(total: int, *, start: int = 0, previous: float = 0.0) -> list[float]:
    """The schedule of a whole run."""
    found = []
    for tokens in range(start, total, STEP):
        previous = schedule(tokens, total, previous, STEP)
        found.append(previous)
    return found


def test_the_schedule_warms_up_stays_and_decays() -> None:
    total = 20_000_000
    found = rates(total)
    warm, decay = WARM_TOKENS // STEP + 1, int((1 - DECAY_SHARE) * total) // STEP
    assert [(a, b) for a, b in pairwise(found[:warm]) if not (a < b)] == []
    assert set(found[warm:decay]) == {1.0}
    assert [(a, b) for a, b in pairwise(found[decay + 2 :]) if not (a > b)] == []
    assert 0 < found[-1] < 2 * STEP / (DECAY_SHARE * total)


def test_a_longer_plan_changes_nothing_before_the_decay_of_the_shorter() -> None:
    short, long = rates(20_000_000), rates(30_000_000)
    constant = int(0.75 * 20_000_000) // STEP
    assert short[:constant] == long[:constant]


def test_a_run_extended_after_its_decay_warms_up_again() -> None:
    found = rates(30_000_000, start=20_000_000, previous=0.0)
    assert found[0] == STEP / WARM_TOKENS
    assert max(b - a for a, b in pairwise(found)) <= STEP / WARM_TOKENS + 1e-12
    assert max(found) == 1.0


@pytest.fixture
def corpus() -> Corpus:
    """Library tokens are below 50, those of packages above."""
    rng = np.random.default_rng(0)
    library = rng.integers(1, 50, 30_000).astype(np.uint16)
    packages = rng.integers(50, 100, 60_000).astype(np.uint16)
    held = rng.integers(1, 100, 2000).astype(np.uint16)
    return Corpus(None, np.concatenate([library, packages]), len(library), held, held, {})  # type: ignore[arg-type]


def test_windows_are_of_one_source_each_and_keep_the_share(corpus: Corpus) -> None:
    windows = training_windows(corpus, 1)
    from_library = count = 0
    for step in range(40):
        rows = windows(step)
        assert rows.shape[0] * (rows.shape[1] - 1) == TOKENS_PER_STEP
        assert rows.shape[1] - 1 == (2 * WINDOW if step % 5 == 4 else WINDOW)
        low = rows.max(1).values < 50
        assert_equal_tensors(low, rows.min(1).values < 50)  # no window crosses from one source to the other
        from_library += int(low.sum())
        count += len(rows)
        assert_equal_tensors(rows, training_windows(corpus, 1)(step))
    assert abs(from_library / count - LIBRARY_SHARE) < 0.06


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=16,
            tie_word_embeddings=True,
        )
    )


def train(
    work: Path, corpus: Corpus, total: int, monkeypatch: pytest.MonkeyPatch, *, workers: int = 2, **hooks: Any
) -> Stage:
    """Train a tiny model with batches of 512 tokens; `at` is called with the step in worker 0."""
    monkeypatch.setattr(training, "WARM_TOKENS", 1024)
    stage = Stage("tiny", work, total, Team(workers), {"tiny": tiny_model()})
    model = stage.models["tiny"]

    def windows(step: int) -> torch.Tensor:
        if stage.team.rank == 0:
            hooks.get("at", lambda _: None)(step)
        rng = np.random.default_rng(step)
        starts = rng.integers(0, 20_000, 8)
        return torch.from_numpy(np.stack([corpus.train[s : s + 65] for s in starts]).astype(np.int64))

    def loss(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return {"tiny": F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())}

    run_stage(stage, loss, windows, corpus.held_out)
    return stage


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in stage.models["tiny"].named_parameters()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    total = 512 * 12
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "a", corpus, total, monkeypatch, workers=workers)

    def stop(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=r"after 2560 of 6144 tokens"):
        train(tmp_path / "b", corpus, total, monkeypatch, workers=workers, at=stop)
    resumed = train(tmp_path / "b", corpus, total, monkeypatch, workers=workers)
    assert (resumed.step, resumed.tokens) == (whole.step, whole.tokens) == (12, total)
    assert resumed.rate == whole.rate
    for name, weight in weights(whole).items():
        assert_equal_tensors(weight, weights(resumed)[name], name)
    assert not torch.equal(
        weights(whole)["model.embed_tokens.weight"], tiny_model().model.embed_tokens.weight
    )


def test_time_that_the_process_stood_still_is_not_spent(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000 * 3600, 3600))  # every look at the clock is an hour after the one before
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    stage = train(tmp_path, corpus, 512 * 3, monkeypatch, workers=1)
    assert stage.spent == 3 * training.LONGEST_STEP
    assert stage.rate == schedule(512 * 2, 512 * 3, 1.0, 512)  # and the schedule does not know about it


def test_a_team_waits_through_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is late by more than a wait's patience breaks nothing."""
    team = Team(2)
    patient = team.doors[1][0]
    calls: list[float] = []

    class Late:
        def acquire(self, timeout: float) -> bool:
            calls.append(timeout)
            if len(calls) == 3:
                patient.release()
            return patient.acquire(timeout=0)

    team.doors[1][0] = Late()  # type: ignore[call-overload]
    thread = threading.Thread(target=team.wait)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert len(calls) == 3


def test_a_worker_that_dies_is_noticed() -> None:
    team = Team(2)

    def work() -> None:
        if team.rank == 1:
            os._exit(3)
        team.wait()

    with pytest.raises(RuntimeError, match="a worker has ended early"):
        team.run(work)
