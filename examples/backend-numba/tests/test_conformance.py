"""The whole of the package's tests: every case that it accepts, held to the definition."""

from blockscale.conformance.testing import conformance_test

test_conformance = conformance_test("numba")
