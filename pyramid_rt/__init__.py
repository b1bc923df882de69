"""Latency-first decoding of Llama-style models at batch 1 with a pyramid of three models."""

from __future__ import annotations

from pyramid_rt.api import demo_weights, generate, load
from pyramid_rt.decoding.rules import Fuzzy, Match, Rejection
from pyramid_rt.errors import (
    BusyError,
    GraphCaptureError,
    InputError,
    MemoryPlanError,
    NonFiniteLogitsError,
    PyramidError,
    UnsupportedModelError,
    WeightsError,
)
from pyramid_rt.params import SamplingParams
from pyramid_rt.pyramid import Pyramid
from pyramid_rt.result import GenerationResult, TokenLogprobs
from pyramid_rt.stats import Stats, TierStats
from pyramid_rt.streaming import AsyncStream, Stream

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "BusyError",
    "Fuzzy",
    "GenerationResult",
    "GraphCaptureError",
    "InputError",
    "Match",
    "MemoryPlanError",
    "NonFiniteLogitsError",
    "Pyramid",
    "PyramidError",
    "Rejection",
    "SamplingParams",
    "Stats",
    "Stream",
    "TierStats",
    "TokenLogprobs",
    "UnsupportedModelError",
    "WeightsError",
    "demo_weights",
    "generate",
    "load",
]
