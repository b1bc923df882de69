"""The cases of bench/gpu_check on this machine's GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.gpu_cases import DTYPES, PROBLEMS
from bench.gpu_plan import check_tasks
from bench.gpu_runtime import CudaRuntime
from bench.gpu_tasks import perform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
    pytest.mark.timeout(1200),
]
OPS = (*PROBLEMS, "forward")


@pytest.fixture(scope="module")
def runtime() -> Iterator[CudaRuntime]:
    made = CudaRuntime()
    yield made
    made.release()


def wrong(runtime: CudaRuntime, kind: str, op: str, dtype: str) -> list[str]:
    """Messages of every case that fails."""
    found = []
    for task in check_tasks():
        if task.kind == kind and task.case is not None and (task.case.op, task.case.dtype) == (op, dtype):
            found += [f"{task.key}: {row['message']}" for row in perform(task, runtime) if not row["ok"]]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_against_float64(runtime: CudaRuntime, op: str, dtype: str) -> None:
    assert not wrong(runtime, "check", op, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_rows_do_not_depend_on_their_window(runtime: CudaRuntime, op: str, dtype: str) -> None:
    assert not wrong(runtime, "invariance", op, dtype)


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_every_time(runtime: CudaRuntime, op: str) -> None:
    assert not wrong(runtime, "races", op, "bfloat16")


def test_prefill_in_windows_of_any_width(runtime: CudaRuntime) -> None:
    assert not wrong(runtime, "chunks", "forward", "bfloat16")
