"""`python -m blockscale` is the command line, also under torchrun."""

if __name__ == "__main__":  # spawned workers import this module under another name, and need no commands
    from .cli import main

    main()
