import pytest
import transformers

from threads import one_thread


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    with one_thread():
        yield
