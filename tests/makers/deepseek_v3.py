"""DeepSeek-V3, V3.1 and V3.2: `weight_scale_inv` for 128x128 blocks, and a ragged kv_a_proj_with_mqa (N = 576)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ._common import Tensors, save

HIDDEN, HEADS, NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 256, 2, 128, 64, 128, 128, 512
MOE, EXPERTS, TOP_K, VOCAB, LAYERS = 128, 8, 2, 512, 2
INDEX_HEADS, INDEX_HEAD = 16, 128  # the scores pass a ReLU: with two heads many are exactly 0, and top-k is arbitrary


def make_deepseek_v3(
    path: Path,
    *,
    v32: bool = False,
    ue8m0: bool = False,
    ragged_k: bool = False,
    mtp: bool = True,
    scale: str | None = None,
    index_topk: int = 8,
    shards: int = 1,
    seed: int = 1,
) -> Path:
    """v32: adds the indexer (and is ue8m0). ue8m0: V3.1, F32 scales that are powers of two. ragged_k: an MLP of 320.

    scale: storage of scales if not the release's: "f32", "f32_pow2", "bf16" or "e8m0".
    """
    t = Tensors(seed)
    stored = scale or ("f32_pow2" if ue8m0 or v32 else "f32")
    dense = 320 if ragged_k else 384

    def fp8(module: str, n: int, k: int) -> None:
        t.fp8(module, n, k, block=128, scale=stored, suffix="weight_scale_inv")

    def mlp(prefix: str, size: int) -> None:
        fp8(f"{prefix}gate_proj", size, HIDDEN)
        fp8(f"{prefix}up_proj", size, HIDDEN)
        fp8(f"{prefix}down_proj", HIDDEN, size)

    def attention(s: str) -> None:
        fp8(f"{s}q_a_proj", Q_RANK, HIDDEN)
        t.norm(f"{s}q_a_layernorm.weight", Q_RANK)
        fp8(f"{s}q_b_proj", HEADS * (NOPE + ROPE), Q_RANK)
        fp8(f"{s}kv_a_proj_with_mqa", KV_RANK + ROPE, HIDDEN)
        t.norm(f"{s}kv_a_layernorm.weight", KV_RANK)
        fp8(f"{s}kv_b_proj", HEADS * (NOPE + VALUE), KV_RANK)
        fp8(f"{s}o_proj", HIDDEN, HEADS * VALUE)
        if v32:
            fp8(f"{s}indexer.wq_b", INDEX_HEADS * INDEX_HEAD, Q_RANK)
            fp8(f"{s}indexer.wk", INDEX_HEAD, HIDDEN)
            t.found[f"{s}indexer.k_norm.weight"] = torch.ones(INDEX_HEAD)
            t.found[f"{s}indexer.k_norm.bias"] = torch.zeros(INDEX_HEAD)
            t.bf16(f"{s}indexer.weights_proj.weight", INDEX_HEADS, HIDDEN)

    def layer(p: str, moe: bool) -> None:
        attention(f"{p}self_attn.")
        t.norm(f"{p}input_layernorm.weight", HIDDEN)
        t.norm(f"{p}post_attention_layernorm.weight", HIDDEN)
        if not moe:
            mlp(f"{p}mlp.", dense)
            return
        t.bf16(f"{p}mlp.gate.weight", EXPERTS, HIDDEN)
        t.found[f"{p}mlp.gate.e_score_correction_bias"] = t.random(EXPERTS, std=0.1)
        for expert in range(EXPERTS):
            mlp(f"{p}mlp.experts.{expert}.", MOE)
        mlp(f"{p}mlp.shared_experts.", MOE)

    t.bf16("model.embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    t.bf16("lm_head.weight", VOCAB, HIDDEN)
    t.norm("model.norm.weight", HIDDEN)
    for i in range(LAYERS):
        layer(f"model.layers.{i}.", moe=i > 0)
    if mtp:
        p = f"model.layers.{LAYERS}."
        layer(p, moe=True)
        t.bf16(f"{p}eh_proj.weight", HIDDEN, 2 * HIDDEN)
        t.bf16(f"{p}embed_tokens.weight", VOCAB, HIDDEN)
        t.bf16(f"{p}shared_head.head.weight", VOCAB, HIDDEN)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            t.norm(f"{p}{name}.weight", HIDDEN)
    quantization: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    if stored in ("f32_pow2", "e8m0"):
        quantization["scale_fmt"] = "ue8m0"
    config = {
        "architectures": ["DeepseekV32ForCausalLM" if v32 else "DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v32" if v32 else "deepseek_v3",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "moe_intermediate_size": MOE,
        "intermediate_size": dense,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 1,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": quantization,
    }
    if v32:
        config |= {"index_n_heads": INDEX_HEADS, "index_head_dim": INDEX_HEAD, "index_topk": index_topk}
    return save(path, t.found, config, shards=shards)
