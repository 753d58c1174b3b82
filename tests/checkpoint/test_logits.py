"""`verify --logits`: what two models say about the same text."""

import json
import math
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from blockscale.checkpoint import quantize_checkpoint
from blockscale.cli import app
from blockscale.cli._logits import compare_logits
from blockscale.errors import BlockscaleError, CheckpointError

WORDS = 60
TEXT = " ".join(f"w{i * 7 % WORDS}" for i in range(50))


@pytest.fixture(scope="module")
def pair(llama, tmp_path_factory):
    """A BF16 Llama with a tokenizer of 60 words, and the same in FP8."""
    root = tmp_path_factory.mktemp("logits")
    shutil.copytree(llama, root / "a")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "a")
    quantize_checkpoint(root / "a", root / "b", "fp8_128x128")
    return root / "a", root / "b"


def test_a_model_agrees_with_itself(pair):
    found = compare_logits(pair[0], pair[0], TEXT, 16, 2)
    assert found["tokens"] == 30  # two pieces of 16, whose first tokens nothing predicts
    assert (found["kl"], found["top1_agreement"]) == (0.0, 1.0)
    assert found["perplexity_a"] == found["perplexity_b"]


def test_fp8_is_near_and_not_the_same(pair, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    args = ["verify", *map(str, pair), "--max-error", "0.1", "--logits", "--text", str(tmp_path / "text"), "--json"]
    done = CliRunner().invoke(app, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["logits"]
    assert found["tokens"] == 49
    assert 0 < found["kl"] < 0.1
    assert math.isclose(found["perplexity_a"], found["perplexity_b"], rel_tol=0.1)


def test_one_token_predicts_nothing(pair):
    with pytest.raises(CheckpointError, match="the text has 1 tokens, needs at least 2"):
        compare_logits(*pair, "w1", 16, 1)


def test_a_model_without_a_tokenizer(llama):
    with pytest.raises(BlockscaleError, match="no tokenizer that transformers can read"):
        compare_logits(llama, llama, TEXT, 16, 1)
