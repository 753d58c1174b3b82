"""GGUF as a source: names, the order of rotary rows, and values as the gguf package dequantizes them."""

import numpy as np
import pytest
import torch

from blockscale import get_format, reference
from blockscale.checkpoint import open_checkpoint, quantize_checkpoint
from blockscale.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="an optional dependency")
HIDDEN, HEADS, KV, HEAD, INTER = 64, 4, 2, 16, 96


def interleaved(w, heads):
    """Rows as llama.cpp stores q and k: the two halves of a head's rotation next to each other."""
    return w.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(w.shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(path, weights under Hugging Face names before llama.cpp's reordering)."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    rng = np.random.default_rng(0)
    hf = {
        "model.embed_tokens.weight": rng.standard_normal((32, HIDDEN), np.float32),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    p = "model.layers.0."
    for name, n, k in (
        ("self_attn.q_proj", HEADS * HEAD, HIDDEN),
        ("self_attn.k_proj", KV * HEAD, HIDDEN),
        ("self_attn.v_proj", KV * HEAD, HIDDEN),
        ("self_attn.o_proj", HIDDEN, HEADS * HEAD),
        ("mlp.gate_proj", INTER, HIDDEN),
        ("mlp.up_proj", INTER, HIDDEN),
        ("mlp.down_proj", HIDDEN, INTER),
    ):
        hf[f"{p}{name}.weight"] = rng.standard_normal((n, k), np.float32)
    hf |= {f"{p}input_layernorm.weight": np.ones(HIDDEN, np.float32)}
    hf |= {f"{p}post_attention_layernorm.weight": np.ones(HIDDEN, np.float32)}
    ours = {
        "token_embd.weight": hf["model.embed_tokens.weight"],
        "output_norm.weight": hf["model.norm.weight"],
        "blk.0.attn_norm.weight": hf[f"{p}input_layernorm.weight"],
        "blk.0.ffn_norm.weight": hf[f"{p}post_attention_layernorm.weight"],
        "blk.0.attn_q.weight": interleaved(hf[f"{p}self_attn.q_proj.weight"], HEADS),
        "blk.0.attn_k.weight": interleaved(hf[f"{p}self_attn.k_proj.weight"], KV),
        "blk.0.attn_v.weight": hf[f"{p}self_attn.v_proj.weight"],
        "blk.0.attn_output.weight": hf[f"{p}self_attn.o_proj.weight"],
        "blk.0.ffn_gate.weight": hf[f"{p}mlp.gate_proj.weight"],
        "blk.0.ffn_up.weight": hf[f"{p}mlp.up_proj.weight"],
        "blk.0.ffn_down.weight": hf[f"{p}mlp.down_proj.weight"],
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(128)
    writer.add_vocab_size(32)
    for name, w in ours.items():
        if w.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, hf


def rounded(w):
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind))


def test_every_weight_is_the_dequantized_one(model, tmp_path, monkeypatch):
    from blockscale.checkpoint import quantize

    monkeypatch.setattr(quantize, "save_tokenizer", lambda path, folder: None)  # this file holds none
    path, hf = model
    quantize_checkpoint(path, tmp_path / "out", "fp8_32x32")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert sorted(layer.name + ".weight" for layer in checkpoint.layers) == sorted(n for n in hf if "_proj" in n)
    for layer in checkpoint.layers:
        want = reference.quantize(rounded(hf[layer.name + ".weight"]), get_format("fp8_32x32"))
        q = checkpoint.load(layer.name)
        assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8)), layer.name
    embedding = checkpoint.load("model.embed_tokens.weight")
    assert torch.equal(embedding, rounded(hf["model.embed_tokens.weight"]).bfloat16())
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["num_key_value_heads"] == KV
    assert checkpoint.config["hidden_size"] == HIDDEN


def test_what_is_no_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not at all" * 10)
    with pytest.raises(CheckpointError, match="not a GGUF file that can be read"):
        quantize_checkpoint(path, tmp_path / "out", "fp8_128x128")
