"""The tokenizers library behind one door: whatever it raises, panics included, is a `TokenizerError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyramid_rt.errors import PyramidError, TokenizerError

# Panics of Rust code arrive as a class of this module, which is no Exception: `except Exception` lets it through.
_PANIC_MODULE = "pyo3_runtime"


@contextmanager
def library(what: str) -> Iterator[None]:
    """Run calls of the library. `what` begins the message of an error: the file, and what was tried."""
    try:
        yield
    except PyramidError:
        raise
    except Exception as error:  # the binding raises bare Exception for whatever it dislikes
        raise TokenizerError(f"{what}: {error}") from error
    except BaseException as error:
        if type(error).__module__ != _PANIC_MODULE:
            raise
        raise TokenizerError(f"{what}: the tokenizers library broke down: {error}") from error
