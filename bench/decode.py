"""Whole rounds on this machine's GPU: host time, idle share, time to first token, memory, eager against graphs.

    python -m bench.decode --out DIR [--minutes 8] [--backend triton] [--shapes 1b,3b,8b]
    python -m bench.decode --out DIR --device cpu

Pyramids of the three Llama shapes with random weights in bfloat16: a round costs what it costs with any weights,
only the number of tokens it commits says nothing, so no tokens per second are printed for them. The embedded demo
pyramid then decodes real text by every method. Results go to DIR/gpu_decode.json section by section, so that a
kill loses nothing. Exit status 1 if outputs differ where they must not, or a section failed.

On a CPU the same runs at tiny shapes with the `torch` backend; its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pyramid_rt
from bench.harness import write_json
from bench.kernel_check.problems.base import Case, Place, Source
from bench.kernel_check.problems.model import llama_config, random_llama
from bench.kernel_check.report import environment
from bench.profiled import measure_profile
from pyramid_rt.api import DTYPES
from pyramid_rt.decoding.engine import Engine
from pyramid_rt.decoding.generation import Generation
from pyramid_rt.decoding.place import Mark
from pyramid_rt.loading.memory import plan_memory
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import KVCache
from pyramid_rt.models.shapes import SHAPES, Shape
from pyramid_rt.params import SamplingParams
from pyramid_rt.pyramid import GraphKind, Pyramid
from pyramid_rt.tuning.compare import compare

TINY = tuple(
    Shape(name, 64, 96, layers, 2, 1, 64, 515)
    for name, layers in (("tiny-1", 1), ("tiny-2", 2), ("tiny-3", 3))
)
NAMES = ("draft", "qualifier", "target")
PROMPTS = (
    "def read_config(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n\ndef main(argv=None):\n",
)
KINDS: dict[str, bool | GraphKind] = {"eager": False, "graphs": "round", "steps": "step"}
GOALS = {"host_us": 30.0, "idle": 0.02}
CONTEXT = 1024


def random_tiers(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, max_seq: int, backend: str
) -> list[ModelTier]:
    """A pyramid's tiers, small to large."""
    tiers = []
    for name, shape in zip(NAMES[-len(shapes) :], shapes, strict=True):
        config = replace(llama_config(shape, tied=False, positions=max_seq), eos_token_ids=())
        source = Source(Place(device, 80), Case("decode", str(dtype).removeprefix("torch."), shape.name, {}))
        model = random_llama(config, source, backend=backend, max_seq=max_seq)
        cache = KVCache.allocate(model.config, max_seq, dtype, device)
        tiers.append(ModelTier(name, model, cache, max_seq, Path(shape.name)))
    return tiers


class Stopwatch:
    """Seconds of work on the device, by events on CUDA and by the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, from an idle device to an idle device."""
        if not self._cuda:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1000.0


def started(pyramid: Pyramid, options: dict[str, Any], prompt: Sequence[int]) -> tuple[Engine, Generation]:
    """A generation whose prompt and first round are done, and what runs it."""
    params, _, tiers, rules = pyramid._chosen(options)
    engine = pyramid._engine(tiers, pyramid.make_plan(params, rules))
    thresholds = [rule.threshold for rule in rules]
    generation = Generation(engine, thresholds, params, 1, prompt, [], reuse=False)
    generation.start()
    generation.advance()
    return engine, generation


@contextmanager
def refusing_syncs(device: torch.device) -> Iterator[None]:
    """On CUDA, torch raises where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocations(device: torch.device) -> int:
    """Allocations that torch has made on the device since it was started."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])


def host_seconds(engine: Engine, known_end: int, rounds: int) -> list[float]:
    """Host seconds of each of some rounds while the one before it runs on the device, as in a generation."""
    found: list[float] = []
    marks: deque[Mark | None] = deque()
    for _ in range(rounds):
        begin = time.perf_counter()
        engine.run(known_end)
        found.append(time.perf_counter() - begin)
        marks.append(engine.place.mark())
        if len(marks) > 1 and (mark := marks.popleft()) is not None:
            mark.synchronize()
    return found


def measure_rounds(
    pyramid: Pyramid, options: dict[str, Any], prompt: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Host and device time of outer rounds, and what they take from allocator and host.

    `device_us` is a round's time when rounds follow each other without the host reading any; `wall_us` is what
    it takes when the host reads each, as `generate` does; their difference is time the device stands idle.
    `ended_us` is the time of a round after the text's end, in which every launch of kernels returns at once.
    `tiers_us` is a round's time in each tier's steps, where those are timed.
    """
    device = pyramid.device
    engine, generation = started(pyramid, options, prompt)
    watch = Stopwatch(device)
    before = allocations(device)

    def blind() -> None:
        for _ in range(rounds):
            engine.run(len(prompt) + 64)

    with engine.place.work():
        with refusing_syncs(device):
            engine.run(len(prompt) + 64)
        made = allocations(device) - before
        busy = watch.seconds(blind) / rounds
        host = host_seconds(engine, len(prompt) + 64, rounds)
        if bool(engine.state.ended) or int(engine.state.end) >= int(engine.state.limit):
            raise RuntimeError("the text ended while its rounds were timed: they cost next to nothing then")
        engine.state.ended.fill_(True)
        engine.run(len(prompt) + 64)  # its last decision finds that nothing more is due
        ended = watch.seconds(blind) / rounds
    engine, generation = started(pyramid, options, prompt)
    spent = generation.seconds()
    begin = time.perf_counter()
    commits = 0
    while commits < rounds and not generation.finished:
        generation.advance()
        commits += 1
    wall = (time.perf_counter() - begin) / max(commits, 1)
    tiers = [
        None if before is None or now is None else 1e6 * (now - before) / max(commits, 1)
        for before, now in zip(spent, generation.seconds(), strict=True)
    ]
    generation.close()
    launches = engine.launches()
    return {
        "method": options["method"],
        "rounds": rounds,
        "launches": launches,
        "allocations_in_a_round": made,
        "host_us": 1e6 * statistics.median(host),
        "device_us": 1e6 * busy,
        "wall_us": 1e6 * wall,
        "idle": max(0.0, 1.0 - busy / wall),
        "ended_us": 1e6 * ended,
        "ended_launch_us": None if launches is None else 1e6 * ended / launches,
        "tiers_us": tiers,
    }


def first_token_seconds(pyramid: Pyramid, length: int, repeats: int) -> float:
    """Median time to the first token of a prompt of `length` random tokens."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, pyramid.vocab_size, (length,), generator=generator).tolist()
    times = []
    for _ in range(repeats + 1):
        result = pyramid.generate(prompt, max_new_tokens=1, method="ar", ignore_eos=True)
        assert result.stats.time_to_first_token is not None
        times.append(result.stats.time_to_first_token)
    return statistics.median(times[1:])


def measure_random(
    shapes: Sequence[Shape],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    *,
    prompts: Sequence[int],
    rounds: int,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """One pyramid of random weights: memory against the plan, first tokens, rounds eager and captured."""
    max_seq = max(*prompts, CONTEXT) + 512
    configs: dict[str, LlamaConfig] = {
        name: llama_config(shape, tied=False, positions=max_seq)
        for name, shape in zip(NAMES[-len(shapes) :], shapes, strict=True)
    }
    taken = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    tiers = random_tiers(shapes, device, dtype, max_seq, backend)
    loaded = torch.cuda.memory_allocated(device) - taken if device.type == "cuda" else 0
    base: dict[str, Any] = {
        "max_new_tokens": 400,
        "draft_length": 4,
        "qualifier_length": 10,
        "ignore_eos": True,
    }
    options = {method: {**base, "method": method} for method in methods_of(len(shapes))}
    result: dict[str, Any] = {"backend": backend, "shapes": [shape.name for shape in shapes], "rounds": []}
    generator = torch.Generator().manual_seed(1)
    context = min(CONTEXT, max_seq - 450)
    prompt = torch.randint(0, shapes[-1].vocab, (context,), generator=generator).tolist()
    outputs: dict[str, list[int]] = {}
    for kind, graphs in KINDS.items() if device.type == "cuda" else [("eager", False)]:
        pyramid = Pyramid(tiers, control="device", prefix_reuse=False, graphs=graphs)
        if not graphs:
            largest = options[methods_of(len(shapes))[-1]]
            params = SamplingParams.build(largest)
            plan = plan_memory(
                configs,
                pyramid.make_plan(params, pyramid._chosen(largest)[3]),
                pyramid.vocab_size,
                max_seq,
                dtype,
                device,
                backend,
            )
            result["memory"] = {
                "planned_mib": {
                    name: (plan.weights[name] + plan.caches[name] + plan.workspaces[name]) / 2**20
                    for name in configs
                },
                "round_buffers_mib": plan.round_buffers / 2**20,
                "taken_mib": loaded / 2**20,
            }
            result["first_token_ms"] = {
                str(length): 1000.0 * first_token_seconds(pyramid, length, 3) for length in prompts
            }
            say(f"{backend}: first token after ms {result['first_token_ms']}")
        for method, chosen in options.items():
            begin = time.perf_counter()
            prepared = pyramid.prepare(**chosen)
            row = {"kind": kind, **measure_rounds(pyramid, chosen, prompt, rounds)}
            row["graphs"], row["prepare_s"] = prepared, time.perf_counter() - begin
            result["rounds"].append(row)
            say(
                f"{backend} {kind} {method}: {row['launches'] or '?'} launches, host {row['host_us']:.0f} us, device "
                f"{row['device_us']:.0f} us, wall {row['wall_us']:.0f} us, idle {row['idle']:.1%}, "
                f"{row['allocations_in_a_round']} allocations, {row['ended_us']:.0f} us after the end"
            )
            short = {**chosen, "max_new_tokens": 48}
            outputs[f"{kind} {method}"] = pyramid.generate(prompt, **short).tokens
        pyramid._kept.clear()
    if backend == "triton" and device.type == "cuda":
        pyramid = Pyramid(tiers, control="device", prefix_reuse=False)
        short = {**options[methods_of(len(shapes))[-1]], "max_new_tokens": 24}
        result["profile"] = measure_profile(pyramid, prompt, short, say)
    first = next(iter(outputs.values()))
    result["equal"] = {name: tokens == first for name, tokens in outputs.items()}
    return result


def measure_demo(device: torch.device, dtype: str, backend: str, new_tokens: int) -> dict[str, Any]:
    """Real text by every method of the demo pyramid: speed against `ar`, and whether lossless ones are."""
    rows: dict[str, Any] = {}
    with pyramid_rt.load(
        pyramid_rt.demo_weights(), device=str(device), dtype=dtype, backend=backend, control="device"
    ) as pyramid:
        for row in compare(pyramid, PROMPTS, pyramid.methods, max_new_tokens=new_tokens, repeats=3):
            rows[row.method] = {name: getattr(row, name) for name in row.__slots__}
    return rows


def measure_demo_profile(device: torch.device, dtype: str, backend: str, new_tokens: int) -> dict[str, Any]:
    """A profile of real text by the demo pyramid."""
    with pyramid_rt.load(
        pyramid_rt.demo_weights(), device=str(device), dtype=dtype, backend=backend, control="device"
    ) as pyramid:
        options = {"method": "psd", "temperature": 0.7, "max_new_tokens": new_tokens}
        return measure_profile(pyramid, PROMPTS[1], options)


def device_name(device: torch.device) -> str:
    """Its name in a result file."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def verdicts(content: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Faults and missed goals, in words."""
    wrong: list[str] = []
    missed: list[str] = []
    for name, section in content["sections"].items():
        if "error" in section:
            wrong.append(f"{name}: {section['error'].splitlines()[-1]}")
            continue
        if name.startswith("profile"):
            continue
        if name.startswith("demo"):
            for method, row in section.items():
                if row["lossless"] and row["unequal"]:
                    wrong.append(f"{name}: {method} differs from ar on {row['unequal']} prompts")
            continue
        exact = section["backend"] == "triton"
        for output, equal in section["equal"].items():
            if not equal:
                (wrong if exact else missed).append(
                    f"{name}: tokens of {output} differ from those of eager ar"
                )
        for row in section["rounds"]:
            if row["kind"] != "graphs":
                continue
            what = f"{name}: {row['method']}"
            if row["host_us"] > GOALS["host_us"]:
                missed.append(f"{what}: host {row['host_us']:.0f} us a round, goal {GOALS['host_us']:.0f}")
            if row["idle"] > GOALS["idle"]:
                missed.append(f"{what}: idle {row['idle']:.1%} of a round, goal {GOALS['idle']:.0%}")
            if exact and row["allocations_in_a_round"]:
                wrong.append(f"{what}: {row['allocations_in_a_round']} allocations in a round")
    return wrong, missed


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu")
    parser.add_argument(
        "--backend", action="append", choices=("torch", "triton"), help="default: both; torch on a CPU"
    )
    parser.add_argument(
        "--shapes", default="1b,3b,8b", help="of the pyramid, small to large, by commas; with --device cuda"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="no section begins after three quarters of them"
    )
    parser.add_argument("--commit", default=None, help="for the result file, where git does not know")
    options = parser.parse_args(argv)
    try:
        options.shapes = shapes_named(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    return options


def shapes_named(names: str) -> tuple[Shape, ...]:
    """One to three shapes by the ends of their names, as "1b,8b". Raises ValueError."""
    known = {shape.name.rsplit("-", 1)[-1]: shape for shape in SHAPES}
    wanted = names.split(",")
    if not 1 <= len(wanted) <= len(NAMES) or not set(wanted) <= set(known):
        raise ValueError(f"--shapes {names}: expected one to {len(NAMES)} of {', '.join(known)}, by commas")
    return tuple(known[name] for name in wanted)


def methods_of(tiers: int) -> tuple[str, ...]:
    """The methods whose rounds are measured: one for every number of tiers that there is."""
    return ("ar", "sd", "psd")[:tiers]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments(argv)
    begin, device = time.monotonic(), torch.device(options.device)
    cuda = device.type == "cuda"
    backends = options.backend or (["triton", "torch"] if cuda else ["torch"])
    shapes, prompts = (options.shapes, (128, 1024, 8192)) if cuda else (TINY, (16, 70))
    content: dict[str, Any] = {
        "environment": {**environment(options.commit), "device": device_name(device)},
        "sections": {},
        "left_out": [],
    }
    dtype = DTYPES[options.dtype if cuda else "float32"]
    kind = options.dtype if cuda else "float32"
    sections: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for backend in backends:
        rounds = partial(
            measure_random,
            shapes,
            device,
            dtype,
            backend,
            prompts=prompts,
            rounds=40 if cuda else 3,
            say=print,
        )
        sections.append((f"rounds, {backend}", rounds))
    for backend in backends:
        demo = partial(measure_demo, device, kind, backend, 256 if cuda else 12)
        sections.append((f"demo, {backend}", demo))
    for backend in backends:
        profiled = partial(measure_demo_profile, device, kind, backend, 96 if cuda else 12)
        sections.append((f"profile of the demo, {backend}", profiled))
    for name, work in sections:
        if time.monotonic() - begin > 45.0 * options.minutes:
            content["left_out"].append(name)
            continue
        try:
            content["sections"][name] = work()
        except Exception as error:  # one section must not cost the others
            traceback.print_exc()
            content["sections"][name] = {"error": f"{type(error).__name__}: {error}"}
        if cuda:
            torch.cuda.empty_cache()
        write_json(options.out / "gpu_decode.json", content)
    wrong, missed = verdicts(content)
    content["wrong"], content["missed"] = wrong, missed
    write_json(options.out / "gpu_decode.json", content)
    for line in missed:
        print(f"missed: {line}")
    for line in wrong:
        print(f"WRONG: {line}")
    for name in content["left_out"]:
        print(f"left out: {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
