"""`python -m pyramid_rt` is the command line `pyramid-rt`."""

import sys

from pyramid_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
