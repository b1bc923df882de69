"""Small tokenizers of the two kinds that Llama-style models have, written out as their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEN_SCRIPTS = {
    "latin": "Das ist naïve Übung – café, e\u0301 und ñ.  Zwei Blanks.\n\tTab ",
    "greek": "Γειά σου Κόσμε, ἀρχὴ τοῦ λόγου.",
    "cyrillic": "Съешь ещё этих мягких французских булок.",
    "arabic": "مرحبا بالعالم، كيف الحالُ؟",
    "hebrew": "שָׁלוֹם עולם, מה שלומך?",
    "devanagari": "नमस्ते दुनिया, क्षत्रिय ज्ञान।",
    "thai": "สวัสดีชาวโลก น้ำใจ",
    "chinese": "你好，世界。漢字简体字。",
    "japanese": "こんにちは世界、カタカナと漢字。",
    "korean": "안녕하세요 세계, 한글입니다.",
    "tamil": "வணக்கம் உலகம்.",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 x 🇩🇪 \U0001f44d🏽",
}
CODE = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\nfor word in words:\n    print(word)\n"
CORPUS = [*TEN_SCRIPTS.values(), CODE] * 3


def byte_level(vocab_size: int = 420, *, special: tuple[str, ...] = ("<s>", "</s>")) -> tokenizers.Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's: tokens are bytes, some of them parts of characters."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def byte_fallback(*, prepend: bool = True, metaspace: bool = False) -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: blanks are ``▁``, what has no token is spelt in bytes.

    Args:
        prepend: a text begins with a blank, which the decoder takes off again.
        metaspace: by the pre-tokenizer of that name instead of a normalizer.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzDTZF.,()[]+-:\nüéКона世", "日"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "c"),
        ("▁c", "a"),
        ("▁ca", "t"),
        ("▁", "▁"),
        ("▁▁", "▁▁"),
    ]
    pieces += [first + second for first, second in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first" if prepend else "never", split=False
        )
    else:
        steps = [normalizers.Prepend("▁")] if prepend else []
        core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def with_bos(core: tokenizers.Tokenizer, *, eos: bool = False) -> tokenizers.Tokenizer:
    """The same with a post-processor that puts ``<s>`` in front, and ``</s>`` at the end where asked for."""
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A",
        special_tokens=[("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))],
    )
    return core


def write_tokenizer(directory: Path, core: tokenizers.Tokenizer, **files: Any) -> Path:
    """Write tokenizer.json, and each of `files` as the JSON file of that name."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(core.to_str(), encoding="utf-8")
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory
