"""The public object on a tiny real pyramid: results, bad input, reuse after failures."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import pyramid_rt
from pyramid_rt import (
    BusyError,
    Fuzzy,
    InputError,
    Match,
    MemoryPlanError,
    NonFiniteLogitsError,
    Pyramid,
    Rejection,
    WeightsError,
)
from pyramid_rt.loading import memory
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.llama import Llama
from pyramid_rt.models.matrix import Matrix

# A pyramid of `ModelTier`s with a tokenizer and a plan: these tests look behind the protocol `Tier`.
Loaded = Any

PROMPT = "def fibonacci(n):"
OTHERS = ("sd", "psd")


def same_tokens(
    found: Sequence[int], expected: Sequence[int], pyramid: Loaded, prompt_ids: Sequence[int]
) -> None:
    """Equal, or first different where the target's two best scores lie within 1e-4."""
    if found == expected:
        return
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    gap = top_gap(pyramid, [*prompt_ids, *expected[:at]])
    print(f"near tie at token {at}: the two best differ by {gap:.2e}")
    assert gap < 1e-4


def top_gap(pyramid: Loaded, ids: Sequence[int]) -> float:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(pyramid.tiers[-1].path, dtype=torch.float64)
    best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def test_greedy_equals_transformers(tiny: Loaded, tiny_dir: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_dir / "target")
    for prompt in (PROMPT, "x", "import os\n" * 9):
        ids = tiny.tokenizer.encode(prompt)
        expected = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False, eos_token_id=None)
        out = tiny.generate(prompt, method="ar", max_new_tokens=60, ignore_eos=True)
        same_tokens(out.tokens, expected[0, len(ids) :].tolist(), tiny, ids)
        assert out.text == tiny.tokenizer.decode(out.tokens)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("control", ["host", "device"])
def test_lossless_methods_equal_ar(tiny_dir: Path, method: str, temperature: float, control: str) -> None:
    rt: Loaded
    with pyramid_rt.load(tiny_dir, device="cpu", control=control) as rt:
        drafts = 0
        for seed in range(3):
            options: dict[str, Any] = {
                "temperature": temperature,
                "seed": seed,
                "max_new_tokens": 70,
                "top_p": 0.95,
            }
            plain = rt.generate(PROMPT, method="ar", **options)
            out = rt.generate(PROMPT, method=method, **options)
            same_tokens(out.tokens, plain.tokens, rt, rt.tokenizer.encode(PROMPT))
            drafts += out.stats.tiers[0].survived
        assert drafts > 0, "speculation never helped, so nothing was tested"


@pytest.mark.parametrize("method", ["fsd", "psd_a", "psd_f"])
def test_lossy_methods_say_how_lossy(tiny: Loaded, method: str) -> None:
    exact = tiny.generate(
        PROMPT, method=method, max_new_tokens=40, target_threshold=0.0, qualifier_threshold=0.0
    )
    assert exact.stats.differs == 0.0
    loose = tiny.generate(
        PROMPT, method=method, max_new_tokens=40, target_threshold=9.0, qualifier_threshold=9.0
    )
    assert loose.stats.differs > 0
    assert loose.stats.tiers[-2].acceptance_rate == 1.0 > exact.stats.tiers[-2].acceptance_rate


def test_result_fields(tiny: Loaded) -> None:
    out = tiny.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    assert (out.finish_reason, len(out.tokens), out.logprobs) == ("length", 20, None)
    stats = out.stats
    assert (stats.method, stats.new_tokens, stats.prompt_tokens) == ("psd", 20, len(PROMPT))
    assert 0 < stats.time_to_first_token < stats.seconds
    assert stats.tokens_per_second == pytest.approx(20 / stats.seconds)
    assert [tier.name for tier in stats.tiers] == ["draft", "qualifier", "target"]
    assert sum(tier.survived for tier in stats.tiers) == 19
    assert [tier for tier in stats.tiers if not (tier.seconds > 0)] == []
    json.dumps(stats.to_dict())
    again = tiny.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=None)
    assert tiny.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=again.seed).tokens == again.tokens


def test_logprobs(tiny: Loaded) -> None:
    from transformers import LlamaForCausalLM

    out = tiny.generate(PROMPT, max_new_tokens=25, logprobs=3, ignore_eos=True, temperature=0.8, seed=4)
    ids = [*tiny.tokenizer.encode(PROMPT), *out.tokens]
    model = LlamaForCausalLM.from_pretrained(tiny.tiers[-1].path, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)[len(ids) - 26 : -1]
    assert [entry.token for entry in out.logprobs] == out.tokens
    for row, entry in zip(expected, out.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        values = row.topk(3).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-4)
    assert tiny.generate(PROMPT, max_new_tokens=2, logprobs=0).logprobs[0].top == ()


def test_prompts_of_every_kind(tiny: Loaded) -> None:
    ids = tiny.tokenizer.encode(PROMPT)
    expected = tiny.generate(PROMPT, max_new_tokens=10).tokens
    assert tiny.generate(ids, max_new_tokens=10).tokens == expected
    assert tiny.generate(torch.tensor(ids).tolist(), max_new_tokens=10).tokens == expected
    chat = [{"role": "user", "content": "hi"}]
    rendered = tiny.generate("<user>hi<assistant>", max_new_tokens=10).tokens
    assert tiny.generate(chat, max_new_tokens=10).tokens == rendered


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"), ([], "empty"), ([0, 257], "257 is out of range 0..256"), ([-1], "-1 is out of range"),
        ([1.5], "1.5"), ([True], "True"), (["a"], "'a'"), ([{"role": "user"}], "content"),
        ("x" * 256, "256 tokens and the context 256"), ([{"role": "user", "content": "a"}, 3], "3"),
    ],
)  # fmt: skip
def test_bad_prompts(tiny: Loaded, prompt: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny.generate(prompt)


def test_bad_calls(tiny: Loaded) -> None:
    with pytest.raises(InputError, match="unknown option 'beams'"):
        tiny.generate(PROMPT, beams=3)
    with pytest.raises(InputError, match=r"stop_token_ids: token id 999 is out of range"):
        tiny.generate(PROMPT, stop_token_ids=[999])
    with pytest.raises(InputError, match="lengths must have one entry per stage, 2 here, found 3"):
        tiny.generate(PROMPT, lengths=[1, 2, 3])


def test_stop_strings_are_exact(tiny: Loaded) -> None:
    full = tiny.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    stop = full.text[9:12]
    for method in ("ar", "sd", "psd"):
        out = tiny.generate(PROMPT, method=method, max_new_tokens=60, ignore_eos=True, stop=["\0never", stop])
        assert out.text == full.text[: full.text.index(stop)]
        assert out.finish_reason == "stop"
        assert out.tokens == full.tokens[: len(out.tokens)]
        assert stop in tiny.tokenizer.decode(out.tokens)
        assert stop not in tiny.tokenizer.decode(out.tokens[:-1])


def test_directories_with_fewer_tiers(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir / "target", tmp_path / "target")
    with pyramid_rt.load(tmp_path, device="cpu") as rt:
        assert (rt.default_method, rt.methods) == ("ar", ("ar",))
        alone = rt.generate(PROMPT, max_new_tokens=12).tokens
        with pytest.raises(InputError, match="'psd' needs 3 tiers and the pyramid has 1; it can run ar"):
            rt.generate(PROMPT, method="psd")
    shutil.copytree(tiny_dir / "draft", tmp_path / "draft")
    with pyramid_rt.load(tmp_path, device="cpu") as rt:
        assert rt.default_method == "sd"
        assert rt.generate(PROMPT, max_new_tokens=12).tokens == alone


def test_defaults_of_the_directory(tiny_dir: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = {name: str(tiny_dir / name) for name in ("draft", "qualifier", "target")}
    content["defaults"] = {"method": "sd", "draft_length": 2, "max_new_tokens": 5}
    (tmp_path / "pyramid.json").write_text(json.dumps(content))
    with pyramid_rt.load(tmp_path, device="cpu") as rt:
        out = rt.generate(PROMPT, ignore_eos=True)
        assert (out.stats.method, len(out.tokens)) == ("sd", 5)
        assert rt.generate(PROMPT, max_new_tokens=7, ignore_eos=True).stats.new_tokens == 7
    content["defaults"] = {"draft_length": 0}
    (tmp_path / "pyramid.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"pyramid\.json.*draft_length"):
        pyramid_rt.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device"), ({"device": "cuda:99"}, "cuda:99"), ({"dtype": "int4"}, "dtype"),
        ({"max_seq": 257}, "max_seq"), ({"max_seq": 1}, "max_seq"), ({"backend": "jax"}, "backend"),
        ({"control": "nobody"}, "control"),
    ],
)  # fmt: skip
def test_bad_loads(tiny_dir: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pyramid_rt.load(tiny_dir, **{"device": "cpu", **options})


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        pyramid_rt.load(tmp_path / "nowhere")


def test_memory_is_planned_before_it_is_taken(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda device: 300_000)
    with pytest.raises(MemoryPlanError, match=r"MiB short \(draft: weights .* dtype .* max_seq"):
        pyramid_rt.load(tiny_dir, device="cpu")


def test_out_of_memory_while_loading_gives_the_plan_and_frees_what_was_taken(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    real: Any = vars(ModelTier)["load"].__func__

    def load(cls: type[ModelTier], name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "target":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        tier = real(cls, name, *args, **kwargs)
        loaded.append(weakref.ref(tier))
        return tier

    monkeypatch.setattr(ModelTier, "load", classmethod(load))
    message = (
        r"needs \d+ MiB and the device ran out at tier 'target': CUDA out of memory.*draft: weights .*max_seq"
    )
    with pytest.raises(MemoryPlanError, match=message):
        pyramid_rt.load(tiny_dir, device="cpu")
    gc.collect()
    assert [tier() for tier in loaded] == [None, None]


def test_the_memory_plan_is_what_is_taken(tiny: Loaded) -> None:
    for name, weights, cache, _ in tiny.memory_plan.rows():
        tier = next(tier for tier in tiny.tiers if tier.name == name)
        rows = (*tier.cache.k, *tier.cache.v, tier.model.rotary)
        assert cache == sum(t.numel() * t.element_size() for t in rows)
        assert weights == sum(part.nbytes for part in _parameters(tier.model))
    tiny.generate(PROMPT, max_new_tokens=1)
    state = next(reversed(tiny._kept.values())).state
    assert tiny.memory_plan.round_buffers == state.nbytes()


def _parameters(model: Llama) -> list[torch.Tensor | Matrix]:
    layers = [value for layer in model.layers for value in (getattr(layer, name) for name in layer.__slots__)]
    return [part for part in (model.embedding, model.norm, model.head, *layers) if part is not None]


def test_non_finite_weights_are_named_and_the_pyramid_survives(tiny: Loaded) -> None:
    expected = tiny.generate(PROMPT, method="psd", max_new_tokens=30).tokens
    for tier, position in (("draft", len(PROMPT) + 1), ("target", len(PROMPT))):
        norm = next(t for t in tiny.tiers if t.name == tier).model.norm
        kept = norm.clone()
        norm.fill_(math.nan)
        try:
            with pytest.raises(NonFiniteLogitsError, match=f"{tier}.*position {position}"):
                tiny.generate(PROMPT, method="psd", max_new_tokens=30)
        finally:
            norm.copy_(kept)
        assert tiny.generate(PROMPT, method="psd", max_new_tokens=30).tokens == expected


def test_custom_chains(tiny: Loaded) -> None:
    tiers = tiny.tiers
    plain = tiny.generate(PROMPT, method="ar", max_new_tokens=20).tokens
    rt = Pyramid(tiers, [Rejection(), Match()], tokenizer=tiny.tokenizer, eos_token_ids=tiny.eos_token_ids)
    assert rt.default_method == "chain"
    assert rt.generate(PROMPT, max_new_tokens=20).tokens == plain
    assert rt.generate(PROMPT, max_new_tokens=20, method="sd").tokens == plain
    with pytest.raises(InputError, match="3 tiers need 2 rules"):
        Pyramid(tiers, [Match()])
    with pytest.raises(InputError, match="different names"):
        Pyramid([tiers[0], tiers[0]])
    with pytest.raises(InputError, match="at least one tier"):
        Pyramid([])
    with pytest.raises(InputError, match="threshold must be a number >= 0"):
        Fuzzy(-0.1)
    with pytest.raises(InputError, match="unknown divergence 'js2'"):
        Fuzzy(0.1, "js2")


def test_without_a_tokenizer_ids_are_enough(tiny: Loaded) -> None:
    rt = Pyramid(tiny.tiers)
    out = rt.generate([1, 2, 3], max_new_tokens=5)
    assert (out.text, len(out.tokens)) == ("", 5)
    with pytest.raises(InputError, match="needs a tokenizer"):
        rt.generate("text")
    with pytest.raises(InputError, match="need a tokenizer"):
        rt.generate([1], stop=["x"])


def test_closing(tiny_dir: Path) -> None:
    rt = pyramid_rt.load(tiny_dir, device="cpu")
    rt.close()
    rt.close()
    with pytest.raises(BusyError, match="closed"):
        rt.generate(PROMPT)


def test_the_one_liner(tiny_dir: Path, tiny: Loaded) -> None:
    expected = tiny.generate(PROMPT, max_new_tokens=8).text
    assert pyramid_rt.generate(tiny_dir, PROMPT, device="cpu", max_new_tokens=8) == expected


def test_repr_says_what_it_is(tiny_dir: Path) -> None:
    with pyramid_rt.load(tiny_dir, device="cpu", max_seq=64) as rt:
        assert repr(rt) == "<Pyramid draft < qualifier < target, psd on cpu, 64 positions>"


def test_a_closed_pyramid_says_so(tiny_dir: Path) -> None:
    rt = pyramid_rt.load(tiny_dir, device="cpu")
    rt.close()
    assert repr(rt) == "<Pyramid, closed>"
    with pytest.raises(BusyError, match="closed"):
        _ = rt.max_seq
