"""Parts that the kernels share: launches as data, checks of arguments, flags that skip them, the last to arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramid_rt.kernels.limits import WINDOW

# Channels that share one partial sum of squares.
CHANNELS = 64


P = ParamSpec("P")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data: what `run` starts and what a compiler without a GPU can look at.

    Attributes:
        kernel: a function under `triton.jit`.
        grid: programs per axis.
        args: positional arguments, tensors and numbers.
        kwargs: the kernel's constexprs and the compiler's options.
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        # All tensors of a launch are on one device, its plan saw to that.
        at = next(i for i, arg in enumerate(self.args) if isinstance(arg, Tensor))
        device = self.args[at].device
        if device.type not in ("cuda", "meta") and not interpreted(self.kernel):
            name = self.kernel.arg_names[at].removesuffix("_ptr")
            raise ValueError(f"{name} is on {device}, expected a CUDA device, or Triton's interpreter")

    @property
    def name(self) -> str:
        """The kernel's name, as a device's profiler has it."""
        return str(getattr(self.kernel, "fn", self.kernel).__name__)

    def run(self) -> None:
        """Start it on the current stream."""
        self.kernel[self.grid](*self.args, **self.kwargs)

    def warmup(self) -> Any:
        """Compile it as `run` would, without starting it; the compiled kernel."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.kwargs)


def runner(plan: Callable[P, Launch]) -> Callable[P, None]:
    """The function that plans a launch and starts it at once: arguments and errors as those of `plan`."""

    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        plan(*args, **kwargs).run()

    return run


def tiles(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def interpreted(kernel: Any) -> bool:
    """True where a kernel runs in Triton's interpreter, whose bfloat16 `tl.dot` is silently wrong."""
    return not isinstance(kernel, triton.JITFunction)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device,
    *,
    contiguous: bool = False,
) -> None:
    """Refuse a tensor that a kernel does not take. None in `shape` is any size.

    The last axis must be dense; with `contiguous` all of them. Strides must not overlap (an expanded tensor).

    Raises:
        ValueError: names the argument, what was found and what was expected.
    """
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, allowed))}")
    wrong = any(want is not None and size != want for size, want in zip(tensor.shape, shape, strict=False))
    if tensor.dim() != len(shape) or wrong:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({expected})")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}, expected 1 along the last axis")
    if tensor.dim() > 1 and tensor.stride(-2) < tensor.shape[-1] and tensor.shape[-2] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}, expected rows that do not overlap")


def check_strides(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor that does not lie as another does: kernels address both by one stride."""
    if tensor.stride() != other.stride():
        raise ValueError(
            f"{name} has strides {tensor.stride()}, expected those of {other_name}: {other.stride()}"
        )


def check_scalar(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what is not one element of `dtype` on `device`, of any number of axes."""
    if tensor.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected one element")
    check_tensor(name, tensor.view(()), (), dtype, device)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.int64, device=device)


def always(device: torch.device) -> Tensor:
    """[1] int64 on the device, 1: the active flag of launches that are never skipped. Made once and never written."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _one(device)


def active_flag(active: Tensor | None, device: torch.device) -> Tensor:
    """The flag that a launch reads first, 0 where it has no work: `active`, checked, or `always`."""
    if active is None:
        return always(device)
    check_scalar("active", active, torch.int64, device)
    return active


def check_length(length: int) -> None:
    """Refuse a window of no rows or of more than 64."""
    if not 1 <= length <= WINDOW:
        raise ValueError(f"length is {length}, expected 1 to {WINDOW}")


@triton.jit
def arrive(counter_ptr: tl.tensor, expected: tl.tensor) -> tl.tensor:
    """Announce this program's partials; whether it is the last of `expected`, which resets the counter."""
    # Triton 3.6 puts no barrier before an atomic of its own: without this one, other warps' partials may
    # still be on their way when the count goes up.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
