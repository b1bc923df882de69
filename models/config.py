"""The config of a Llama checkpoint, checked once; anything that is not decoded here is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, cast, get_args

from pyramid_rt.errors import UnsupportedModelError, WeightsError

RopeKind = Literal["default", "linear", "dynamic", "llama3"]

# Entries that do not change what a forward pass computes, at any value.
_ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
}
_ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings"})

# Entries that would change the computation, with the values under which they do not.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "pretraining_tp": (None, 1),
    "partial_rotary_factor": (None, 1),
    "sliding_window": (None, False),
    "use_sliding_window": (None, False),
    "no_rope_layers": (None,),
    "layer_types": (None,),
    "attention_chunk_size": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logits_scaling": (None, 1),
    "residual_multiplier": (None, 1),
    "embedding_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "attn_temperature_tuning": (None, False),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "auto_map": (None,),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: default; linear (frequencies divided by factor); dynamic (base grows with the length, each row
            beyond the original context using its own position + 1 as the length); llama3 (low frequencies
            divided by factor, high ones kept, a ramp between).
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
    """Shape and constants of one Llama model; sizes in elements, ids in the model's own vocabulary."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        *,
        source: str,
        generation_config: Mapping[str, Any] | None = None,
    ) -> LlamaConfig:
        """Read Hugging Face's config.json (old and new spelling of rope) and generation_config.json.

        Args:
            config: the parsed config.json.
            source: what to call it in an error message, e.g. its path.
            generation_config: the parsed generation_config.json; its end-of-sequence ids are added.

        Raises:
            UnsupportedModelError: an architecture, rope type or other entry that we do not decode.
            WeightsError: a missing, mistyped or contradictory entry.
        """
        reader = _Reader(config, source)
        _refuse_unsupported(reader)
        hidden_size = reader.positive("hidden_size")
        num_heads = reader.positive("num_attention_heads")
        max_positions = reader.positive("max_position_embeddings", 2048)
        generation = _Reader(generation_config or {}, f"generation config of {source}")
        result = cls(
            vocab_size=reader.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.positive("intermediate_size"),
            num_layers=reader.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.positive("num_key_value_heads", num_heads),
            head_dim=reader.positive("head_dim", _even_share(reader, hidden_size, num_heads)),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            attention_bias=reader.flag("attention_bias"),
            mlp_bias=reader.flag("mlp_bias"),
            max_position_embeddings=max_positions,
            rope=_rope(reader, max_positions),
            eos_token_ids=tuple(
                dict.fromkeys((*reader.ids("eos_token_id"), *generation.ids("eos_token_id")))
            ),
            bos_token_id=next(iter(reader.ids("bos_token_id")), None),
        )
        _check(result, source)
        return result


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to one parsed JSON object; an absent entry and null are the same."""

    entries: Mapping[str, Any]
    source: str

    def fail(self, key: str, expected: str) -> WeightsError:
        return WeightsError(f"{self.source}: {key} is {self.entries.get(key)!r}, expected {expected}")

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.entries.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.entries.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
            raise self.fail(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.entries.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return bool(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing. Negative ids mean "none" in some old checkpoints."""
        value = self.entries.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            raise self.fail(key, "a token id or a list of them")
        return tuple(item for item in values if item >= 0)


def _even_share(reader: _Reader, hidden_size: int, num_heads: int) -> int | None:
    """Default head_dim; None, hence an error, where the heads do not divide the hidden size."""
    if reader.entries.get("head_dim") is None and hidden_size % num_heads:
        raise WeightsError(
            f"{reader.source}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads} "
            "and there is no head_dim"
        )
    return hidden_size // num_heads


def _refuse_unsupported(reader: _Reader) -> None:
    """Raise for every entry that says the model is not a plain Llama."""
    problems = []
    architectures = reader.entries.get("architectures")
    if not isinstance(architectures, list) or architectures != ["LlamaForCausalLM"]:
        problems.append(f"architectures is {architectures!r}, expected ['LlamaForCausalLM']")
    for key, allowed in _ONLY_SUPPORTED.items():
        # A missing model_type or hidden_act is Llama's own default.
        value = reader.entries.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(item) for item in allowed if item is not None) or "no such entry"
            problems.append(f"{key} is {_short(value)}, expected {wanted}")
    if problems:
        raise UnsupportedModelError(f"{reader.source}: " + "; ".join(problems))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rope_entries(reader: _Reader) -> tuple[str, Mapping[str, Any]]:
    """Name and content of the rope entry: rope_parameters (new), rope_scaling (old) or nothing."""
    found = {
        key: reader.entries[key] for key in ("rope_parameters", "rope_scaling") if reader.entries.get(key)
    }
    for key, value in found.items():
        if not isinstance(value, Mapping):
            raise reader.fail(key, "an object")
    if len(found) == 2 and _kind(found["rope_parameters"]) != _kind(found["rope_scaling"]):
        raise WeightsError(f"{reader.source}: rope_parameters and rope_scaling name different rope types")
    return next(iter(found.items()), ("rope_parameters", {}))


def _kind(entries: Mapping[str, Any]) -> object:
    # "type" is the oldest spelling; where both stand, transformers reads rope_type.
    return entries.get("rope_type") or entries.get("type") or "default"


def _rope(reader: _Reader, max_positions: int) -> RopeConfig:
    """The rope entry of a config in either spelling."""
    name, entries = _rope_entries(reader)
    kind = _kind(entries)
    if kind not in get_args(RopeKind):
        known = ", ".join(get_args(RopeKind))
        raise UnsupportedModelError(f"{reader.source}: rope type {kind!r} in {name}, expected one of {known}")
    kind = cast(RopeKind, kind)
    allowed = _ROPE_COMMON | _ROPE_KEYS[kind]
    # partial_rotary_factor: 1.0 is written out by some exporters and means nothing.
    unknown = {
        key: value
        for key, value in entries.items()
        if key not in allowed and value is not None and (key, value) != ("partial_rotary_factor", 1)
    }
    if unknown:
        raise UnsupportedModelError(f"{reader.source}: {name} of type {kind} has {_short(unknown)}")
    rope = _Reader(entries, f"{reader.source}: {name}")
    original = rope.positive("original_max_position_embeddings", max_positions)
    if kind == "dynamic" and original != max_positions:
        raise UnsupportedModelError(
            f"{reader.source}: {name} of type dynamic has original_max_position_embeddings {original}, "
            f"but max_position_embeddings is {max_positions}; expected them equal"
        )
    scaled, llama3 = kind != "default", kind == "llama3"
    return RopeConfig(
        kind=kind,
        theta=rope.number("rope_theta", reader.number("rope_theta", 10000.0)),
        factor=rope.number("factor") if scaled else 1.0,
        low_freq_factor=rope.number("low_freq_factor") if llama3 else 1.0,
        high_freq_factor=rope.number("high_freq_factor") if llama3 else 1.0,
        original_max_position_embeddings=original,
    )


def _check(config: LlamaConfig, source: str) -> None:
    """Refuse sizes that contradict each other."""
    rope = config.rope
    out_of_range = [i for i in _all_ids(config) if i >= config.vocab_size]
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
        (bool(out_of_range), f"token ids {out_of_range} are outside the vocabulary of {config.vocab_size}"),
    )
    found = [text for wrong, text in problems if wrong]
    if found:
        raise WeightsError(f"{source}: " + "; ".join(found))


def _all_ids(config: LlamaConfig) -> tuple[int, ...]:
    return (
        config.eos_token_ids if config.bos_token_id is None else (*config.eos_token_ids, config.bos_token_id)
    )
