"""The command line `pyramid-rt`: what it takes, what it prints."""

from pyramid_rt.cli.command import main

__all__ = ["main"]
