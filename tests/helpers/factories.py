"""Finds calls of torch that make a tensor without saying of which dtype, or where."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# What takes its dtype and device from the process's defaults where they are not given.
FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
# What takes them from data that may have none of its own.
CONVERTERS = {"as_tensor", "asarray", "Tensor"}


def careless(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is missing) of each such call: `torch.zeros(3)`, `torch.tensor(x, dtype=d)`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if not (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id == "torch"
            and function.attr in FACTORIES | CONVERTERS
        ):
            continue
        given = {keyword.arg for keyword in node.keywords}
        missing = [name for name in ("dtype", "device") if name not in given]
        if missing and None not in given:
            yield node.lineno, f"torch.{function.attr} without {' and '.join(missing)}"
