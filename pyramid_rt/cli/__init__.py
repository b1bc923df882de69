"""The command line `pyramid-rt`: what it takes, what it prints. Importing it is light; torch comes with a command."""

from pyramid_rt.cli.program import main

__all__ = ["main"]
