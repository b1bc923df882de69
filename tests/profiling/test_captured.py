"""Profiles whose times are a device's own records; a stand-in for the device's profiler records launches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pyramid_rt
from pyramid_rt import InputError, Pyramid
from pyramid_rt.decoding.place import HostPlace
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.models.shapes import Shape
from pyramid_rt.models.traffic import traffic
from pyramid_rt.profiling import session, table
from pyramid_rt.profiling.captured import library_kernel, retimed
from pyramid_rt.profiling.profile import Profile
from pyramid_rt.profiling.records import KernelRecord, MatchError, read_records, works
from pyramid_rt.profiling.session import Session
from pyramid_rt.profiling.spans import Span

OPTIONS: dict[str, Any] = {"method": "sd", "draft_length": 2, "max_new_tokens": 4, "seed": 4}
STREAM, OTHER = 7, 9
Change = Callable[[list[KernelRecord]], list[KernelRecord]]


class LaunchRecording:
    """Records of launches on a made-up clock: 3 us a launch and 1 us after it; beside them what a GPU has too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: list[KernelRecord] = []
        self.taken = 0
        self._patch = monkeypatch

    @contextmanager
    def taking(self) -> Iterator[None]:
        found: list[KernelRecord] = []
        run = Launch.run

        def recorded(launch: Launch) -> None:
            at = 1000.0 + 4 * len(found)
            found.append(KernelRecord(launch.name, at, at + 3, STREAM))
            run(launch)

        with self._patch.context() as patch:
            patch.setattr(Launch, "run", recorded)
            yield
        self.taken += 1
        # Another program part's kernels on a stream of its own, and a fill of one number on this one.
        strangers = [KernelRecord("qkv_kernel", record.begin, record.end, OTHER) for record in found[::5]]
        fills = [
            KernelRecord("void at::native::fill<1>()", record.end, record.end + 0.5, STREAM)
            for record in found[::7]
        ]
        self.records = [*found, *strangers, *fills]


class CallRecorder:
    """Keeps the call that CUDA's recorder would capture."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


def profiled(directory: Path, patch: pytest.MonkeyPatch) -> tuple[Profile, LaunchRecording, list[int]]:
    """A profile in whose last run rounds are captured in steps; what it recorded; the tokens of another call."""
    recording = LaunchRecording(patch)
    patch.setattr(session, "recording_for", lambda device: recording)
    with pyramid_rt.load(directory, device="cpu", backend="triton", control="device", max_seq=128) as loaded:
        pyramid = Pyramid(
            loaded.tiers,
            vocab_size=loaded.vocab_size,
            tokenizer=loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
            recorder=CallRecorder(),
            control="device",
            graphs="step",
        )
        expected = pyramid.generate("abcabc", **OPTIONS).tokens
        return pyramid.profile("abcabc", **OPTIONS), recording, expected


def ops(span: Span) -> list[Span]:
    return [part for part in span.walk() if part.kind == "op"]


@pytest.fixture(scope="module")
def taken(kernel_dir: Path) -> Iterator[tuple[Profile, LaunchRecording, list[int]]]:
    with pytest.MonkeyPatch.context() as patch:
        yield profiled(kernel_dir, patch)


Taken = tuple[Profile, LaunchRecording, list[int]]


def test_the_ops_of_a_round_have_the_times_of_its_records(taken: Taken) -> None:
    profile, recording, expected = taken
    assert profile.result.tokens == expected
    assert recording.taken == 2, "once to warm up, once for the figures"
    found = ops(profile.spans)
    own = [record for record in recording.records if record.stream == STREAM and "fill" not in record.name]
    launches = [record for record in own if record.name != "mark_kernel"]
    assert [op.args["kernel"] for op in found] == [record.name for record in launches]
    zero = min(record.begin for record in works(recording.records)[0])
    assert [(op.begin, op.end) for op in found] == [
        (record.begin - zero, record.end - zero) for record in launches
    ]
    rounds = [span for span in profile.spans.children if span.kind == "round"]
    for span in rounds:
        assert sum(child.duration for child in span.children) == pytest.approx(span.duration)
        assert ops(span)[-1].name == "report"
    for line in profile.tier_lines:  # launches of 3 us, 1 us apart
        assert line.gaps == pytest.approx(1 - 3 * line.launches / (4 * line.launches - 1))
    assert any("device's own records" in note for note in profile.notes)
    assert json.loads(json.dumps(profile.to_trace()))["traceEvents"]


def test_passes_that_were_skipped_are_labelled_and_move_nothing(taken: Taken) -> None:
    profile, _, _ = taken
    shape = Shape("tiny", 64, 64, 3, 2, 1, 64, 259)
    passes = [span for span in profile.spans.walk() if span.kind == "forward"]
    skipped = [span for span in passes if span.args.get("skipped")]
    assert 0 < len(skipped) < len(passes)
    assert len(skipped) >= sum(line.skipped for line in profile.tier_lines) > 0
    for span in passes:
        assert ("bytes" in span.args) == (span not in skipped)
    for part in profile.spans.walk():
        if part.kind not in ("burst", "verify"):
            continue
        *_, passed, decided = [child for child in part.children if child.kind != "rest"]
        assert passed.kind == "forward"
        assert decided.kind == "op"
        assert bool(decided.args.get("skipped")) == bool(passed.args.get("skipped"))
        # match over three rows of the one tile of a small vocabulary, and the state
        expected = {"sample": traffic("sample", shape, length=1), "decide": traffic("match", shape, length=3)}
        if not passed.args.get("skipped"):
            assert decided.args["bytes"] == expected[decided.name].total


def without_the_last_head(records: list[KernelRecord]) -> list[KernelRecord]:
    last = max(record.begin for record in records if record.name == "head_kernel" and record.stream == STREAM)
    return [record for record in records if record.begin != last or record.stream != STREAM]


def with_two_swapped(records: list[KernelRecord]) -> list[KernelRecord]:
    other = {"qkv_kernel": "attention_kernel", "attention_kernel": "qkv_kernel"}
    return [
        KernelRecord(other.get(record.name, record.name), record.begin, record.end, record.stream)
        for record in records
    ]


def without_a_mark(records: list[KernelRecord]) -> list[KernelRecord]:
    last = max(record.begin for record in records if record.name == "mark_kernel")
    return [record for record in records if record.begin != last]


def without_any(records: list[KernelRecord]) -> list[KernelRecord]:
    return []


def with_marks_elsewhere(records: list[KernelRecord]) -> list[KernelRecord]:
    return [*records, KernelRecord("mark_kernel", 5.0, 6.0, OTHER)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_last_head, "kernels were recorded and the round has"),
        (with_two_swapped, r"was recorded as 'attention_kernel', and launch 2 is 'qkv_kernel'"),
        (without_a_mark, "works were recorded and the call has"),
        (without_any, "recorded no kernel"),
        (with_marks_elsewhere, "marks were recorded on 2 streams"),
    ],
)
def test_records_that_are_not_the_list_are_an_error(taken: Taken, change: Change, message: str) -> None:
    profile, recording, _ = taken
    retimed(profile.spans, works(recording.records))
    with pytest.raises(MatchError, match=message):
        retimed(profile.spans, works(change(recording.records)))


def test_runs_that_wrote_other_tokens_are_not_compared(taken: Taken) -> None:
    result = taken[0].result
    session = Session(HostPlace(torch.device("cpu")), nvtx=False, graphs=None)
    with pytest.raises(InputError, match="max_time was over before anything ran"):
        session.ran(result)
    session._began = True
    session.ran(result)
    with pytest.raises(InputError, match="wrote 4 and 3 tokens"):
        session.ran(replace(result, tokens=result.tokens[:-1]))


def test_kernels_of_a_library_are_the_ops_of_a_chunk() -> None:
    forward = Span("forward", "forward", "target", 0, 9, {"tokens": 512})
    chunk = Span("prefill", "prefill of 'target'", "target", 0, 9, {}, [forward])
    root = Span("call", "call", None, 0, 9, {}, [chunk, Span("rest", "host", None, 9, 10)])
    recorded = [
        KernelRecord("void cutlass::Kernel2<cutlass_80_tensorop>(Params)", 10.0, 14.0),
        KernelRecord("void (anonymous namespace)::softmax<float, 4>(float*)", 15.0, 17.0),
        KernelRecord("nvjet_tst_64x8_64x16_TNT", 17.0, 18.0),
    ]
    made = retimed(root, [recorded])
    assert [(op.name, op.begin, op.end) for op in ops(made)] == [
        ("Kernel2", 0.0, 4.0),
        ("softmax", 5.0, 7.0),
        ("nvjet_tst_64x8_64x16_TNT", 7.0, 8.0),
    ]
    assert made.children[0].duration == made.children[0].children[0].duration == 8.0
    assert library_kernel("(int)") == "(int)"
    with pytest.raises(MatchError, match="no kernel was recorded in the prefill of 'target'"):
        retimed(root, [[]])


def test_kernels_are_read_from_a_trace_of_torch(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    kernel = {"ph": "X", "cat": "kernel", "name": "qkv_kernel", "ts": 1.5, "dur": 2.25, "args": {"stream": 7}}
    others = [
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 4.0, "dur": 1.0, "args": {"stream": 7}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.1, "dur": 1.0, "args": {}},
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    file.write_text(json.dumps({"traceEvents": [*others, kernel]}))
    assert read_records(file) == [KernelRecord("qkv_kernel", 1.5, 3.75, 7)]


def test_the_table_of_a_large_model_fits_a_terminal() -> None:
    """Names of library kernels and times of tenths of seconds, five levels down."""
    name = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3"
    at = 0.0
    passes = []
    for duration in (123_456.7, 99_960.0, 654_321.0):
        op = Span("op", name, "target", at, at + duration, {"bytes": 14_100_000_000})
        layer = Span("layer", "layer 0", "target", at, at + duration, {"layer": 0}, [op])
        passes.append(
            Span("forward", "forward", "target", at, at + duration, {"bytes": 14_100_000_000}, [layer])
        )
        at += duration
    verify = Span("verify", "verify of 'target'", "target", 0.0, at, {}, list(passes))
    root = Span("call", "call", None, 0.0, at, {}, [Span("round", "round", None, 0.0, at, {}, [verify])])
    text = table.text(table.rows(root, 4e12), table.tier_lines(root, ["target"], 4e12), ["NVIDIA H200"])
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    rows = {row.split()[0]: row for row in text.splitlines() if row.strip()}
    (kernel,) = [row for row in text.splitlines() if ".." in row]
    assert kernel.strip().startswith("cudnn_generated")
    assert kernel.split()[2:4] == ["123k", "100k-654k"]
    assert "14.1k" in rows["forward"]
