"""Watching rounds: every verify as a record of the host, and from them the trace of each committed token."""

from pyramid_rt.decoding.observing.observer import Observer, Verify
from pyramid_rt.trace import VerifyRecord

__all__ = ["Observer", "Verify", "VerifyRecord"]
