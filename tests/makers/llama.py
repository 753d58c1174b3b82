"""A plain BF16 Llama, the source of quantizations. `intermediate=192` and `hidden=576` make it ragged."""

from __future__ import annotations

from pathlib import Path

import torch

from ._common import Tensors, save


def make_llama(
    path: Path,
    *,
    hidden: int = 256,
    intermediate: int = 192,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 300,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 3,
) -> Path:
    """dtype: of every tensor. tied: no lm_head on disk."""
    t = Tensors(seed)
    head = hidden // heads
    t.bf16("model.embed_tokens.weight", vocab, hidden, std=1.0)
    for i in range(layers):
        p = f"model.layers.{i}."
        t.norm(f"{p}input_layernorm.weight", hidden)
        t.norm(f"{p}post_attention_layernorm.weight", hidden)
        for name, n, k in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv_heads * head, hidden),
            ("self_attn.v_proj", kv_heads * head, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ):
            t.bf16(f"{p}{name}.weight", n, k)
    t.norm("model.norm.weight", hidden)
    if not tied:
        t.bf16("lm_head.weight", vocab, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    extra = {"generation_config.json": {"bos_token_id": 0, "eos_token_id": 1}}
    return save(path, {n: v.to(dtype) for n, v in t.found.items()}, config, shards=shards, extra=extra)
