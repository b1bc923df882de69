"""Chats: what a message may be, which end a chat has, and what a template may take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers.vocabularies import byte_fallback, byte_level, with_bos, write_tokenizer

from pyramid_rt.errors import InputError
from pyramid_rt.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMMED = (
    "{{- bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% set text = m.content %}{% if '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ m.role }}: {{ text }}{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama 2": LLAMA_2, "trimmed": TRIMMED, "thinking": THINKING}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "the cat"}


def chat_directory(directory: Path, template: str) -> Path:
    settings = {**SETTINGS, "chat_template": template}
    return write_tokenizer(directory, with_bos(byte_level()), tokenizer_config=settings)


def chat_tokenizer(directory: Path, template: str) -> Tokenizer:
    return Tokenizer.from_dir(chat_directory(directory, template))


# The end of a chat.


@pytest.mark.parametrize(
    "answer", ["Yes, the", "Yes, the ", "  a\n", "", "The end. The end", "<think>\nx\n</think>\n\nYes"]
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_goes_on_as_with_transformers(tmp_path: Path, template: str, answer: str) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    ours = chat_tokenizer(tmp_path, TEMPLATES[template])
    theirs = auto.from_pretrained(tmp_path)
    chat = [USER, {"role": "assistant", "content": answer}]
    try:
        expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    except ValueError:
        with pytest.raises(InputError, match="does not write the last message as it is"):
            ours.render_chat(chat)
        return
    assert ours.render_chat(chat) == ours.render_chat(chat, True) == expected
    assert ours.encode_chat(chat) == theirs(expected, add_special_tokens=False).input_ids
    opened = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(chat, False) == opened


def test_only_an_answer_goes_on_by_itself(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    assert tokenizer.render_chat([USER]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.render_chat([USER], True) == "<|im_start|>user\nthe cat"
    calls = {"role": "assistant", "content": "a", "tool_calls": [{"name": "look"}]}
    assert tokenizer.render_chat([USER, calls]).endswith("<|im_start|>assistant\n")


def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(InputError, match="continue_final_message=False asks for a new answer"):
        tokenizer.render_chat([USER, {"role": "assistant", "content": "Yes"}])
    with pytest.raises(InputError, match="needs a last message with content"):
        tokenizer.render_chat([{"role": "assistant", "tool_calls": [1]}], True)


# What a message may be.


class Message:
    """As the client of an OpenAI server gives it back."""

    def model_dump(self) -> dict[str, Any]:
        return {"role": "assistant", "content": "Yes", "tool_calls": None, "refusal": None}


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "the cat"}],
        [{"type": "text", "text": "the"}, {"type": "text", "text": " cat"}],
        ["the", {"type": "text", "text": " cat"}],
        ({"type": "text", "text": "the cat"},),
    ],
)
def test_parts_of_text_are_joined(tmp_path: Path, content: Any) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    assert tokenizer.render_chat([{"role": "user", "content": content}]) == tokenizer.render_chat([USER])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}],
            "part 1 .* found 'image_url'",
        ),
        ([{"text": "a"}], "part 0 of 'content' must be text, .* found None"),
        ([3], "part 0 of 'content' must be text, .* found 3"),
        ([{"type": "text"}], "part 0 of 'content': 'text' must be a string, found None"),
    ],
)
def test_other_parts_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=f"prompt: message 0: {words}"):
        chat_tokenizer(tmp_path, CHATML).render_chat([{"role": "user", "content": content}])


def test_objects_of_a_client_are_messages(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML + "{{ messages[1] | tojson }}")
    text = tokenizer.render_chat([USER, Message(), USER])
    assert text.endswith('{"role": "assistant", "content": "Yes"}')


def test_templates_see_plain_values_only(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    tokenizer = chat_tokenizer(tmp_path, "{{ messages[0] | tojson }}")
    text = tokenizer.render_chat(
        [{**USER, "n": numpy.int64(3), "x": (numpy.float32(0.5), True), "none": None}]
    )
    assert text == '{"role": "user", "content": "the cat", "n": 3, "x": [0.5, true]}'
    with pytest.raises(InputError, match="message 0: 'file' must hold text, numbers, lists and objects"):
        tokenizer.render_chat([{**USER, "file": object()}])
    with pytest.raises(InputError, match="message 0: every key must be a string, found 3"):
        tokenizer.render_chat([{**USER, 3: "a"}])


# The beginning of a text.


@pytest.mark.parametrize("core", [byte_level, byte_fallback])
def test_a_text_has_one_beginning(tmp_path: Path, core: Any) -> None:
    tokenizer = Tokenizer.from_dir(write_tokenizer(tmp_path, with_bos(core(), eos=True)))
    bos, eos = sorted(tokenizer.special_ids - {tokenizer.special_id("<unk>")})
    plain = tokenizer.encode("the cat", False)
    assert tokenizer.encode("the cat") == tokenizer.encode("the cat", True) == [bos, *plain, eos]
    spelt = tokenizer.encode("<s>the cat", False)
    assert spelt[0] == bos
    assert tokenizer.encode("<s>the cat") == [*spelt, eos]
    assert tokenizer.encode("<s>the cat", True) == [bos, *spelt, eos]
    # Only what the text begins with is left out.
    assert tokenizer.encode("the <s>") == [bos, *tokenizer.encode("the <s>", False), eos]
    assert tokenizer.encode("<s><s>") == [bos, bos, eos]
    assert tokenizer.encode("") == [bos, eos]


def test_a_chat_gets_a_beginning_when_told_to(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    bos = tokenizer.special_id("<s>")
    plain = tokenizer.encode_chat([USER])
    assert bos not in plain
    assert tokenizer.encode_chat([USER], add_special_tokens=False) == plain
    assert tokenizer.encode_chat([USER], add_special_tokens=True) == [bos, *plain]


# What a template may take.

DOUBLED = "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = OP %}{% endfor %}{{ ns.s }}"
NESTED = "{% set ns = namespace(l=['ab']) %}{% for i in range(60) %}{% set ns.l = OP %}{% endfor %}{{ ns.l }}"
LOOPS = "{% for a in range(9999) %}" * 3 + "X" + "{% endfor %}" * 3
GREEDY = [
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**9 }}",
    "{{ 10**9 * 'ab' }}",
    "{{ 9 ** 99999 }}",
    "{{ (10**1000) ** 1000 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '%(a)999999999s' % {'a': 1} }}",
    "{{ '%(a(b)c)999999999s' % {'a(b)c': 1} }}",
    "{{ '%s%% %%%s %-099999d' % (1, 2, 3) }}",
    "{{ '{{{0:>99999}}}'.format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ ('{0}' * 9999).format('a' * 99999) }}",
    "{{ ('%(a)s' * 9999) % {'a': 'a' * 99999} }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ '1'.zfill(10**10) }}",
    "{{ ('\t' * 9999).expandtabs(9999) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ ('a\n' * 9999) | indent(9999) }}",
    "{{ ('a\n' * 9999) | indent('x' * 99999) }}",
    "{{ [[1]] | tojson(indent=10**9) }}",
    "{{ ([1] * 99999) | tojson(indent=9999) }}",
    "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
    "{{ ('a' * 9999).replace('', 'b' * 9999) }}",
    "{{ ('b' * 9999).join(['a'] * 9999) }}",
    "{{ (['a'] * 9999) | join('b' * 9999) }}",
    "{{ (range(99999) | list) | map('string') | map('center', 9999) | join }}",
    "{{ [range(99999) | list] * 9999 }}",
    "{{ ([range(9999) | list] * 9999) | sum(start=[]) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 'ab'.translate({97: 'x' * 99999}) }}",
    "{{ lipsum(99999) }}",
    "{{ range(10**9) | list }}",
    DOUBLED.replace("OP", "ns.s + ns.s"),
    DOUBLED.replace("OP", "ns.s ~ ns.s"),
    DOUBLED.replace("OP", "ns.s ~ ns.s ~ 'x'"),
    DOUBLED.replace("OP", "'%s%s' % (ns.s, ns.s)"),
    DOUBLED.replace("OP", "[ns.s, ns.s] | join"),
    DOUBLED.replace("OP", "'{0}{0}'.format(ns.s)"),
    DOUBLED.replace("OP", "ns.s | replace('a', 'aa')"),
    DOUBLED.replace("{% set ns.s = OP %}", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + DOUBLED.replace("OP", "m(ns.s)"),
    NESTED.replace("OP", "[ns.l, ns.l]"),
    NESTED.replace("OP", "(ns.l, ns.l)"),
    NESTED.replace("OP", "{'a': ns.l, 'b': ns.l}"),
    NESTED.replace("OP", "dict(a=ns.l, b=ns.l)"),
    NESTED.replace("OP", "ns.l + [ns.l]"),
    NESTED.replace("OP", "namespace(a=ns.l, b=[ns.l, ns.l])").replace(
        "{{ ns.l }}", "{{ [ns.l.b] * 2**20 * 9 }}"
    ),
    "{% set ns = namespace(n=99) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    LOOPS,
    LOOPS.replace("X", ""),
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{% for a in range(9999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['x' * 99999] %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}{{ x | length }}",
]


@pytest.mark.parametrize("template", GREEDY)
def test_a_template_takes_neither_memory_nor_time(tmp_path: Path, template: str) -> None:
    tokenizer = chat_tokenizer(tmp_path, template)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"prompt: the chat template \(.*tokenizer_config\.json\)"):
        tokenizer.render_chat([USER])
    assert time.monotonic() - begin < 60  # of a loaded machine; the bound itself is 10 seconds


def test_what_was_exceeded_is_named(tmp_path: Path) -> None:
    for template, words in (
        (LOOPS, "it takes more than 200000 loop passes and calls"),
        ("{{ 'a' * 10**10 }}", "it makes a text or list of more than 8388608 characters"),
        ("{{ 'a'.ljust(10**5) }}", "it asks for a width or count of more than 10000"),
        ("{{ 9 ** 99999 }}", "it makes a number of more than 4096 bits"),
        ("{{ 1 | round(20000000) }}", "it makes a number of more than 4096 bits"),
        (
            "{% set l = range(60000) | list %}{{ l | select('in', l) | list }}",
            "it takes more than 200000 loop passes",
        ),
    ):
        with pytest.raises(InputError, match=words):
            chat_tokenizer(tmp_path, template).render_chat([USER])
    with pytest.raises(InputError, match="has 300000 characters, more than 262144"):
        chat_tokenizer(tmp_path, "x" * 300_000).render_chat([USER])


def test_a_long_chat_is_no_greed(tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    template = (
        "{% set ns = namespace(last=-1, text='') %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% set ns.text = ns.text ~ m.role %}{% endfor %}"
        "{% set rest = messages[1:] %}{% for m in rest %}{{ '%s: %s' | format(m.role, m.content | trim) ~ '\\n' }}"
        "{{ m | tojson(indent=4) }}{% endfor %}{{ ns.last }}{{ ns.text | length }}{{ '{:>8}'.format('**' * 3) }}"
    )
    # As many messages as fill a context of a million tokens.
    chat = [{"role": "user" if i % 2 else "system", "content": "word " * 400} for i in range(2001)]
    ours, theirs = chat_tokenizer(tmp_path, template), auto.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(chat) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ '**%s** 100000 (%%) *%d* (200000)' % ('a', 3) }}{{ '%(a)s %(a)-9s %05.1f' % {'a': 1} if false }}",
        "{{ '{{}} {0} 100000 {0:>5} {1:05.2f}'.format(1, 2.5) }}",
        "{{ 'a,b'.split(',') | join(', ') }}",
        "{{ [1, 2] + [3] }}{{ (1, 2) }}{{ {'a': [1]} }}{{ -2 ** 3 }}{{ 7 // 2 }}{{ 7 % 4 }}",
        "{{ 'a' ~ 1 ~ none ~ x }}",
        "{% for k, v in {'a': 1}.items() %}{{ loop.index }}{{ k }}{{ v }}{% endfor %}",
        "{{ range(3) | list | sum }}",
        "{% for m in messages if m.role == 'x' %}{{ m }}{% else %}none{% endfor %}",
        "{{ messages | map(attribute='role') | list }}",
        "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set ns = namespace() %}{% set ns.x = 3 %}{{ ns.x }}{{ 'x' in ['x'] }}",
        "{% macro m(a, b=[1]) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}"
        "{{ m(1) }}{% call m(2) %}x{% endcall %}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map('tojson') | join('|') }}"
        "{{ 'ab' | upper | replace('A', 'x') }}",
        "{% filter upper %}abc{{ messages[0].role }}{% endfilter %}{{ 'abc'[::-1] }}"
        "{{ ['b', 'a'] | sort }}{{ 3.14159 | round(2) }}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
        "{{ 'x' * 3 }}{{ [0] * 2 }}",
    ],
)
def test_counting_changes_nothing(tmp_path: Path, template: str) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    ours, theirs = chat_tokenizer(tmp_path, template), auto.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert ours.render_chat([USER]) == expected
