"""A backend that writes down every op of the passes it computes; another one does the work."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.matrix import Matrix
from pyramid_rt.models.trees import Tree
from pyramid_rt.profiling.spans import Recorder


class RecordingBackend:
    """`Backend` around another, for one tier and one call. Results are the other's, untouched.

    Args:
        inner: what computes.
        recorder: takes the spans.
        tier: the tier's name.
    """

    def __init__(self, inner: Backend, recorder: Recorder, tier: str) -> None:
        self._inner, self._recorder, self._tier = inner, recorder, tier
        self._layer = -1
        self._projection = "out"
        self._sizes: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._inner.name

    @property
    def longest_window(self) -> int | None:
        """See `Backend`."""
        return self._inner.longest_window

    def window(
        self, rotary: Tensor, start: Tensor, length: int, kv_bound: int, group: int, tree: Tree | None = None
    ) -> Any:
        """See `Backend`; the pass begins here."""
        self._layer = -1
        if self._recorder.innermost != "forward":  # a pass that nobody announced, as for healing
            self._recorder.open("forward", "forward", self._tier)
        # The tensor is read when the call is over: on a GPU a look now would wait for the device.
        self._sizes = {"tokens": length, "context": start.clone()}
        self._recorder.note(**self._sizes)
        # What every layer reads: a mask and rotary rows, where the other backend makes any.
        return self._recorder.op(
            "window",
            None,
            {},
            lambda: self._inner.window(rotary, start, length, kv_bound, group, tree),
        )

    def embed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: Any) -> Tensor:
        """See `Backend`."""
        return self._recorder.op(
            "embed", None, dict(self._sizes), lambda: self._inner.embed(table, tokens, norm, window)
        )

    def qkv(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        bias: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        window: Any,
    ) -> Tensor:
        """See `Backend`; a layer begins here."""
        self._layer += 1
        return self._recorder.op(
            "qkv",
            self._layer,
            dict(self._sizes),
            lambda: self._inner.qkv(x, norm, eps, weight, bias, k_cache, v_cache, window),
        )

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: Any) -> Tensor:
        """See `Backend`."""
        self._projection = "out"
        return self._recorder.op(
            "attention",
            self._layer,
            dict(self._sizes),
            lambda: self._inner.attention(q, k_cache, v_cache, window),
        )

    def project(
        self, x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor, norm: Tensor, window: Any
    ) -> Tensor:
        """See `Backend`; out after attention, down after the MLP's first product."""
        return self._recorder.op(
            self._projection,
            self._layer,
            dict(self._sizes),
            lambda: self._inner.project(x, weight, bias, residual, norm, window),
        )

    def gate_up(
        self, x: Tensor, norm: Tensor, eps: float, weight: Matrix, bias: Tensor | None, window: Any
    ) -> Tensor:
        """See `Backend`."""
        self._projection = "down"
        return self._recorder.op(
            "gate_up",
            self._layer,
            dict(self._sizes),
            lambda: self._inner.gate_up(x, norm, eps, weight, bias, window),
        )

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        """See `Backend`."""
        return self._recorder.op(
            "head",
            None,
            {**self._sizes, "rows": rows.shape[0]},
            lambda: self._inner.head(x, rows, norm, eps, weight),
        )
