"""Tokenizer files, chat templates and the comparison of two tokenizers."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from pyramid_rt.errors import InputError, WeightsError
from pyramid_rt.text.tokenizer import Tokenizer

CORPUS = ["def fib(n):\n    return n\n", "for word in words:\n    print(word)\n", "naïve café – 你好"] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core


def save(core: tokenizers.Tokenizer, directory: Path, **settings: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(core.to_str())
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(byte_level(), tmp_path / "a", bos_token="<s>", eos_token={"content": "</s>", "lstrip": False})


def test_encode_goes_through_the_post_processor(directory: Path) -> None:
    tokenizer = Tokenizer.from_dir(directory)
    ids = tokenizer.encode("def fib")
    assert tokenizer.token(ids[0]) == "<s>"
    assert ids.count(ids[0]) == 1
    assert tokenizer.decode(ids) == "def fib"


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    core = byte_level()
    core.enable_truncation(max_length=4)
    core.enable_padding(length=200)
    tokenizer = Tokenizer.from_dir(save(core, tmp_path))
    text = "for word in words: " * 3
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 2


def test_sizes_and_special_ids(directory: Path) -> None:
    core = byte_level()
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.vocab_size == max(core.get_vocab().values()) + 1
    assert tokenizer.special_ids == {core.token_to_id("<s>"), core.token_to_id("</s>")}
    assert tokenizer.byte_level


def test_bytes_of_every_token_join_to_its_text(directory: Path) -> None:
    tokenizer = Tokenizer.from_dir(directory)
    for index in range(tokenizer.vocab_size):
        if index not in tokenizer.special_ids:
            assert tokenizer.token_bytes(index).decode("utf-8", "replace") == tokenizer.decode([index])
    assert tokenizer.token_bytes(10**6) == b""
    alphabet = {tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)}
    assert {bytes([value]) for value in range(256)} <= alphabet


def test_added_tokens_are_spelt_as_plain_text(tmp_path: Path) -> None:
    core = byte_level()
    core.add_tokens(["two words é"])
    tokenizer = Tokenizer.from_dir(save(core, tmp_path))
    index = core.token_to_id("two words é")
    assert index is not None
    assert tokenizer.token_bytes(index) == "two words é".encode()
    assert tokenizer.decode([index]) == "two words é"


def test_lone_surrogate_is_refused(directory: Path) -> None:
    with pytest.raises(InputError, match="prompt: character 2"):
        Tokenizer.from_dir(directory).encode("ab\ud800")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b'{"version": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"version": "1.0"}', "not a tokenizer"),
    ],
)
def test_damaged_tokenizer_names_the_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        Tokenizer.from_dir(tmp_path)
    assert str(path) in str(caught.value)


def test_damaged_settings_name_the_file(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json"):
        Tokenizer.from_dir(directory)


# Chat.


def chat_tokenizer(directory: Path, template: Any) -> Tokenizer:
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    return Tokenizer.from_dir(save(byte_level(), directory, **settings))


def test_chat_renders_with_the_assistant_turn_open(tmp_path: Path) -> None:
    text = chat_tokenizer(tmp_path, CHATML).render_chat([{"role": "user", "content": "Hi <b>\n"}])
    assert text == "<|im_start|>user\nHi <b>\n<|im_end|>\n<|im_start|>assistant\n"


def test_chat_adds_no_second_bos(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    bos, eos = tokenizer.encode("")[0], max(tokenizer.special_ids)
    ids = tokenizer.encode_chat([{"role": "user", "content": "abc"}])
    assert (ids[0], ids.count(bos), ids[-1]) == (bos, 1, eos)


def test_template_file_wins_over_the_settings(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path, "settings")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_dir(tmp_path).render_chat([{"role": "user", "content": ""}]) == "file"


def test_default_of_several_templates(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert chat_tokenizer(tmp_path, several).render_chat([{"role": "user", "content": ""}]) == "yes"


def test_template_language(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}\n"
        "    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{% generation %}!{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "é<"}]
    assert (
        chat_tokenizer(tmp_path, template).render_chat(messages) == '{"role": "user", "content": "é<"}!4True'
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        (["hi"], "message 0 must be an object.*found str"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 1 has no 'role'"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([{"role": "user", "content": None}], "'content' must be a string, found NoneType"),
        ([{"role": 3, "content": "a"}], "'role' must be a string, found int"),
    ],
)
def test_malformed_messages(tmp_path: Path, messages: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        chat_tokenizer(tmp_path, CHATML).render_chat(messages)


def test_a_turn_of_tool_calls_needs_no_content(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "{{ messages[0].tool_calls[0].name }}")
    assert tokenizer.render_chat([{"role": "assistant", "tool_calls": [{"name": "look"}]}]) == "look"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('system first') }}", "system first"),
        ("{% if %}", "broken"),
        ("{{ 1 / 0 }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
        ("{{ messages[0].content.nothing.at.all }}", "refused"),
    ],
)
def test_template_errors(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        chat_tokenizer(tmp_path, template).render_chat([{"role": "user", "content": "a"}])


def test_no_template(directory: Path) -> None:
    with pytest.raises(InputError, match=r"chat_template\.jinja"):
        Tokenizer.from_dir(directory).render_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}{{ messages | tojson(indent=1) }}"])
def test_chat_equals_transformers(tmp_path: Path, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = chat_tokenizer(tmp_path, template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "naïve? 你好"}]
    expected = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ours.encode_chat(messages) == expected


# Comparison.


def spec_with(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(byte_level().to_str())
    for key, value in changes.items():
        spec[key] = value
    return spec


def renamed_token() -> dict[str, Any]:
    spec = copy.deepcopy(spec_with())
    vocab = spec["model"]["vocab"]
    vocab["zz-new"] = vocab.pop(next(token for token, index in vocab.items() if index == 20))
    spec["model"]["merges"] = []
    return spec


def test_ids_that_mean_something_else_are_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(renamed_token()))
    here, there = Tokenizer.from_dir(directory), Tokenizer.from_dir(tmp_path)
    difference = here.difference(there)
    assert difference is not None
    assert re.search(r"vocabulary: .* 1 ids differ, the first is 20: .* against 'zz-new'", difference)
    assert not here.same_as(there)
    assert not there.same_as(here)


def without_merges() -> dict[str, Any]:
    spec = copy.deepcopy(spec_with())
    spec["model"]["merges"] = []
    return spec


# Lower tiers see ids only: how their tokenizers would have cut a text is nothing that a decoded token depends on, so
# a base model may stand beside the fine-tune whose post-processor or flags were changed.
@pytest.mark.parametrize(
    "spec",
    [
        spec_with(normalizer={"type": "NFC"}),
        spec_with(pre_tokenizer={"type": "WhitespaceSplit"}),
        spec_with(post_processor=None),
        spec_with(decoder=None),
        spec_with(added_tokens=spec_with()["added_tokens"][:1]),
        without_merges(),
    ],
    ids=["normalizer", "pre-tokenizer", "post-processor", "decoder", "flag", "merges"],
)
def test_what_the_target_alone_decides_is_no_difference(
    directory: Path, tmp_path: Path, spec: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    here, there = Tokenizer.from_dir(directory), Tokenizer.from_dir(tmp_path)
    assert here.digest != there.digest
    assert here.same_as(there)


def test_an_added_token_more_is_no_difference(directory: Path, tmp_path: Path) -> None:
    core = byte_level()
    core.add_special_tokens(["<|im_end|>"])
    here, there = Tokenizer.from_dir(directory), Tokenizer.from_dir(save(core, tmp_path))
    assert here.same_as(there)
    assert there.same_as(here)


def test_added_tokens_with_one_id_are_a_difference(tmp_path: Path) -> None:
    sides = []
    for spelling in ("<|one|>", "<|two|>"):
        core = byte_level()
        core.add_special_tokens([spelling])
        sides.append(Tokenizer.from_dir(save(core, tmp_path / spelling)))
    difference = sides[0].difference(sides[1])
    assert difference is not None
    assert "'<|one|>' against '<|two|>'" in difference


def test_files_that_differ_in_form_only_are_the_same(directory: Path, tmp_path: Path) -> None:
    spec = spec_with(
        truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    )
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]  # as older versions wrote
    del spec["model"]["byte_fallback"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec, indent=3))
    here, there = Tokenizer.from_dir(directory), Tokenizer.from_dir(tmp_path)
    assert here.digest != there.digest
    assert here.difference(there) is None
    assert here.same_as(here)
