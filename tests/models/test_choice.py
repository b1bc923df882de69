"""Statements about a backend: it can run or not, and what holds for its output."""

from __future__ import annotations

import pytest
import torch

from pyramid_rt import InputError
from pyramid_rt.models.backends.choice import check_backend, exactness


@pytest.mark.parametrize("name", ["jax", "", None, b"torch", ["torch"], 5])
def test_what_is_no_backend_is_refused(name: object) -> None:
    with pytest.raises(InputError, match=r"^backend is .*, expected one of torch, triton$"):
        check_backend(name, torch.device("cpu"))  # type: ignore[arg-type]


def test_what_holds_is_said_per_backend_and_type() -> None:
    assert "bit for bit" in exactness("triton", torch.bfloat16)
    assert "within about 1e-4" in exactness("torch", torch.float32)
    for name in ("bfloat16", "float16"):
        said = exactness("torch", getattr(torch, name))
        assert said.startswith(f"in {name} the torch backend")
        assert "can differ from ar at near ties" in said
