"""A fuzzer: mutated model directories, arguments of every kind, and command lines, each from a seed.

What must hold for each case: nothing but a PyramidError comes out (a clean exit with one line, on the command line),
in bounded time, nothing is left behind, and a pyramid that was loaded before decodes as before.

    PYTHONPATH=tests python -P -m fuzz --seconds 3600 --seed 7          # the long one
    PYTHONPATH=tests python -P -m fuzz directories --seed 7 --only 123  # one case again
"""
