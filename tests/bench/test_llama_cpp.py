"""bench/llama_cpp: float files for llama.cpp, workers that answer line by line, and what is made of their answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from bench.llama_cpp import command
from bench.llama_cpp.command import Worker, measure
from bench.llama_cpp.files import KINDS, write_floats


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GGUF of one quantised matrix and one vector, with fields of several types."""
    file = tmp_path / "source.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(3)
    writer.add_file_type(7)
    writer.add_rope_freq_base(1e5)
    writer.add_token_list(["a", "b", "é"])
    writer.add_token_types([1, 1, 3])
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_q.weight", quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_those_of_the_source(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.gguf"
    write_floats(source, out, kind)
    before, after = GGUFReader(source), GGUFReader(out)
    kept = {name for name in before.fields if not name.startswith("GGUF.")} - {"general.file_type"}
    assert {name for name in after.fields if not name.startswith("GGUF.")} == kept
    for name in kept:
        assert after.fields[name].contents() == before.fields[name].contents(), name
    expected = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in before.tensors}
    found = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in after.tensors}
    types = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    assert types["output_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == {"float32": "F32", "bfloat16": "BF16"}[kind]
    for name, values in expected.items():
        tolerance = 2.0**-8 if types[name] == "BF16" else 0.0
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=0)
    assert not list(tmp_path.glob("*.part"))


def test_our_worker_answers_line_by_line(tiny_dir: Path) -> None:
    worker = Worker(
        sys.executable,
        "ours",
        {"file": str(tiny_dir / "target"), "dtype": "float32", "threads": 1, "context": 64},
    )
    prompt = [5, 6, 7, 8]
    first = worker.ask(prompt, 6, fresh=True)
    again = worker.ask(prompt, 6, fresh=False)
    worker.close()
    assert len(first["tokens"]) == 6
    assert first["tokens"] == again["tokens"]
    assert min(first["prompt_s"], first["decode_s"], again["decode_s"]) > 0


def test_a_worker_that_dies_is_named() -> None:
    with pytest.raises(SystemExit, match="ours ended with status 1"):
        Worker(
            sys.executable, "ours", {"file": "/no/such/place", "dtype": "float32", "threads": 1, "context": 8}
        )


class Scripted:
    """Answers with decode times from a list."""

    def __init__(self, times: Sequence[float], tokens: list[int]) -> None:
        self.times, self.tokens = list(times), tokens
        self.asked: list[bool] = []

    def ask(self, prompt: Sequence[int], new_tokens: int, *, fresh: bool) -> dict[str, Any]:
        self.asked.append(fresh)
        seconds = 1.0 if fresh else self.times.pop(0)
        return {"prompt_s": 2.0, "decode_s": seconds, "tokens": self.tokens[:new_tokens]}


def test_ratios_are_of_the_same_turn() -> None:
    ours, theirs = Scripted([1.0, 2.0, 4.0], [1, 2, 3, 4, 5]), Scripted([2.0, 1.0, 4.0], [1, 2, 3, 9, 5])
    workers = {"ours": cast(Worker, ours), "llama.cpp": cast(Worker, theirs)}
    row = measure(workers, "float32", [7] * 10, 5, 3)
    assert (row.ours, row.theirs) == (2.0, 2.0)
    assert row.ratio == (0.5, 1.0, 2.0)
    assert (row.prompt_ours, row.prompt_theirs, row.context) == (5.0, 5.0, 10)
    assert row.same_tokens == 3
    assert ours.asked == theirs.asked == [True, False, False, False]


def test_prompts_have_the_length_asked_for(tiny_dir: Path) -> None:
    assert len(command.prompt_of(tiny_dir / "target", 300)) == 300
    assert len(command.prompt_of(tiny_dir / "target", 300_000)) == 300_000
