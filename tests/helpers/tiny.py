"""A pyramid of three tiny random Llamas as a weights directory, with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = {"draft": 1, "qualifier": 2, "target": 4}
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def write_byte_tokenizer(directory: Path) -> int:
    """A tokenizer whose tokens are the 256 bytes and <eos>; returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_tiny_pyramid(directory: Path, **changes: Any) -> Path:
    """Three random Llamas of one family: the lower tiers are the target's first layers, so they often agree.

    `changes` are entries of their config.json.
    """
    torch.manual_seed(11)
    for name in LAYERS:
        (directory / name).mkdir(parents=True)
        vocab_size = write_byte_tokenizer(directory / name)
    entries: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS["target"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": vocab_size - 1,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.12,
    }
    config = LlamaConfig(**{**entries, **changes})
    target = LlamaForCausalLM(config)
    for layer in target.model.layers[LAYERS["draft"] :]:
        # Later layers only correct what the first ones say.
        layer.mlp.down_proj.weight.data *= 0.35
        layer.self_attn.o_proj.weight.data *= 0.35
    weights = target.state_dict()
    for name, layers in LAYERS.items():
        config.num_hidden_layers = layers
        model = LlamaForCausalLM(config)
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        model.save_pretrained(directory / name)
    return directory
