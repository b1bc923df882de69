"""The `triton` backend, interpreted: the same logits as the oracle, one launch an op, nothing in between."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equality import assert_equal_tensors, assert_everywhere
from helpers.llamas import (
    SHAPES,
    assert_same,
    exact_logits,
    hf_model,
    load,
    rms,
    run,
    run_windows,
    save_models,
    tokens_for,
)
from torch.utils._python_dispatch import TorchDispatchMode

import pyramid_rt
from pyramid_rt import Pyramid
from pyramid_rt.errors import UnsupportedModelError
from pyramid_rt.kernels.forward.head import Noise, Placement, TileStatistics
from pyramid_rt.kernels.launch import Launch, always
from pyramid_rt.models.backends.choice import workspace_bytes
from pyramid_rt.models.backends.triton import HeadOutputs, TritonBackend, plan_pass
from pyramid_rt.models.llama import KVCache, Llama, forward

CPU = torch.device("cpu")
MAX_SEQ = 128


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def record(model: Llama, cache: KVCache, length: int, rows: list[int] | None, start: int = 0) -> list[Launch]:
    """The launches of one pass, not run."""
    launches: list[Launch] = []
    backend: Any = model.backend
    recording = replace(model, backend=backend.recorded(launches))
    chosen = None if rows is None else torch.tensor(rows)
    forward(
        recording,
        cache,
        torch.ones(length, dtype=torch.int64),
        torch.tensor(start),
        rows=chosen,
        kv_bound=start + length,
    )
    return launches


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_are_exact_to_rounding(directories: dict[str, Path], shape: str) -> None:
    model, cache = load(directories[shape], max_seq=MAX_SEQ, backend="triton")
    # Narrow and wide windows; an interpreted pass of the larger shapes takes seconds, whatever its window.
    windows = [7, 1, 17, 9] if shape == "gqa1" else [17, 1]
    tokens = tokens_for(model, sum(windows))
    logits = run_windows(model, cache, tokens, windows)
    assert_same(logits, exact_logits(hf_model(shape), torch.float32, tokens))


@pytest.mark.parametrize(("shape", "dtype"), [("gqa3", torch.bfloat16), ("gqa4", torch.float16)])
def test_half_logits_are_as_exact_as_transformers(
    directories: dict[str, Path], shape: str, dtype: torch.dtype
) -> None:
    model, cache = load(directories[shape], dtype, max_seq=MAX_SEQ, backend="triton")
    tokens = tokens_for(model, 24)
    hf: Any = hf_model(shape)
    exact = exact_logits(hf, dtype, tokens)
    theirs = hf.to(dtype)(tokens[None]).logits[0].double() - exact
    ours = run_windows(model, cache, tokens, [6, 1, 17]).double() - exact
    assert rms(theirs) > 1e-4
    # The interpreter truncates where a GPU rounds when attention's weights become bfloat16.
    slack = 2.0 if dtype == torch.bfloat16 else 1.2
    assert rms(ours) < slack * rms(theirs)


def test_a_pass_is_five_launches_a_layer_and_two_around_them(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa3"], max_seq=MAX_SEQ, backend="triton")
    layers = model.config.num_layers
    for length in (1, 17, 64):
        launches = record(model, cache, length, [length - 1])
        assert len(launches) == 5 * layers + 2
        names = Counter(launch.kernel.__name__ for launch in launches)
        assert names == {
            "embed_kernel": 1,
            "qkv_kernel": layers,
            "attention_kernel": layers,
            "project_kernel": 2 * layers,
            "gate_up_kernel": layers,
            "head_kernel": 1,
        }
    filling = record(model, cache, 30, None)
    assert len(filling) == 5 * layers - 3
    assert filling[-1].kernel.__name__ == "qkv_kernel"


class ViewsOnly(TorchDispatchMode):
    """Fails on every torch op but those that make a view."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name in ("slice", "select", "view", "alias"), f"a torch op inside a pass: {name}"
        return func(*args, **(kwargs or {}))


class Nothing(TorchDispatchMode):
    """Fails on every torch op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"a torch op inside a round: {func.overloadpacket.__name__}")


def test_no_torch_op_and_no_allocation_inside_a_pass(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa8"], max_seq=MAX_SEQ, backend="triton")
    launches: list[Launch] = []
    backend: Any = model.backend
    recording = replace(model, backend=backend.recorded(launches))
    tokens, start, rows = torch.ones(7, dtype=torch.int64), torch.tensor(3), torch.tensor([6])
    with ViewsOnly():
        forward(recording, cache, tokens, start, rows=rows, kv_bound=10)
    with ViewsOnly(), pytest.raises(AssertionError, match="a torch op inside a pass: add"):
        tokens.add(1)
    # What kernels take are weights, the cache, the caller's tensors and the buffers of load, nothing newer.
    given = (tokens, start, rows, cache.buffer, always(CPU), *_tensors(model))
    held = {t.untyped_storage().data_ptr() for t in given}
    for launch in launches:
        for argument in launch.args:
            if isinstance(argument, torch.Tensor):
                assert argument.untyped_storage().data_ptr() in held, launch.kernel.__name__


def _tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in a tree of dataclasses and sequences."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    names = getattr(value, "__dataclass_fields__", ())
    return [tensor for name in names for tensor in _tensors(getattr(value, name))]


def test_long_prefill_goes_in_windows_and_gives_the_same_cache(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa1"], max_seq=MAX_SEQ, backend="triton")
    tokens = tokens_for(model, 100)
    assert forward(model, cache, tokens, torch.tensor(0), rows=None, kv_bound=100) is None
    other = KVCache.allocate(model.config, MAX_SEQ, torch.float32, CPU)
    run_windows(model, other, tokens, [64, 36])
    assert_equal_tensors(cache.buffer, other.buffer)
    last = forward(model, cache, tokens, torch.tensor(0), rows=torch.tensor([99]), kv_bound=100)
    assert last is not None
    assert_same(last.clone(), run_windows(model, other, tokens, [64, 36])[99:])


def test_padding_rows_and_stale_rows_change_nothing(directories: dict[str, Path]) -> None:
    model, cache = load(directories["gqa4"], max_seq=MAX_SEQ, backend="triton")
    tokens = tokens_for(model, 24)
    expected = run_windows(model, cache, tokens, [20, 4])
    stale = KVCache.allocate(model.config, MAX_SEQ, torch.float32, CPU)
    stale.buffer.fill_(torch.nan)
    run(model, stale, tokens[:20], 0, kv_bound=120)
    padded = run(model, stale, torch.cat((tokens[20:], torch.full((5,), 3))), 20, kv_bound=MAX_SEQ + 64)[:4]
    assert_equal_tensors(padded, expected[20:])
    assert_everywhere(stale.buffer[:, :, :, :29].isfinite(), stale.buffer[:, :, :, :29])
    assert_everywhere(stale.buffer[:, :, :, 29:].isnan(), stale.buffer[:, :, :, 29:])


def test_planned_bytes_are_those_allocated(directories: dict[str, Path]) -> None:
    model, _ = load(directories["gqa3"], torch.bfloat16, max_seq=MAX_SEQ, backend="triton")
    assert isinstance(model.backend, TritonBackend)
    held = sum(tensor.nbytes for tensor in _tensors(model.backend.buffers))
    assert model.backend.buffers.nbytes() == held
    assert workspace_bytes("triton", model.config, MAX_SEQ, torch.bfloat16, CPU) == held
    assert workspace_bytes("torch", model.config, MAX_SEQ, torch.bfloat16, CPU) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, "head_dim is 16; backend 'triton' takes 64, 96, 128"),
        ({"num_heads": 9, "num_kv_heads": 1}, "9 heads share 1 KV heads, 9 to one"),
    ],
)
def test_shapes_the_kernels_do_not_take_are_refused(
    directories: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    model, _ = load(directories["gqa1"])
    config = replace(model.config, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        TritonBackend.allocate(config, max_seq=8, dtype=torch.float32, device=CPU)


def test_a_recorded_pass_can_be_run_again_elsewhere(directories: dict[str, Path]) -> None:
    """The same launches, after the scalars on the device have moved on."""
    begin, width, decided, count = 5, 4, 7, 3
    model, cache = load(directories["gqa3"], max_seq=MAX_SEQ, backend="triton")
    vocab = model.config.vocab_size
    padded = -(-vocab // 4) * 4
    tokens = tokens_for(model, MAX_SEQ)
    expected = run_windows(
        model, KVCache.allocate(model.config, MAX_SEQ, torch.float32, CPU), tokens[:80], [64, 16]
    )
    run_windows(model, cache, tokens[:5], [5])
    start, first_decided, first = (torch.tensor(value) for value in (begin, decided, decided - 1))
    outputs = HeadOutputs(
        vocab,
        torch.full((6, padded), torch.nan),
        TileStatistics(
            *(torch.zeros(6, -(-padded // 64), dtype=kind) for kind in (*[torch.float32] * 3, torch.int32))
        ),
        Noise(torch.tensor([1, 2]), None, torch.tensor(0.0)),
    )
    placement = Placement(start, first_decided, first, count)
    with ViewsOnly():
        launches = plan_pass(
            model, cache, tokens, start, width=width, kv_bound=MAX_SEQ, placement=placement, outputs=outputs
        )
    for launch in launches:
        launch.run()
    assert_same(outputs.rows[1 : 1 + count, :vocab], expected[decided - 1 : decided - 1 + count])
    best = expected[decided - 1 : decided - 1 + count].argmax(-1)
    assert outputs.statistics.best[1 : 1 + count].argmax(-1).tolist() == (best // 64).tolist()
    assert_everywhere(outputs.rows[0].isnan(), outputs.rows[0])
    assert len(launches) == 5 * model.config.num_layers + 2
    start.add_(4)
    first_decided.add_(4)
    for launch in launches:
        launch.run()
    assert_same(outputs.rows[5:6, :vocab], expected[decided + 3 : decided + 4])


# A pyramid small enough to be interpreted from prompt to text.


PROMPT = "for name in names:\n    print(name)\n" * 2  # more than one window of 64


@pytest.mark.parametrize(
    ("method", "temperature", "control", "extra"),
    [
        ("ar", 0.7, "host", {}),
        ("psd", 0.0, "host", {}),
        ("ar", 0.0, "device", {}),
        ("sd", 0.0, "device", {}),
        ("sd", 0.7, "device", {"lossless_rule": "rejection"}),
        ("psd", 0.0, "device", {}),
        ("psd", 0.7, "device", {"top_k": 9, "min_p": 0.01}),
        ("psd_f", 0.7, "device", {"divergence": "topk_js", "divergence_on": "processed"}),
    ],
)
def test_tokens_equal_those_of_the_torch_backend(
    micro_dir: Path, method: str, temperature: float, control: str, extra: dict[str, Any]
) -> None:
    """Under host control torch decides on the kernels' logits, under device control kernels decide too."""
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "method": method,
        "temperature": temperature,
        "seed": 5,
        "draft_length": 2,
        "qualifier_length": 3,
        "qualifier_threshold": 0.2,
        "target_threshold": 0.2,
        **extra,
    }
    results, rounds = {}, {}
    for backend in ("torch", "triton"):
        with pyramid_rt.load(
            micro_dir, device="cpu", max_seq=160, backend=backend, control=control
        ) as pyramid:
            results[backend] = pyramid.generate(PROMPT, **options)
            rounds[backend] = next(iter(pyramid._kept.values())).launches()
    torch_result, triton_result = results["torch"], results["triton"]
    assert triton_result.tokens == torch_result.tokens
    assert triton_result.text == torch_result.text
    assert len(triton_result.tokens) == 8
    assert rounds["torch"] is None
    assert (rounds["triton"] is None) == (control == "host")
    for ours, theirs in zip(triton_result.stats.tiers, torch_result.stats.tiers, strict=True):
        assert (ours.proposed, ours.accepted, ours.survived) == (
            theirs.proposed,
            theirs.accepted,
            theirs.survived,
        )
        assert ours.forwards == theirs.forwards
    if method != "ar":
        assert sum(tier.accepted or 0 for tier in triton_result.stats.tiers) > 0


@pytest.mark.parametrize(
    ("method", "extra", "decisions"),
    [
        ("ar", {}, 1),
        ("sd", {}, 2 + 1),
        ("psd", {}, 2 * (2 + 1) + 1),
        ("sd", {"temperature": 0.7, "top_k": 5}, 2 * (2 + 1)),
    ],
)
def test_a_round_is_its_passes_and_a_launch_for_each_decision(
    micro_dir: Path, method: str, extra: dict[str, Any], decisions: int
) -> None:
    """5 L + 2 launches a pass and one a decision, two with filters; one more makes the report."""
    passes = {
        "ar": {"target": 1},
        "sd": {"draft": 2, "target": 1},
        "psd": {"draft": 4, "qualifier": 2, "target": 1},
    }[method]
    with pyramid_rt.load(micro_dir, device="cpu", max_seq=160, backend="triton", control="device") as pyramid:
        pyramid.prepare(method=method, draft_length=2, qualifier_length=4, **extra)
        layers = {tier.name: tier.config.num_layers for tier in pyramid.tiers}  # type: ignore[attr-defined]
        found = next(iter(pyramid._kept.values())).launches()
    assert found == sum(count * (5 * layers[name] + 2) for name, count in passes.items()) + decisions + 1


def test_a_round_of_kernels_runs_no_torch_op(micro_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but launches, the report included, so nothing is allocated and nothing read by the host."""
    ran: list[str] = []
    options: dict[str, Any] = {"draft_length": 2, "qualifier_length": 4, "temperature": 0.7, "top_p": 0.9}
    with pyramid_rt.load(micro_dir, device="cpu", max_seq=160, backend="triton", control="device") as pyramid:
        pyramid.prepare(method="psd", lossless_rule="rejection", **options)
        engine = next(iter(pyramid._kept.values()))
        engine._rounds.stages(engine._rounds.capacity)  # type: ignore[attr-defined]
        monkeypatch.setattr(Launch, "run", lambda launch: ran.append(launch.kernel.__name__))
        with Nothing():
            engine.run(100)
        with Nothing(), pytest.raises(AssertionError, match="add"):
            engine.state.end.add(1)
    assert len(ran) == engine.launches()
    assert ran[-1] == "report_kernel"
    assert {"embed_kernel", "head_kernel", "sample_kernel"} <= set(ran)


class CallRecorder:
    """Warms up as CUDA's recorder does, then keeps the call."""

    def __init__(self) -> None:
        self.names = 0

    def capture(self, work: Any) -> Any:
        work()
        self.names += 1
        return work


@pytest.mark.parametrize(("kind", "graphs"), [("round", 4), ("step", 7)])
def test_captured_launches_write_the_same_text(micro_dir: Path, kind: Any, graphs: int) -> None:
    """Prompt windows, the first token and rounds, each captured once, in a parked state that leaves no trace."""
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "method": "sd",
        "draft_length": 2,
        "temperature": 0.7,
        "seed": 2,
    }
    with pyramid_rt.load(micro_dir, device="cpu", max_seq=96, backend="torch", control="device") as pyramid:
        expected = pyramid.generate(PROMPT, **options).tokens
    recorder = CallRecorder()
    with pyramid_rt.load(micro_dir, device="cpu", max_seq=96, backend="triton", control="device") as loaded:
        pyramid = Pyramid(
            loaded.tiers,
            vocab_size=loaded.vocab_size,
            tokenizer=loaded.tokenizer,
            recorder=recorder,
            control="device",
            graphs=kind,
        )
        result = pyramid.generate(PROMPT, **options)
        # The target's fill, its first token, the draft's fill and the round; or stepwise the first token with its
        # report, and of the round the burst, the verify and the report.
        assert recorder.names == graphs
        again = pyramid.generate(PROMPT, **options)
        assert recorder.names == graphs
    assert result.tokens == again.tokens == expected
    assert again.stats.reused_tokens == len(PROMPT) - 1


def test_temperature_zero_is_no_plan_of_its_own(micro_dir: Path) -> None:
    with pyramid_rt.load(micro_dir, device="cpu", max_seq=160, backend="triton", control="device") as pyramid:
        for temperature in (0.0, 0.7):
            pyramid.prepare(method="sd", temperature=temperature)
        assert len(pyramid._kept) == 1


def test_unknown_shape_is_named_by_load(tiny_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="head_dim is 16"):
        pyramid_rt.load(tiny_dir, device="cpu", backend="triton")
    assert json.loads((tiny_dir / "target" / "config.json").read_text())["num_attention_heads"] == 4
