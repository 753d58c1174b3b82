import json

import pytest
import transformers
from safetensors.torch import load_file, save_file

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


@pytest.fixture
def copy(ragged, tmp_path):
    """A copy to damage: `copy(tensors)` edits the tensors, `copy(config=…)` the config."""

    def edit(change=lambda tensors: None, config=lambda c: None):
        for file in ragged.iterdir():
            if file.is_file():
                (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((tmp_path / "config.json").read_text())
        config(settings["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return tmp_path

    return edit
