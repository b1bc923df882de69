"""A checkpoint's config, checked: sizes, constants and ids of one Llama-like model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pyramid_rt.errors import WeightsError

RopeKind = Literal["default", "linear", "dynamic", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: default; linear (frequencies divided by factor); dynamic (base grows with the length beyond the
            original context: that of the prompt for its positions, position + 1 for later ones); llama3 (low
            frequencies divided by factor, high ones kept, a ramp between).
        theta: base wavelength.
        factor: scaling factor; 1 for default.
        low_freq_factor, high_freq_factor: llama3 only.
        original_max_position_embeddings: context before scaling, in tokens. For dynamic the length at which
            scaling starts, for llama3 the length its wavelengths are compared with.
    """

    kind: RopeKind
    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shape and constants of one model; sizes in elements, ids in the model's own vocabulary.

    Attributes:
        qkv_bias, out_bias, mlp_bias: which matrices have a bias: of Q, K and V; of attention's output; of the MLP.
        eos_token_ids: those of config and generation config that the model can produce.
        sliding_window: positions that a row may look back on, itself included; None for all.
        architecture: key of its family in `families.FAMILIES`.
        notes: what its files say and this runtime leaves out, as sentences for a log.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    sliding_window: int | None = None
    architecture: str = "LlamaForCausalLM"
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def longest_context(self) -> int:
        """Positions the model may see, and every one of them computed as its checkpoint means it.

        Linear scaling stretches the positions by its factor, whether max_position_embeddings was raised with it or
        not; dynamic scaling was made to go on past them. Rows look back on all earlier ones, so a sliding window
        ends the context.
        """
        rope, longest = self.rope, self.max_position_embeddings
        if rope.kind in ("linear", "dynamic"):
            longest = max(longest, int(rope.original_max_position_embeddings * rope.factor))
        return longest if self.sliding_window is None else min(longest, self.sliding_window)


def check_sizes(config: LlamaConfig, source: str) -> None:
    """Refuse sizes that contradict each other. Raises WeightsError, `source` in its message."""
    rope = config.rope
    problems: Sequence[tuple[bool, str]] = (
        (
            config.num_heads % config.num_kv_heads != 0,
            f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads "
            f"{config.num_kv_heads}",
        ),
        (config.head_dim % 2 != 0, f"head_dim {config.head_dim} is odd, rotary embeddings need pairs"),
        (rope.kind == "dynamic" and config.head_dim < 4, "dynamic rope needs a head_dim of at least 4"),
        (rope.factor < 1, f"rope factor {rope.factor} is below 1"),
        (
            rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor,
            f"rope high_freq_factor {rope.high_freq_factor} is not above low_freq_factor "
            f"{rope.low_freq_factor}",
        ),
    )
    found = [text for wrong, text in problems if wrong]
    if found:
        raise WeightsError(f"{source}: " + "; ".join(found))
