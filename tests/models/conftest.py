"""A pyramid that Triton's interpreter can run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import write_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def micro_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random Llamas, the lower ones the target's first layers, of a head size that the kernels take."""
    directory = tmp_path_factory.mktemp("micro")
    torch.manual_seed(11)
    layers = {"draft": 1, "qualifier": 2, "target": 3}
    for name in layers:
        (directory / name).mkdir()
        vocab_size = write_byte_tokenizer(directory / name)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=192,
        eos_token_id=vocab_size - 1,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.12,
    )
    target = LlamaForCausalLM(config)
    for layer in target.model.layers[1:]:
        layer.mlp.down_proj.weight.data *= 0.35
        layer.self_attn.o_proj.weight.data *= 0.35
    weights = target.state_dict()
    for name, count in layers.items():
        config.num_hidden_layers = count
        model = LlamaForCausalLM(config)
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        model.save_pretrained(directory / name)
    return directory
