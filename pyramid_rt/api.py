"""The way in: `load` a pyramid, or `generate` in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import torch

from pyramid_rt.decoding.methods import best_method, rules_of
from pyramid_rt.decoding.place import place_for
from pyramid_rt.decoding.threads import check_threads, default_threads
from pyramid_rt.errors import InputError
from pyramid_rt.loading.directory import PYRAMID_FILE, PyramidDirectory, check_family
from pyramid_rt.loading.memory import MemoryPlan, plan_memory
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.loading.weights import read_config
from pyramid_rt.models.backends.choice import check_backend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import weight_bytes
from pyramid_rt.params import Options, SamplingParams, merged_options
from pyramid_rt.pyramid import GraphKind, Prompt, Pyramid, build_plan
from pyramid_rt.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MAX_SEQ = 4096

# What `load` calls the compilation of kernels and the capture of graphs where it reports progress.
KERNELS, GRAPHS = "kernels", "graphs"
Progress = Callable[[str, int, int], None]


def demo_weights() -> Path:
    """Directory of the demo pyramid that ships with the package: three tiny Llamas that complete Python."""
    return Path(__file__).parent / "demo"


def load(
    weights_dir: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_seq: int | None = None,
    backend: str | None = None,
    control: str | None = None,
    prefix_reuse: bool = True,
    graphs: bool | GraphKind | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Pyramid:
    """Load a pyramid and keep it.

    Args:
        weights_dir: `draft/ qualifier/ target/`, or a `pyramid.json` that names them, or one model.
        device: "cuda", "cuda:N" or "cpu"; CUDA where there is one.
        dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on CUDA and float32 on a CPU.
        max_seq: positions of the caches; by default what the models allow, at most 4096.
        backend: "triton" (the default on CUDA) or "torch" (the default on a CPU, and runs on both).
        control: "host" or "device", who ends an inner round; by default the host on a CPU.
        prefix_reuse: keep the caches between calls and process only what a prompt adds to a shared beginning.
        graphs: run rounds as CUDA graphs, see `Pyramid`; by default on CUDA under device control. Those of the
            default method are captured here, others at first use or by `Pyramid.prepare`.
        threads: of an operation on a CPU, from 1 to the CPUs this process may use. By default 1 for a pyramid whose
            largest tier has less than 64 MiB of weights, and torch's own number for others.
        progress: called with (tier, bytes read, bytes in all), while kernels are compiled with ("kernels", launches
            whose kernels are there, launches in all), and while graphs are captured with ("graphs", works captured,
            works in all).

    Raises:
        WeightsError: something is wrong with the directory, a config, a tokenizer or the tensors.
        InputError: an argument is wrong. MemoryPlanError: it would not fit; nothing was taken.
    """
    directory = PyramidDirectory.open(weights_dir)
    configs = {name: read_config(path) for name, path in directory.tiers.items()}
    tokenizers = {name: Tokenizer.from_dir(path) for name, path in directory.tiers.items()}
    vocab_size = check_family(tokenizers, configs)
    threads = check_threads(threads)
    where = _device(device)
    kind = _dtype(dtype, where)
    backend = backend or ("triton" if where.type == "cuda" else "torch")
    check_backend(backend, where)
    max_seq = _max_seq(max_seq, configs)
    host_control = control != "device" and (control == "host" or where.type == "cpu")
    params = _checked_defaults(directory)
    if threads is None and where.type == "cpu":
        threads = default_threads(max(weight_bytes(config, kind) for config in configs.values()))
    place = place_for(where, threads)
    plan = _memory_plan(configs, params, vocab_size, max_seq, kind, place.device, host_control, backend)
    plan.check()
    tiers: list[ModelTier] = []
    try:
        # Files are read on the host, whatever the application's default device is.
        with place.allocation(), torch.device("cpu"):
            for name, path in directory.tiers.items():
                told = None if progress is None else _named(progress, name)
                tiers.append(
                    ModelTier.load(
                        name,
                        path,
                        device=place.device,
                        dtype=kind,
                        max_seq=max_seq,
                        backend=backend,
                        progress=told,
                    )
                )
    except torch.OutOfMemoryError as error:
        # Another process took what was free, or it is in pieces; the traceback would hold what was loaded.
        tiers.clear()
        raise plan.error(f"the device ran out at tier {name!r}: {error}") from None
    pyramid = Pyramid(
        tiers,
        tokenizer=tokenizers["target"],
        eos_token_ids=configs["target"].eos_token_ids,
        vocab_size=vocab_size,
        defaults=directory.defaults,
        control=control,
        plan=plan,
        prefix_reuse=prefix_reuse,
        graphs=graphs,
        place=place,
    )
    if pyramid.graphs:
        told = None if progress is None else _named(progress, GRAPHS)
        compiling = None if progress is None else _named(progress, KERNELS)
        pyramid.prepare(progress=told, compiling=compiling)
    return pyramid


def generate(
    weights_dir: str | Path,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    device: str | None = None,
    **options: Unpack[Options],
) -> str:
    """Load, decode and return the text: for a script. An application keeps what `load` gives.

    Options are those of `Pyramid.generate`; errors those of `load` and `Pyramid.generate`.
    """
    SamplingParams.build(merged_options(params, options))
    with load(weights_dir, device=device) as pyramid:
        return pyramid.generate(prompt, params, **options).text


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be 'cpu' or 'cuda', found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be 'cpu' or 'cuda', found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, found {name!r}")
    return DTYPES[name]


def _max_seq(asked: int | None, configs: dict[str, LlamaConfig]) -> int:
    allowed = min(_longest_context(config) for config in configs.values())
    if asked is None:
        return min(allowed, DEFAULT_MAX_SEQ)
    if isinstance(asked, bool) or not isinstance(asked, int) or not 2 <= asked <= allowed:
        raise InputError(f"max_seq must be an integer in 2..{allowed}, the models' context; found {asked!r}")
    return asked


def _checked_defaults(directory: PyramidDirectory) -> SamplingParams:
    """The directory's defaults; bad values in a `pyramid.json` are refused by the name of the file too."""
    try:
        return SamplingParams.build({}, directory.defaults)
    except InputError as error:
        raise InputError(f"{directory.path / PYRAMID_FILE}, 'defaults': {error}") from error


def _longest_context(config: LlamaConfig) -> int:
    """Positions a model may see: those of its config; `dynamic` rope was made to go on past them."""
    stretch = config.rope.factor if config.rope.kind == "dynamic" else 1.0
    return int(config.max_position_embeddings * stretch)


def _memory_plan(
    configs: dict[str, LlamaConfig],
    params: SamplingParams,
    vocab_size: int,
    max_seq: int,
    dtype: torch.dtype,
    device: torch.device,
    host_control: bool,
    backend: str,
) -> MemoryPlan:
    """The plan for the default method of the directory."""
    rules = rules_of(best_method(len(configs)), params.rule_options)
    return plan_memory(
        configs,
        build_plan(params, rules, host_control=host_control),
        vocab_size,
        max_seq,
        dtype,
        device,
        backend,
    )
