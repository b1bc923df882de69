"""`python -m bench.llama_cpp`."""

from bench.llama_cpp.command import main

raise SystemExit(main())
