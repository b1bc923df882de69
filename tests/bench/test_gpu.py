"""The cases of bench.kernel_check on this machine's GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.kernel_check.plan import check_tasks
from bench.kernel_check.runtime import CudaRuntime
from bench.kernel_check.tasks import Task, perform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
    pytest.mark.timeout(1200),
]


def group(task: Task) -> str:
    """Kind, op and dtype: what one test runs."""
    assert task.case is not None
    return f"{task.kind}-{task.case.op}-{task.case.dtype}"


GROUPS = sorted({group(task) for task in check_tasks()})


@pytest.fixture(scope="module")
def runtime() -> Iterator[CudaRuntime]:
    made = CudaRuntime()
    yield made
    made.release()


@pytest.mark.parametrize("name", GROUPS)
def test_on_the_device(runtime: CudaRuntime, name: str) -> None:
    """Against float64; a row's bits in every window; the same bits in 100 runs; prefill in windows of any width."""
    wrong = []
    for task in check_tasks():
        if group(task) == name:
            rows = list(perform(task, runtime))
            assert rows, task.key
            wrong += [f"{task.key}: {row['message']}" for row in rows if not row["ok"]]
    assert not wrong
