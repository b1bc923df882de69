"""Statements about a backend: it can run or not, and what holds for its output."""

from __future__ import annotations

import pytest
import torch

from pyramid_rt import InputError
from pyramid_rt.models.backends import choice
from pyramid_rt.models.backends.choice import check_backend, exactness


@pytest.mark.parametrize("name", ["jax", "", None, b"torch", ["torch"], 5])
def test_what_is_no_backend_is_refused(name: object) -> None:
    with pytest.raises(InputError, match=r"^backend is .*, expected one of torch, triton$"):
        check_backend(name, torch.device("cpu"))  # type: ignore[arg-type]


def test_what_holds_is_said_per_backend_and_type() -> None:
    gpu = torch.device("cuda")
    assert "bit for bit" in exactness("triton", torch.bfloat16, gpu)
    assert "within about 1e-4" in exactness("torch", torch.float32, gpu)
    for name in ("bfloat16", "float16"):
        said = exactness("torch", getattr(torch, name), gpu)
        assert said.startswith(f"in {name} the torch backend")
        assert "can differ from ar at near ties" in said


@pytest.mark.parametrize("kept", [True, False])
def test_what_holds_on_a_cpu_is_what_was_tried(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "keeps_bits", lambda dtype: kept)
    for dtype in (torch.float32, torch.bfloat16):
        said = exactness("torch", dtype, torch.device("cpu"))
        assert ("bit for bit" in said) == kept
        assert ("1e-4" in said) == (not kept)
