"""A pyramid that the kernels take, small enough for Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import write_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = {"draft": 1, "qualifier": 2, "target": 3}


@pytest.fixture(scope="session")
def kernel_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pyramid of a head size that the kernels take: one, two and three layers."""
    root = tmp_path_factory.mktemp("kernels")
    torch.manual_seed(3)
    for name, layers in LAYERS.items():
        (root / name).mkdir()
        vocab_size = write_byte_tokenizer(root / name)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=256,
            eos_token_id=vocab_size - 1,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
    return root
