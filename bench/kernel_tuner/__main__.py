"""`python -m bench.kernel_tuner`."""

import sys

from bench.kernel_tuner.command import main

if __name__ == "__main__":
    sys.exit(main())
