"""Process-wide settings of torch that change results, put aside while the runtime computes.

Default dtype, default device and gradients are not among them: tensors here name their dtype and device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class _Setting:
    """A setting of torch, and its value under which results are those that are documented."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    neutral: Any


def _precision(owner: Any) -> _Setting:
    """float32 products in full: "none" is full too, unless a wider setting says otherwise."""
    return _Setting(lambda: owner.fp32_precision, partial(setattr, owner, "fp32_precision"), "ieee")


_backends: Any = torch.backends

_SETTINGS = (
    _precision(_backends.mkldnn.matmul),
    _precision(_backends.cuda.matmul),
    _Setting(torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, True),
    _Setting(torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True),
    _Setting(
        torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp, True
    ),
    _Setting(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, True),
    # The mode tells errors from warnings, which "enabled or not" does not.
    _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
)

_lock = threading.Lock()
_inside = 0
_aside: list[tuple[_Setting, Any]] = []


@contextmanager
def neutral_settings(device_type: str) -> Iterator[None]:
    """Settings of the process are neutral inside, for every thread; autocast is off in the calling one.

    The first that comes in puts them aside and the last that goes out puts them back, so that pyramids in several
    threads do not take each other's settings for the application's.
    """
    _enter()
    try:
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                yield
        else:
            yield
    finally:
        _leave()


def _enter() -> None:
    global _inside
    with _lock:
        _inside += 1
        if _inside > 1:
            return
        for setting in _SETTINGS:
            found = setting.get()
            if found != setting.neutral and found != "none":
                _aside.append((setting, found))
                setting.set(setting.neutral)


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            while _aside:
                setting, found = _aside.pop()
                setting.set(found)
