"""`python -m bench.demo_training`."""

from bench.demo_training.command import main

if __name__ == "__main__":
    main()
