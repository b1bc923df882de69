"""The backend that a tier runs on, chosen once and explicitly at load; there is no silent fallback."""

from __future__ import annotations

import torch

from pyramid_rt.errors import InputError
from pyramid_rt.models.backends.base import Backend
from pyramid_rt.models.backends.cpu import CpuBackend, keeps_rows
from pyramid_rt.models.backends.row_check import keeps_bits
from pyramid_rt.models.backends.torch import TorchBackend
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.matrix import can_pack

BACKENDS = ("torch", "triton")


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that is unknown or cannot run on a device; there is no silent fallback.

    Raises:
        InputError: names the backend, the device and what would do.
    """
    if not isinstance(name, str):
        raise InputError(f"backend is of type {type(name).__name__}, expected one of {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise InputError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "torch":
        return
    try:
        from triton import knobs
    except ImportError as error:
        raise InputError(
            f"backend 'triton' needs the package triton (for Windows it is called triton-windows): {error}; "
            "backend='torch' runs without it"
        ) from error
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise InputError(
            f"backend 'triton' runs on CUDA devices, found {str(device)!r}; on a CPU use backend='torch' "
            "(or, for tests, Triton's interpreter: TRITON_INTERPRET=1 before anything is imported)"
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise InputError(
                f"backend 'triton' needs compute capability 8.0 or newer, found {major}.{minor} "
                f"({torch.cuda.get_device_name(device)}); use backend='torch'"
            )


def exactness(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """A lossless method's output beside plain decoding's, in a sentence for people.

    Kernels add in one order whatever a window's width, and so does the `torch` backend on a CPU with oneDNN, which is
    tried here. torch's libraries elsewhere do not: in the wider window of a verify two scores can be rounded to the
    other order, and the coarser the type, the further apart they may lie.
    """
    if name == "triton":
        return "lossless methods give the tokens of ar, bit for bit"
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and keeps_bits(dtype):
        return f"lossless methods give the tokens of ar, bit for bit in {kind}, as a trial on this processor shows"
    if dtype == torch.float32:
        return "lossless methods give the tokens of ar, but where the target's two best scores lie within about 1e-4"
    return (
        f"in {kind} the torch backend rounds by the width of a window here: lossless methods can differ from ar at "
        "near ties, in about one of six short texts; float32 does not, but within about 1e-4"
    )


def make_backend(
    name: str,
    config: LlamaConfig,
    device: torch.device,
    *,
    dtype: torch.dtype,
    max_seq: int,
) -> Backend:
    """The backend of one tier, chosen once at load, with whatever buffers it needs.

    Args:
        name: `torch` or `triton`.
        config: the tier's shape.
        device: where the tier lives.
        dtype: its weights' type.
        max_seq: positions of its cache, slack excluded.

    Raises:
        InputError: as `check_backend`.
        UnsupportedModelError: a shape that the kernels do not take.
    """
    check_backend(name, device)
    if name == "triton":
        # Only here: importing Triton takes longer than loading a small model.
        from pyramid_rt.models.backends.triton import TritonBackend

        return TritonBackend.allocate(config, max_seq=max_seq, dtype=dtype, device=device)
    return CpuBackend() if keeps_rows(device, dtype) else TorchBackend()


def workspace_bytes(
    name: str, config: LlamaConfig, max_seq: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that a tier takes besides its weights and cache; takes none. Errors as `make_backend`.

    With `triton` they are its buffers; with `torch` the packed copy of an embedding that serves as the head too.
    """
    check_backend(name, device)
    if name == "torch":
        rows, columns = config.vocab_size, config.hidden_size
        copied = config.tie_word_embeddings and can_pack(device, dtype)
        return rows * columns * dtype.itemsize if copied else 0
    from pyramid_rt.models.backends.triton import buffer_bytes

    return buffer_bytes(config, max_seq, dtype, device)
