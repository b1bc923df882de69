"""The way in: `load` a pyramid, or `generate` in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch

from pyramid_rt import checks
from pyramid_rt.decoding.chains import build_plan
from pyramid_rt.decoding.methods import best_method, methods_for, rules_of, tiers_of
from pyramid_rt.decoding.place import Place, place_for
from pyramid_rt.decoding.place.threads import check_threads, default_threads
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.errors import InputError, MemoryPlanError
from pyramid_rt.loading.defaults import checked_defaults
from pyramid_rt.loading.directory import PYRAMID_FILE, PyramidDirectory, check_family
from pyramid_rt.loading.memory import MemoryPlan, plan_memory
from pyramid_rt.loading.model_tier import LaterTier, ModelTier
from pyramid_rt.loading.weights import check_model, read_config
from pyramid_rt.models.backends.choice import check_backend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import weight_bytes
from pyramid_rt.params import Options, SamplingParams, merged_options
from pyramid_rt.pyramid import GraphKind, Prompt, Pyramid
from pyramid_rt.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MAX_SEQ = 4096

# What `load` calls the compilation of kernels and the capture of graphs where it reports progress.
KERNELS, GRAPHS = "kernels", "graphs"
Progress = Callable[[str, int, int], None]

_log = logging.getLogger("pyramid_rt.loading")


def demo_weights() -> Path:
    """Directory of the demo pyramid that ships with the package: three tiny Llamas that complete Python."""
    return Path(__file__).parent / "demo"


def load(
    weights_dir: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_seq: int | None = None,
    backend: str | None = None,
    control: str | None = None,
    prefix_reuse: bool = True,
    graphs: bool | GraphKind | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Pyramid:
    """Load a pyramid and keep it.

    Everything is checked and the memory of all tiers is planned; weights are read of those tiers that the default
    method needs, of others when a call first needs them.

    Args:
        weights_dir: `draft/ qualifier/ target/`, or a `pyramid.json` that names them, or one model.
        device: "cuda", "cuda:N" or "cpu"; CUDA where there is one.
        dtype: "float32", "bfloat16" or "float16", or torch's; by default bfloat16 on CUDA and float32 on a CPU.
        max_seq: positions of the caches; by default what the models allow, at most 4096.
        backend: "triton" (the default on CUDA) or "torch" (the default on a CPU, and runs on both).
        control: "host" or "device", who ends an inner round; by default the host on a CPU.
        prefix_reuse: keep the caches between calls and process only what a prompt adds to a shared beginning.
        graphs: run rounds as CUDA graphs, see `Pyramid`; by default on CUDA under device control. Those of the
            default method are captured here, others at first use or by `Pyramid.prepare`.
        threads: of an operation on a CPU, from 1 to the CPUs this process may use. By default 1 for a pyramid whose
            largest tier has less than 16 MiB of weights, and torch's own number for others.
        progress: called with (tier, bytes read, bytes in all), while kernels are compiled with ("kernels", launches
            whose kernels are there, launches in all), and while graphs are captured with ("graphs", works captured,
            works in all).

    Raises:
        WeightsError: something is wrong with the directory, a config, a tokenizer or the tensors.
        InputError: an argument is wrong. MemoryPlanError: it would not fit; nothing was taken.
    """
    threads = check_threads(threads)
    where = _device(device)
    kind = _dtype(dtype, where)
    backend = ("triton" if where.type == "cuda" else "torch") if backend is None else backend
    check_backend(backend, where)
    control = None if control is None else checks.choice("control", control, ("host", "device"))
    prefix_reuse = checks.flag("prefix_reuse", prefix_reuse)
    if progress is not None and not callable(progress):
        raise InputError(f"progress must be something to call, found {checks.shown(progress)}")
    graphs = _graphs(graphs)
    directory = PyramidDirectory.open(weights_dir)
    configs = {name: read_config(path) for name, path in directory.tiers.items()}
    max_seq = _max_seq(max_seq, configs)
    tokenizers = {name: Tokenizer.from_dir(path) for name, path in directory.tiers.items()}
    vocab_size = check_family(tokenizers, configs)
    for name, path in directory.tiers.items():
        check_model(path, configs[name])
    if threads is None and where.type == "cpu":
        threads = default_threads(max(weight_bytes(config, kind) for config in configs.values()))
    place = place_for(where, threads)
    host_control = control != "device" and (control == "host" or where.type == "cpu")
    method, round_plan = _default_round(directory, host_control)
    plan = plan_memory(configs, round_plan, vocab_size, max_seq, kind, place.device, backend)
    plan.check()
    loader = _Loader(directory, configs, plan, place, kind, max_seq, backend, progress)
    pyramid = Pyramid(
        loader.tiers(method),
        tokenizer=tokenizers["target"],
        eos_token_ids=_end_ids(directory, configs["target"], vocab_size),
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


@dataclass(frozen=True, slots=True)
class _Loader:
    """Loads the tiers of a directory as they were planned."""

    directory: PyramidDirectory
    configs: dict[str, LlamaConfig]
    plan: MemoryPlan
    place: Place
    dtype: torch.dtype
    max_seq: int
    backend: str
    progress: Progress | None

    def tiers(self, method: str) -> list[ModelTier]:
        """All tiers, small to large; those that `method` does not need will be loaded later."""
        names = list(self.configs)
        needed = {names[index] for index in tiers_of(method, len(names))}
        tiers: list[ModelTier] = []
        try:
            for name in names:
                tiers.append(self.tier(name, self.progress) if name in needed else self.later(name))
        except MemoryPlanError:
            # The traceback would hold what was loaded.
            tiers.clear()
            raise
        return tiers

    def tier(self, name: str, progress: Progress | None) -> ModelTier:
        """One tier. Raises MemoryPlanError: another process took what was free, or it is in pieces."""
        try:
            # Files are read on the host, whatever the application's default device is.
            with self.place.allocation(), torch.device("cpu"):
                return ModelTier.load(
                    name,
                    self.directory.tiers[name],
                    device=self.place.device,
                    dtype=self.dtype,
                    max_seq=self.max_seq,
                    backend=self.backend,
                    progress=None if progress is None else _named(progress, name),
                )
        except torch.OutOfMemoryError as error:
            raise self.plan.error(f"the device ran out at tier {name!r}: {error}") from None

    def later(self, name: str) -> LaterTier:
        """The same, loaded when it is needed; nobody is told of its progress then."""
        return LaterTier(
            name,
            self.directory.tiers[name],
            self.configs[name],
            max_seq=self.max_seq,
            device=self.place.device,
            backend=self.backend,
            load=lambda: self.tier(name, None),
        )


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = str(name) if isinstance(name, torch.device) else checks.text("device", name, "'cpu' or 'cuda'")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"device must be 'cpu' or 'cuda', found {checks.shown(name)}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be 'cpu' or 'cuda', found {checks.shown(name)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _graphs(asked: bool | GraphKind | None) -> bool | GraphKind | None:
    if asked is None or (isinstance(asked, str) and asked in ("round", "step")):
        return asked
    try:
        return checks.flag("graphs", asked)
    except InputError:
        raise InputError(
            f"graphs must be True, False, 'round' or 'step', found {checks.shown(asked)}"
        ) from None


def _dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, found {checks.shown(name)}")
    return DTYPES[name]


def _max_seq(asked: int | None, configs: dict[str, LlamaConfig]) -> int:
    allowed = min(config.longest_context for config in configs.values())
    if asked is None:
        return min(allowed, DEFAULT_MAX_SEQ)
    try:
        return checks.whole("max_seq", asked, 2, allowed)
    except InputError:
        window = any(config.sliding_window == allowed for config in configs.values())
        raise InputError(
            f"max_seq must be an integer in 2..{allowed}, the models' {'sliding window' if window else 'context'}; "
            f"found {checks.shown(asked)}"
        ) from None


def _end_ids(directory: PyramidDirectory, target: LlamaConfig, vocab_size: int) -> list[int]:
    """The target's end-of-sequence ids that can be decoded at all."""
    kept = [index for index in target.eos_token_ids if index < vocab_size]
    if len(kept) < len(target.eos_token_ids):
        _log.warning(
            "%s: end-of-sequence ids %s lie in rows beyond the %d that all tiers share, and are never produced",
            directory.tiers["target"],
            [index for index in target.eos_token_ids if index >= vocab_size],
            vocab_size,
        )
    return kept


def _default_round(directory: PyramidDirectory, host_control: bool) -> tuple[str, RoundPlan]:
    """The directory's default method, and the shape of its rounds; bad defaults are refused by the file's name."""
    file = directory.path / PYRAMID_FILE
    defaults = checked_defaults(file, directory.defaults)
    count = len(directory.tiers)
    named = defaults.common.get("method")
    method = named if named in methods_for(count) else best_method(count)
    assert method is not None
    params = SamplingParams.build({}, defaults.of_method(method))
    try:
        return method, build_plan(params, rules_of(method, params.rule_options), host_control=host_control)
    except InputError as error:
        raise InputError(f"{file}, 'defaults': {error}") from error
