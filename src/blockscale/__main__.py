"""`python -m blockscale` is the command line, also under torchrun."""

from .cli import main

main()
