"""A watch over code that may not read a device value on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2"}


class NoReadOps(TorchDispatchMode):
    """Raises where an op would wait for the device; boolean-mask indexing is one of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            getattr(index, "dtype", None) == torch.bool
            for index in (args[1] if isinstance(args[1], list) else [])
        )
        if name in READS or masks:
            raise AssertionError(f"{func} reads a device value on the host")
        return func(*args, **(kwargs or {}))


class NoReadCalls(TorchFunctionMode):
    """Raises at methods that copy to the host; on a CPU they read memory without any op."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu", "item"):
            raise AssertionError(f"{func} reads a device value on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[None]:
    with NoReadCalls(), NoReadOps():
        yield
