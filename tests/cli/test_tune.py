"""`blockscale tune` says what it needs before it asks for a card."""

import pytest
from typer.testing import CliRunner

from blockscale.cli import app
from blockscale.errors import BlockscaleError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune: needs a checkpoint or --shape N,K"),
        (["--shape", "2112"], "tune: --shape needs N,K, got '2112'"),
        (["--shape", "2112,x"], "tune: --shape N,K needs whole numbers from 1 up, got '2112,x'"),
        (["--shape", "2112,7168", "--m", "0"], "tune: --m M,M … needs whole numbers from 1 up, got '0'"),
        (["--shape", "2112,7168", "--device", "cpu"], "the Hopper kernels do not serve 2112x7168 on cpu:"),
        (["--shape", "2112,7168", "--device", "gpu"], "device 'gpu': need cpu, cuda, xpu or another"),
    ],
)
def test_wrong_input(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert isinstance(result.exception, BlockscaleError)
    assert message in str(result.exception)
