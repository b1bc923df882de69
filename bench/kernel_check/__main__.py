"""`python -m bench.kernel_check`."""

import sys

from bench.kernel_check.command import main

if __name__ == "__main__":
    sys.exit(main())
