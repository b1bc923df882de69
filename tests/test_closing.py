"""A closed pyramid leaves nothing behind, and the system has its memory back."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import pyramid_rt
from pyramid_rt import Pyramid

PROMPT = "def f(x):"
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}

# In a process of its own, whose memory is the pyramid's but for what torch itself takes.
RESIDENT = """
import gc, sys
from pathlib import Path
import torch
import pyramid_rt

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024

def once(keep):
    rt = pyramid_rt.load(sys.argv[1], device="cpu")
    kept = rt.stream([1, 2, 3], max_new_tokens=8, ignore_eos=True)
    list(kept)
    unstarted = rt.stream([1, 2, 3])
    taken = resident()
    keep += [rt, kept, unstarted]
    rt.close()
    return taken

gc.disable()
kept = []
once(kept)  # torch and its libraries take what they keep for good
before = resident()
taken = once(kept)
print(before, taken, resident())
"""


@pytest.fixture(scope="module")
def big_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of some 100 MiB."""
    from helpers.tiny import write_byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("big") / "target"
    directory.mkdir()
    vocab_size = write_byte_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=vocab_size - 1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory.parent


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_closing_gives_the_system_its_memory_back(big_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(big_dir)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    before, taken, after = map(int, done.stdout.split())
    weights = sum(file.stat().st_size for file in big_dir.rglob("*.safetensors"))
    assert taken - before > weights
    assert after - before < weights / 10, f"{(after - before) / 2**20:.0f} MiB of {weights / 2**20:.0f} stay"


@pytest.mark.parametrize("way", ["close", "with"])
def test_nothing_of_a_closed_pyramid_is_kept(tiny_dir: Path, way: str) -> None:
    """Weights, caches and buffers go, streams and results held or not."""
    gc.collect()
    gc.disable()
    try:
        rt = pyramid_rt.load(tiny_dir, device="cpu")
        results = [rt.generate(PROMPT, **OPTIONS, method=method) for method in ("ar", "psd")]
        stream = rt.stream(PROMPT, **OPTIONS)
        list(stream)
        watched = [weakref.ref(tier.cache.buffer) for tier in rt.tiers]  # type: ignore[attr-defined]
        watched += [weakref.ref(tier.model.embedding) for tier in rt.tiers]  # type: ignore[attr-defined]
        watched += [weakref.ref(engine.state.tokens) for engine in rt._kept.values()]
        if way == "close":
            rt.close()
        else:
            with rt:
                pass
        assert [reference() for reference in watched] == [None] * len(watched)
        assert results[0].tokens == results[1].tokens == stream.result.tokens
    finally:
        gc.enable()


def test_memory_that_torch_keeps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyramid_rt.loading import memory

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 100_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    assert memory._available(torch.device("cuda:0")) == 7_000


def test_the_device_is_told_to_give_back_what_was_freed(
    tiny: Pyramid, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rt = Pyramid(tiny.tiers, tokenizer=tiny.tokenizer)
    rt.generate(PROMPT, **OPTIONS)
    monkeypatch.setattr(
        rt.place, "trim", lambda: order.append(f"{len(rt.tiers)} tiers, {len(rt._kept)} engines")
    )
    rt.close()
    rt.close()
    assert order == ["0 tiers, 0 engines"]
