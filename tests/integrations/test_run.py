"""`blockscale run`: text and figures from a tiny checkpoint with a real tokenizer format."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from blockscale import BlockscaleError
from blockscale.checkpoint import quantize_checkpoint
from blockscale.cli import app
from blockscale.integrations.transformers import measure
from makers import make_llama
from model_cases import CASES


def add_tokenizer(folder):
    """One word for each of 300 ids."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_llama(folder / "bf16", layers=1)
    quantize_checkpoint(folder / "bf16", folder / "fp8", "fp8_128x128")
    return add_tokenizer(folder / "fp8")


def invoke(*args):
    result = CliRunner().invoke(app, ["run", *map(str, args)])
    assert result.exception is None, result.output
    return result.output


def test_json_says_what_ran_and_what_it_cost(checkpoint):
    report = json.loads(invoke(checkpoint, "w5 w6 w7", "--max-new-tokens", 4, "--json"))
    assert report["prompt_tokens"] == 3
    assert report["new_tokens"] == 4
    assert len(report["text"].split()) == 4
    assert sum(report["kernels"].values()) == 8
    assert report["decode_tokens_per_second"] > 0
    assert report["resident_weight_bytes"] > 256 * 192


@pytest.mark.parametrize("name", CASES)
def test_it_runs_every_family(name, tmp_path):
    folder = add_tokenizer(CASES[name].write(tmp_path))
    report = json.loads(invoke(folder, "w5 w6 w7", "--max-new-tokens", 3, "--json"))
    assert (report["prompt_tokens"], report["new_tokens"]) == (3, 3)
    assert report["numerics"] == "reference"
    assert len(report["kernels"]) > 0


def test_text_streams_and_figures_follow(checkpoint):
    output = invoke(checkpoint, "w5 w6 w7", "--max-new-tokens", 3, "--numerics", "weight_only")
    text, *figures = output.splitlines()
    assert len(text.split()) == 3
    assert "decode" in "".join(figures)


def test_an_unknown_policy_is_refused_with_the_near_names(checkpoint):
    result = CliRunner().invoke(app, ["run", str(checkpoint), "w5", "--numerics", "checkpont"])
    assert "did you mean 'checkpoint'" in str(result.exception)


def test_a_chat_goes_through_the_template(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "chat")
    template = "{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}{% if add_generation_prompt %} w3{% endif %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    ask = (tmp_path / "chat", "w5 w6", "--max-new-tokens", 2, "--json")
    plain, chat = json.loads(invoke(*ask)), json.loads(invoke(*ask, "--chat"))
    assert (plain["prompt_tokens"], chat["prompt_tokens"]) == (2, 5)


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ("w5", ["--chat"], "--chat needs a chat template, the tokenizer has none"),
        ("", [], "needs a prompt of at least one token, got ''"),
    ],
)
def test_a_prompt_that_cannot_be_continued(checkpoint, prompt, more, message):
    told = CliRunner().invoke(app, ["run", str(checkpoint), prompt, *more]).exception
    assert isinstance(told, BlockscaleError)
    assert message in str(told)


def test_bench_model_needs_no_tokenizer(checkpoint, tmp_path):
    picture = tmp_path / "split.svg"
    args = ("--prompt-tokens", 6, "--new-tokens", 3, "--picture", picture, "--json")
    result = CliRunner().invoke(app, ["bench", "model", *map(str, (checkpoint, *args))])
    assert result.exception is None, result.output
    report = json.loads(result.output)
    assert report["stored_weight_bytes"] <= report["resident_weight_bytes"] <= report["stored_weight_bytes"] + 1024
    for split in (report["prefill_split"], report["decode_split"]):
        assert sum(split.values()) == pytest.approx(1)
    assert len(report["logits_sha256"]) == 64
    assert picture.read_text().startswith("<?xml")


def test_what_cannot_run_is_said_in_one_line(checkpoint, tmp_path):
    make_llama(tmp_path / "bf16", layers=1)
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8", "fp8_128x128")
    told = CliRunner().invoke(app, ["run", str(tmp_path / "fp8"), "w5"]).exception
    assert isinstance(told, BlockscaleError)
    assert "no tokenizer that transformers can read" in str(told)
    assert "`blockscale bench model` needs none" in str(told)
    if not torch.cuda.is_available():
        told = CliRunner().invoke(app, ["run", str(checkpoint), "w5", "--device", "cuda"]).exception
        assert str(told) == f"device cuda: torch {torch.__version__} finds none on this machine"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's peak is not inherited, or not known")
def test_peak_memory_is_the_process_own_and_not_that_of_who_started_it():
    large = bytearray(600_000_000)
    large[::4096] = b"\1" * len(large[::4096])
    ask = "from blockscale.integrations.transformers.measure import peak_memory; print(peak_memory('cpu'))"
    child = int(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout)
    assert 50e6 < child < measure.peak_memory("cpu") - 0.5 * len(large)
