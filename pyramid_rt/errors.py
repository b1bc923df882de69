"""Errors of pyramid_rt: one small hierarchy, every message names what was wrong, found and expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyramid_rt.result import GenerationResult


class PyramidError(Exception):
    """Base of every error that pyramid_rt raises on purpose."""


class InputError(PyramidError, ValueError):
    """A prompt or an option of a call is wrong; the message names the parameter."""


class WeightsError(PyramidError):
    """A weights directory, or a file in it, is missing, damaged or contradicts itself."""


class TokenizerError(WeightsError):
    """The tokenizers library failed with a model's tokenizer: at its file, or at a text or ids given to it later."""


class UnsupportedModelError(WeightsError):
    """The model is of a kind that this runtime does not decode; the message names the config entry."""


class MemoryPlanError(PyramidError, MemoryError):
    """The tiers do not fit into the device's memory; the message holds the plan."""


class GraphCaptureError(PyramidError, RuntimeError):
    """A round could not be captured as a CUDA graph; the message says which, where and what to do instead."""


class BusyError(PyramidError, RuntimeError):
    """The pyramid cannot take the call: it is closed, or this thread's own stream is still open."""


class NonFiniteLogitsError(PyramidError, ArithmeticError):
    """A tier produced NaN or infinite logits. What had been committed before stands.

    Attributes:
        tier: name of the tier.
        position: absolute position of the token that could not be decided.
        partial: the result up to the last commit, or None when nothing had been committed.
    """

    def __init__(self, tier: str, position: int, partial: GenerationResult | None = None) -> None:
        super().__init__(f"tier {tier!r} gave non-finite logits for position {position}")
        self.tier = tier
        self.position = position
        self.partial = partial
