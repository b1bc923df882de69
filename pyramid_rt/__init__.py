"""Latency-first decoding of Llama-style models at batch 1 with a pyramid of three models.

Names are imported when they are first used, so that `import pyramid_rt` is quick and the command line can take
Ctrl-C while torch is still loading. Type checkers, `dir()` and `from pyramid_rt import *` see all of them.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramid_rt.api import demo_weights, generate, load
    from pyramid_rt.decoding.rules import Fuzzy, Match, Rejection
    from pyramid_rt.errors import (
        BusyError,
        GraphCaptureError,
        InputError,
        MemoryPlanError,
        NonFiniteLogitsError,
        PyramidError,
        TokenizerError,
        UnsupportedModelError,
        WeightsError,
    )
    from pyramid_rt.params import Options, SamplingParams
    from pyramid_rt.profiling.profile import Profile
    from pyramid_rt.pyramid import Pyramid
    from pyramid_rt.result import GenerationResult, GenerationTrace, TokenLogprobs
    from pyramid_rt.stats import Stats, TierStats
    from pyramid_rt.streaming import AsyncStream, Stream
    from pyramid_rt.trace import JudgedToken, TokenTrace, VerifyRecord

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "BusyError",
    "Fuzzy",
    "GenerationResult",
    "GenerationTrace",
    "GraphCaptureError",
    "InputError",
    "JudgedToken",
    "Match",
    "MemoryPlanError",
    "NonFiniteLogitsError",
    "Options",
    "Profile",
    "Pyramid",
    "PyramidError",
    "Rejection",
    "SamplingParams",
    "Stats",
    "Stream",
    "TierStats",
    "TokenLogprobs",
    "TokenTrace",
    "TokenizerError",
    "UnsupportedModelError",
    "VerifyRecord",
    "WeightsError",
    "demo_weights",
    "generate",
    "load",
]

# The same as the imports above, module by module.
_EXPORTS = {
    "pyramid_rt.api": ("demo_weights", "generate", "load"),
    "pyramid_rt.decoding.rules": ("Fuzzy", "Match", "Rejection"),
    "pyramid_rt.errors": (
        "BusyError",
        "GraphCaptureError",
        "InputError",
        "MemoryPlanError",
        "NonFiniteLogitsError",
        "PyramidError",
        "TokenizerError",
        "UnsupportedModelError",
        "WeightsError",
    ),
    "pyramid_rt.params": ("Options", "SamplingParams"),
    "pyramid_rt.profiling.profile": ("Profile",),
    "pyramid_rt.pyramid": ("Pyramid",),
    "pyramid_rt.result": ("GenerationResult", "GenerationTrace", "TokenLogprobs"),
    "pyramid_rt.stats": ("Stats", "TierStats"),
    "pyramid_rt.streaming": ("AsyncStream", "Stream"),
    "pyramid_rt.trace": ("JudgedToken", "TokenTrace", "VerifyRecord"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
# Modules that `import pyramid_rt` alone has always made reachable as attributes.
_MODULES = frozenset({"api", "decoding", "errors", "loading", "params", "pyramid", "result", "stats"}) | {
    "streaming",
    "text",
}

# An application that configures no logging hears nothing; one that does finds all of it under "pyramid_rt".
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """The first use of a name imports the module it is in."""
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
