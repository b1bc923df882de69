"""Sizes of the Llamas that kernels are compiled, checked and timed for."""

from __future__ import annotations

from dataclasses import dataclass

from pyramid_rt.models.config import LlamaConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama that kernels depend on."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, name: str, config: LlamaConfig) -> Shape:
        """The sizes of a model of this config."""
        return cls(
            name=name,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_layers,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
        )


SHAPES = (
    Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256),
    Shape("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128, 128256),
    Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256),
)
