"""The README's example runs."""

import doctest
from pathlib import Path

import blockscale
import blockscale.conformance

README = Path(__file__).parents[1] / "README.md"


def test_readme_example():
    result = doctest.testfile(str(README), module_relative=False)
    assert (result.failed, result.attempted > 5) == (0, True)


def test_docstring_examples():
    for module in (blockscale, blockscale.conformance):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted > 1) == (0, True)
