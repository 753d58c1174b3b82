import pytest
import transformers

from blockscale.checkpoint import quantize_checkpoint
from makers import make_llama
from threads import one_thread


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="package")
def ragged(tmp_path_factory):
    """An FP8 Llama with N = 192 and K = 192, and its BF16 source beside it. Read only."""
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder / "bf16", tied=True)
    quantize_checkpoint(folder / "bf16", folder / "fp8", "fp8_128x128")
    return folder / "fp8"
