"""Token healing on the demo pyramid: the target's own choice among the allowed tokens, whatever the method."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pyramid_rt
from pyramid_rt import InputError, NonFiniteLogitsError, Options, Pyramid

PROMPTS = [
    "import jso",
    "def fibonacci(n):\n",
    "for i in ran",
    "x = foo( ",
    "if __name__ == '__ma",
    "class Stack:\n    def push(self, item):\n        ",
    "import os\nimport s",
]


@pytest.fixture(scope="module", params=["host", "device"])
def demo(request: pytest.FixtureRequest) -> Iterator[Pyramid]:
    with pyramid_rt.load(pyramid_rt.demo_weights(), device="cpu", control=request.param) as rt:
        yield rt


def spelling(rt: Pyramid, index: int) -> bytes:
    assert rt.tokenizer is not None
    return b"" if index in rt.tokenizer.special_ids else rt.tokenizer.token_bytes(index)


def test_a_word_goes_on(demo: Pyramid) -> None:
    out = demo.generate("import jso", heal=True, max_new_tokens=6)
    assert out.text.startswith("n")
    assert demo.tokenizer is not None
    assert demo.tokenizer.decode([*demo.tokenizer.encode("import j"), *out.tokens]) == "import jso" + out.text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_the_likeliest_that_are_allowed(demo: Pyramid, prompt: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(
        pyramid_rt.demo_weights() / "target", dtype=torch.float64
    )
    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode(prompt)
    known, rest = ids[:-1], spelling(demo, ids[-1])
    expected: list[int] = []
    size = demo.tokenizer.vocab_size
    for _ in range(8):
        with torch.no_grad():
            row = model(torch.tensor([known + expected])).logits[0, -1, :size]
        # All single bytes are tokens, so any part of the rest can be completed.
        allowed = [
            i
            for i in range(size)
            if not rest or ((s := spelling(demo, i)) and (s.startswith(rest) or rest.startswith(s)))
        ]
        best = max(allowed, key=lambda i: row[i].item())
        expected.append(best)
        rest = rest[len(spelling(demo, best)) :]
    out = demo.generate(prompt, heal=True, max_new_tokens=8, method="ar", ignore_eos=True)
    assert out.tokens == expected
    assert out.text == demo.tokenizer.decode([*known, *expected])[len(prompt) :]
    assert out.stats.prompt_tokens == len(known)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("method", ["sd", "psd"])
def test_lossless_methods_heal_as_ar(demo: Pyramid, method: str, temperature: float) -> None:
    several = helped = 0
    for seed, prompt in enumerate(PROMPTS):
        options = Options(heal=True, temperature=temperature, seed=seed, max_new_tokens=40)
        if seed % 2:
            options |= Options(top_p=0.9, top_k=30)
        plain = demo.generate(prompt, **options | Options(method="ar"))
        out = demo.generate(prompt, **options | Options(method=method))
        assert (out.tokens, out.text) == (plain.tokens, plain.text)
        helped += out.stats.tiers[0].survived
        assert demo.tokenizer is not None
        several += len(spelling(demo, out.tokens[0])) < len(spelling(demo, demo.tokenizer.encode(prompt)[-1]))
    assert helped > 0, "speculation never helped, so nothing was tested"
    assert several > 0 or temperature == 0, "no prefix took several tokens, so that was not tested"


def test_rejection_heals_with_the_same_first_tokens(demo: Pyramid) -> None:
    for seed in range(4):
        options = Options(heal=True, temperature=0.9, seed=seed, max_new_tokens=12)
        plain = demo.generate("import jso", **options | Options(method="ar"))
        out = demo.generate("import jso", **options | Options(method="psd", lossless_rule="rejection"))
        assert out.tokens[0] == plain.tokens[0]
        assert demo.tokenizer is not None
        whole = demo.tokenizer.decode([*demo.tokenizer.encode("import j"), *out.tokens])
        assert whole == "import jso" + out.text


def test_healed_tokens_count_and_can_end_a_text(demo: Pyramid) -> None:
    first = demo.generate("import jso", heal=True, max_new_tokens=9).tokens
    for count in range(4):
        out = demo.generate("import jso", heal=True, max_new_tokens=count)
        assert (out.tokens, out.finish_reason) == (first[:count], "length")
    out = demo.generate("import jso", heal=True, stop_token_ids=first[:1])
    assert (out.tokens, out.finish_reason, out.text) == (first[:1], "stop", "")
    again = demo.generate("import jso", heal=True, max_new_tokens=9)
    assert again.tokens == first


def test_a_stop_string_counts_after_the_prompt_only(demo: Pyramid) -> None:
    whole = demo.generate("import jso", heal=True, max_new_tokens=9)
    out = demo.generate("import jso", heal=True, max_new_tokens=9, stop=["so", whole.text[2:4]])
    assert out.text == whole.text[: whole.text.index(whole.text[2:4])]
    assert out.finish_reason == "stop"


def test_ids_heal_as_their_text(demo: Pyramid) -> None:
    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode("import jso")
    options = Options(heal=True, max_new_tokens=5)
    assert demo.generate(ids, **options).tokens == demo.generate("import jso", **options).tokens


def test_one_token_cannot_be_taken_back(demo: Pyramid) -> None:
    plain = demo.generate("    ", max_new_tokens=5)
    assert demo.generate("    ", max_new_tokens=5, heal=True).tokens == plain.tokens


def test_logprobs_of_healed_tokens_are_the_targets(demo: Pyramid) -> None:
    out = demo.generate("def fibonacci(n):\n", heal=True, max_new_tokens=6, logprobs=2)
    assert out.logprobs is not None
    assert [entry.token for entry in out.logprobs] == out.tokens
    assert demo.tokenizer is not None
    for entry in out.logprobs:
        assert entry.text == demo.tokenizer.decode([entry.token])
        assert entry.top_texts == tuple(demo.tokenizer.decode([index]) for index, _ in entry.top)
    # Not the distribution among the allowed ones: that would be certain where one token is left.
    taken = demo.tokenizer.encode("def fibonacci(n):\n")[:-1]
    raw = demo.generate(taken, max_new_tokens=1, logprobs=2).logprobs
    assert raw is not None
    assert [index for index, _ in out.logprobs[0].top] == [index for index, _ in raw[0].top]
    values = [value for _, value in raw[0].top]
    assert [value for _, value in out.logprobs[0].top] == pytest.approx(values, abs=1e-4)


def test_a_kept_beginning_heals_alike(demo: Pyramid) -> None:
    long = "import os\n" * 20
    first = demo.generate(long + "import jso", heal=True, max_new_tokens=6)
    again = demo.generate(long + "import jso", heal=True, max_new_tokens=6)
    assert again.stats.reused_tokens > 0
    assert again.tokens == first.tokens


def test_a_failing_target_is_named(demo: Pyramid, monkeypatch: pytest.MonkeyPatch) -> None:
    target = demo.tiers[-1]
    whole = type(target).forward

    def failing(self: object, *given: object) -> object:
        logits = whole(self, *given)  # type: ignore[arg-type]
        return None if logits is None else logits * float("nan")

    monkeypatch.setattr(type(target), "forward", failing)
    with pytest.raises(NonFiniteLogitsError, match=r"tier 'target' gave non-finite logits for position 2"):
        demo.generate("import jso", heal=True, max_new_tokens=4)
    monkeypatch.undo()
    assert demo.generate("import jso", heal=True, max_new_tokens=4).text.startswith("n")


def test_healing_needs_a_tokenizer(demo: Pyramid) -> None:
    bare = Pyramid(demo.tiers)
    with pytest.raises(InputError, match="heal=True needs a tokenizer"):
        bare.generate([1, 2, 3], heal=True)
