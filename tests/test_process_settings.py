"""Process-wide settings of the application change no token and no tensor, and are as they were after a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.factories import careless

import pyramid_rt
from pyramid_rt import Pyramid
from pyramid_rt.decoding.place.neutral import _SETTINGS, neutral_settings

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "import os\n"
CALLS: tuple[dict[str, Any], ...] = (
    {"method": "ar"},
    {"method": "psd", "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 5},
    {"method": "psd", "temperature": 0.8, "seed": 7, "lossless_rule": "rejection", "logprobs": 2},
    {"method": "psd_f", "temperature": 0.5, "seed": 3, "divergence": "topk_js", "divergence_on": "processed"},
)
COMMON: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "draft_length": 2, "qualifier_length": 3}


@contextmanager
def kept(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """A setting of the process, put back in the end."""
    before = get()
    put(value)
    try:
        yield
        assert get() == value, "the setting was changed"
    finally:
        put(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
        assert torch.get_default_device() == torch.device(name)
    finally:
        torch.set_default_device(None)


_backends: Any = torch.backends


def precision(owner: Any, value: str) -> Any:
    return kept(lambda: owner.fp32_precision, lambda v: setattr(owner, "fp32_precision", v), value)


SETTINGS: dict[str, Callable[[], Any]] = {
    "float64": lambda: kept(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "float16": lambda: kept(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "bfloat16": lambda: kept(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "no gradients": lambda: kept(torch.is_grad_enabled, torch.set_grad_enabled, False),
    "gradients": lambda: kept(torch.is_grad_enabled, torch.set_grad_enabled, True),
    "inference": lambda: torch.inference_mode(),
    "deterministic": lambda: kept(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "medium products": lambda: kept(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "bfloat16 products": lambda: precision(_backends.mkldnn.matmul, "bf16"),
    "no oneDNN": lambda: kept(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    "no fused attention": lambda: kept(
        torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False
    ),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "a default generator": lambda: torch.random.fork_rng(),
}


def outcome(rt: Pyramid) -> list[Any]:
    results = [rt.generate(PROMPT, **COMMON, **call) for call in CALLS]
    return [(result.tokens, result.text, result.logprobs) for result in results]


@pytest.fixture(scope="module")
def plain(tiny: Pyramid) -> list[Any]:
    return outcome(tiny)


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_pyramid_loaded_and_run_under_a_setting(
    tiny_dir: Path, plain: list[Any], name: str, control: str
) -> None:
    with pyramid_rt.load(tiny_dir, device="cpu", control=control) as usual:
        expected = plain if control == "host" else outcome(usual)
        with SETTINGS[name]():
            assert outcome(usual) == expected
            with pyramid_rt.load(tiny_dir, device="cpu", control=control) as rt:
                assert outcome(rt) == expected
        assert outcome(usual) == expected


def test_settings_come_back_when_the_last_pyramid_is_done() -> None:
    """Two threads inside: the first that leaves must not put the setting back under the other."""
    first_left, second_in = threading.Event(), threading.Event()
    seen: list[str] = []
    owner = _backends.mkldnn.matmul

    def second() -> None:
        with neutral_settings("cpu"):
            second_in.set()
            first_left.wait(10)
            seen.append(owner.fp32_precision)

    with precision(owner, "bf16"):
        thread = threading.Thread(target=second)
        with neutral_settings("cpu"):
            thread.start()
            second_in.wait(10)
        first_left.set()
        thread.join(10)
        assert seen == ["ieee"]
        assert owner.fp32_precision == "bf16"


def test_each_setting_that_is_put_aside_is_put_back_after_an_error() -> None:
    with ExitStack() as stack:
        for setting in _SETTINGS:
            other = "tf32" if setting.neutral == "ieee" else not setting.neutral
            stack.enter_context(kept(setting.get, setting.set, other))
        with pytest.raises(ZeroDivisionError):
            _fail_inside()


def _fail_inside() -> None:
    with neutral_settings("cpu"):
        assert all(setting.get() == setting.neutral for setting in _SETTINGS)
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("torch.zeros(3)", ["torch.zeros without dtype and device"]),
        ("f(torch.tensor([1], dtype=torch.int64))", ["torch.tensor without device"]),
        ("torch.arange(4, device=d)", ["torch.arange without dtype"]),
        ("torch.full((), 1, dtype=a, device=b)", []),
        ("torch.zeros_like(x)", []),
        ("torch.empty(2, **how)", []),
    ],
)
def test_a_tensor_of_the_defaults_is_found(source: str, missing: list[str]) -> None:
    assert [text for _, text in careless(f"import torch\n{source}\n")] == missing


@pytest.mark.parametrize("room", ["pyramid_rt", "models"])
def test_every_tensor_names_its_dtype_and_device(room: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in sorted((ROOT / room).rglob("*.py"))
        if "pyramid_rt/kernels" not in str(file)
        for line, what in careless(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_warnings_about_algorithms_stay_warnings(tiny_dir: Path) -> None:
    before = torch.get_deterministic_debug_mode()
    try:
        with pyramid_rt.load(tiny_dir, device="cpu") as rt:
            for mode in (0, 1, 2):
                torch.set_deterministic_debug_mode(mode)
                rt.generate("x = ", max_new_tokens=2)
                assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(before)
