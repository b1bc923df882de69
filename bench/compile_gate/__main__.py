"""`python -m bench.compile_gate`."""

import sys

from bench.compile_gate.command import main

if __name__ == "__main__":
    sys.exit(main())
