"""Families of models: what an architecture's name means for its config, its tensors' names and its parts.

A family is one entry of `FAMILIES`. Everything that differs between models which compute as a Llama does is in it;
docs/extending.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyramid_rt.errors import UnsupportedModelError, WeightsError
from pyramid_rt.models.config import LlamaConfig, check_sizes
from pyramid_rt.models.entries import Entries, short
from pyramid_rt.models.rope import read_rope


@dataclass(frozen=True, slots=True)
class Biases:
    """The matrices that have a bias: of Q, K and V; of attention's output; of the MLP."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False


@dataclass(frozen=True, slots=True)
class TensorNames:
    """A family's names of its tensors.

    Attributes:
        embedding, norm, head: the outer ones.
        layer: what the names of a layer's tensors begin with; {} is its index.
        parts: field of `LayerWeights` -> the tensors that stand in it, one upon the other. Two or more for a
            matrix that checkpoints store in pieces (Q, K and V; gate and up), one for a fused one.
        body: beginnings of all names that belong to the model. Other tensors in a file (heads of other tasks)
            do not take part in what it computes.
    """

    embedding: str
    norm: str
    head: str
    layer: str
    parts: Mapping[str, tuple[str, ...]]
    body: tuple[str, ...]


ConfigReader = Callable[["Family", Entries, Entries], LlamaConfig]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        architecture: its name in config.json.
        model_type: of its configs; a config without one is fine.
        names: of its tensors.
        biases: which matrices have one, by its config.
        window: its sliding window in tokens, by its config; None for none.
        supported: entries that would change the computation -> the values with which they do not; an absent entry
            never does.
        read: makes its config of config.json and generation_config.json.
    """

    architecture: str
    model_type: str
    names: TensorNames
    biases: Callable[[Entries], Biases]
    window: Callable[[Entries], int | None]
    supported: Mapping[str, tuple[Any, ...]]
    read: ConfigReader


def read_config(
    config: Mapping[str, Any], *, source: str, generation_config: Mapping[str, Any] | None = None
) -> LlamaConfig:
    """Read Hugging Face's config.json and generation_config.json by the rules of the family they name.

    Args:
        config: the parsed config.json.
        source: what to call it in an error message, e.g. its path.
        generation_config: the parsed generation_config.json; its end-of-sequence ids are added.

    Raises:
        UnsupportedModelError: an architecture, rope type or other entry that we do not decode.
        WeightsError: a missing, mistyped or contradictory entry.
    """
    entries = Entries(config, source)
    family = _family(entries)
    generation = Entries(generation_config or {}, f"generation config of {source}")
    result = family.read(family, entries, generation)
    check_sizes(result, source)
    return result


def read_plain(family: Family, entries: Entries, generation: Entries) -> LlamaConfig:
    """A config with Llama's names of entries. Errors as `read_config`."""
    _refuse_unsupported(family, entries)
    hidden_size = entries.positive("hidden_size")
    num_heads = entries.positive("num_attention_heads")
    max_positions = entries.positive("max_position_embeddings", 2048)
    vocab_size = entries.positive("vocab_size")
    biases, notes = family.biases(entries), []
    ids = dict.fromkeys((*entries.ids("eos_token_id"), *generation.ids("eos_token_id")))
    never = [index for index in ids if index >= vocab_size]
    if never:
        notes.append(
            f"{entries.source}: end-of-sequence ids {short(never)} are never produced, the vocabulary has "
            f"{vocab_size} ids; they are left out"
        )
    bos = next(iter(entries.ids("bos_token_id")), None)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=entries.positive("intermediate_size"),
        num_layers=entries.positive("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=entries.positive("num_key_value_heads", num_heads),
        head_dim=entries.positive("head_dim", _even_share(entries, hidden_size, num_heads)),
        rms_norm_eps=entries.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=entries.flag("tie_word_embeddings"),
        qkv_bias=biases.qkv,
        out_bias=biases.out,
        mlp_bias=biases.mlp,
        max_position_embeddings=max_positions,
        rope=read_rope(entries, max_positions),
        eos_token_ids=tuple(index for index in ids if index < vocab_size),
        bos_token_id=bos if bos is not None and bos < vocab_size else None,
        sliding_window=family.window(entries),
        architecture=family.architecture,
        notes=tuple(notes),
    )


def _family(entries: Entries) -> Family:
    named = entries.values.get("architectures")
    known = ", ".join(FAMILIES)
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) and named[0] in FAMILIES:
        return FAMILIES[named[0]]
    raise UnsupportedModelError(
        f"{entries.source}: architectures is {short(named)}, expected a list of one of {known}"
    )


def _refuse_unsupported(family: Family, entries: Entries) -> None:
    """Raise one error for all entries that say the model computes otherwise."""
    problems = []
    for key, allowed in {"model_type": (family.model_type,), **family.supported}.items():
        # A missing entry is the family's own default.
        value = entries.values.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(item) for item in allowed if item is not None) or "no such entry"
            problems.append(f"{key} is {short(value)}, expected {wanted}")
    if problems:
        raise UnsupportedModelError(f"{entries.source}: " + "; ".join(problems))


def _even_share(entries: Entries, hidden_size: int, num_heads: int) -> int | None:
    """Default head_dim; None, hence an error, where the heads do not divide the hidden size."""
    if entries.values.get("head_dim") is None and hidden_size % num_heads:
        raise WeightsError(
            f"{entries.source}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads} "
            "and there is no head_dim"
        )
    return hidden_size // num_heads


def _llama_biases(entries: Entries) -> Biases:
    attention, mlp = entries.flag("attention_bias"), entries.flag("mlp_bias")
    return Biases(qkv=attention, out=attention, mlp=mlp)


def _window(entries: Entries) -> int | None:
    """The sliding window, where the config has one and neither switches it off nor gives it to no layer."""
    width = entries.values.get("sliding_window")
    kinds = entries.values.get("layer_types") or ["sliding_attention"]
    known = ("full_attention",) if width in (None, False) else ("full_attention", "sliding_attention")
    if entries.values.get("layer_types") and not (
        isinstance(kinds, list) and all(kind in known for kind in kinds)
    ):
        raise UnsupportedModelError(
            f"{entries.source}: layer_types is {short(kinds)}, expected a list of {' or '.join(map(repr, known))}"
        )
    switch = entries.values.get("use_sliding_window")
    if width in (None, False) or (switch is not None and not entries.flag("use_sliding_window")):
        return None
    return entries.positive("sliding_window") if "sliding_attention" in kinds else None


LLAMA_NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    layer="model.layers.{}.",
    parts={
        "attn_norm": ("input_layernorm.weight",),
        "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "out": ("self_attn.o_proj.weight",),
        "out_bias": ("self_attn.o_proj.bias",),
        "mlp_norm": ("post_attention_layernorm.weight",),
        "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "gate_up_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        "down": ("mlp.down_proj.weight",),
        "down_bias": ("mlp.down_proj.bias",),
    },
    body=("model.", "lm_head."),
)

# Entries that would change what a Llama computes, with the values under which they do not. `pretraining_tp` is none:
# it cuts products into pieces whose sum is the same.
LLAMA_ENTRIES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (),
    "partial_rotary_factor": (1,),
    "no_rope_layers": (),
    "attention_chunk_size": (),
    "num_local_experts": (0,),
    "num_experts": (0,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "attn_temperature_tuning": (False,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "auto_map": (),
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        names=LLAMA_NAMES,
        biases=_llama_biases,
        window=_window,
        supported=LLAMA_ENTRIES,
        read=read_plain,
    ),
}
