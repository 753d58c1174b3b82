"""DeepSeek-V4 under its official names: no `model.` prefix, `.scale`, and experts in one of three formats.

| experts | release         | experts on disk                                         | dense scales |
|---------|-----------------|---------------------------------------------------------|--------------|
| fp4     | V4-Flash, V4    | I8 [N, K/2] + E8M0 [N, K/32]                            | E8M0         |
| fp8     | V4-*-Base       | E4M3, like the dense layers                             | F32, powers of two |
| nvfp4   | NVFP4 exports   | U8 + weight_scale E4M3 [N, K/16] + weight_scale_2 + input_scale | E8M0 |

block=32 gives V4.1's 32x32 blocks (the format only: its architecture differs).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ._common import Tensors, quantize_mxfp4, quantize_nvfp4, save

HIDDEN, HEADS, HEAD, ROPE, Q_RANK, O_GROUPS, O_RANK = 256, 4, 128, 32, 128, 2, 128
MOE, EXPERTS, TOP_K, VOCAB, LAYERS, HC = 128, 8, 2, 512, 4, 4
INDEX_HEADS, INDEX_HEAD = 16, 128  # with two heads, ties make the indexer's top-k arbitrary
RATIOS = (0, 4, 128, 4, 0)  # of the compressor, by layer; the last is the MTP layer's


def make_deepseek_v4(
    path: Path,
    *,
    experts: Literal["fp4", "fp8", "nvfp4"] = "fp4",
    block: int = 128,
    compressor_fp8: bool = False,
    mtp: bool = True,
    hash_layers: int = 1,
    index_topk: int = 4,
    nested: bool = False,
    std: float = 0.05,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """compressor_fp8: the disputed variant of V4-Base. nested: V4.1's `text_config` and expert_dtype inside."""
    t = Tensors(seed, std)
    stored = "f32_pow2" if experts == "fp8" else "e8m0"

    def fp8(module: str, n: int, k: int) -> None:
        t.fp8(module, n, k, block=block, scale=stored, suffix="scale")

    def expert(module: str, n: int, k: int) -> None:
        if experts == "fp8":
            fp8(module, n, k)
        elif experts == "fp4" or module.startswith("mtp."):  # NVFP4 exports leave the MTP layer's experts in MXFP4
            t.found[f"{module}.weight"], t.found[f"{module}.scale"] = quantize_mxfp4(t.random(n, k))
        else:
            data, scale, level = quantize_nvfp4(t.random(n, k), 4.5 * std / (448 * 6))
            t.found |= {f"{module}.weight": data, f"{module}.weight_scale": scale, f"{module}.weight_scale_2": level}
            t.found[f"{module}.input_scale"] = torch.tensor(6.0 / (448 * 6))

    def compressor(p: str, size: int, ratio: int) -> None:
        width = (2 if ratio == 4 else 1) * size
        t.found[f"{p}ape"] = t.random(ratio, width, std=0.1)
        for name in ("wkv", "wgate"):
            if compressor_fp8:
                fp8(p + name, width, HIDDEN)
            else:
                t.bf16(f"{p}{name}.weight", width, HIDDEN)
        t.norm(f"{p}norm.weight", size)

    def attention(a: str, ratio: int) -> None:
        t.found[f"{a}attn_sink"] = t.random(HEADS, std=0.5)
        fp8(f"{a}wq_a", Q_RANK, HIDDEN)
        t.norm(f"{a}q_norm.weight", Q_RANK)
        fp8(f"{a}wq_b", HEADS * HEAD, Q_RANK)
        fp8(f"{a}wkv", HEAD, HIDDEN)
        t.norm(f"{a}kv_norm.weight", HEAD)
        fp8(f"{a}wo_a", O_GROUPS * O_RANK, HEADS * HEAD // O_GROUPS)
        fp8(f"{a}wo_b", HIDDEN, O_GROUPS * O_RANK)
        if ratio:
            compressor(f"{a}compressor.", HEAD, ratio)
        if ratio == 4:
            fp8(f"{a}indexer.wq_b", INDEX_HEADS * INDEX_HEAD, Q_RANK)
            t.bf16(f"{a}indexer.weights_proj.weight", INDEX_HEADS, HIDDEN)
            compressor(f"{a}indexer.compressor.", INDEX_HEAD, ratio)

    def layer(p: str, index: int) -> None:
        attention(f"{p}attn.", RATIOS[index])
        t.norm(f"{p}attn_norm.weight", HIDDEN)
        t.norm(f"{p}ffn_norm.weight", HIDDEN)
        for part in ("attn", "ffn"):
            t.found[f"{p}hc_{part}_fn"] = t.random((2 + HC) * HC, HC * HIDDEN, std=0.02)
            t.found[f"{p}hc_{part}_base"] = t.random((2 + HC) * HC, std=0.3)
            t.found[f"{p}hc_{part}_scale"] = torch.ones(3) * 0.7
        t.bf16(f"{p}ffn.gate.weight", EXPERTS, HIDDEN)
        if index < hash_layers:
            rows = [t.permutation(EXPERTS)[:TOP_K] for _ in range(VOCAB)]
            t.found[f"{p}ffn.gate.tid2eid"] = torch.stack(rows).long()
        else:
            t.found[f"{p}ffn.gate.bias"] = t.random(EXPERTS, std=0.1)
        shapes = (("w1", MOE, HIDDEN), ("w2", HIDDEN, MOE), ("w3", MOE, HIDDEN))
        for e in range(EXPERTS):
            for name, n, k in shapes:
                expert(f"{p}ffn.experts.{e}.{name}", n, k)
        for name, n, k in shapes:
            fp8(f"{p}ffn.shared_experts.{name}", n, k)

    def hc_head(p: str) -> None:
        t.found[f"{p}hc_head_fn"] = t.random(HC, HC * HIDDEN, std=0.02)
        t.found[f"{p}hc_head_base"] = t.random(HC, std=0.3)
        t.found[f"{p}hc_head_scale"] = torch.ones(1) * 0.7

    t.bf16("embed.weight", VOCAB, HIDDEN, std=1.0)
    t.bf16("head.weight", VOCAB, HIDDEN)
    t.norm("norm.weight", HIDDEN)
    hc_head("")
    for i in range(LAYERS):
        layer(f"layers.{i}.", i)
    if mtp:
        layer("mtp.0.", LAYERS)
        fp8("mtp.0.e_proj", HIDDEN, HIDDEN)
        fp8("mtp.0.h_proj", HIDDEN, HIDDEN)
        for name in ("enorm", "hnorm", "norm"):
            t.norm(f"mtp.0.{name}.weight", HIDDEN)
        hc_head("mtp.0.")
    config, extra = _config(experts, block, hash_layers, index_topk, nested)
    return save(path, t.found, config, shards=shards, extra=extra)


def _config(
    experts: str, block: int, hash_layers: int, index_topk: int, nested: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    quantization: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [block, block],
    }
    config: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hc_eps": 1e-6,
        "hc_mult": HC,
        "hc_sinkhorn_iters": 20,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "index_head_dim": INDEX_HEAD,
        "index_n_heads": INDEX_HEADS,
        "index_topk": index_topk,
        "initializer_range": 0.02,
        "max_position_embeddings": 65536,
        "moe_intermediate_size": MOE,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
        "num_hash_layers": hash_layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": O_GROUPS,
        "o_lora_rank": O_RANK,
        "q_lora_rank": Q_RANK,
        "qk_rope_head_dim": ROPE,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 16,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB,
        "compress_rope_theta": 160000,
        "compress_ratios": list(RATIOS),
    }
    extra: dict[str, Any] = {}
    if experts == "nvfp4":
        layers = {f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in range(LAYERS)}
        ignore = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
        arguments = {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"}
        quantization |= {
            "quant_algo": "MIXED_PRECISION",
            "moe_quant_algo": "NVFP4",
            "expert_dtype": "fp4",
            "group_size": 16,
            "kv_cache_quant_algo": None,
            "ignore": ignore,
            "producer": {"name": "modelopt", "version": "tiny"},
            "quantized_layers": layers,
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": arguments, "input_activations": arguments},
            },
        }
        extra["hf_quant_config.json"] = {
            "producer": {"name": "modelopt", "version": "tiny"},
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": None,
                "moe_quant_algo": "NVFP4",
                "group_size": 16,
                "exclude_modules": ignore,
                "quantized_layers": layers,
            },
        }
    if nested:
        if experts != "fp8":
            quantization["expert_dtype"] = "fp4"
        keep = ("architectures", "model_type", "torch_dtype", "bos_token_id", "eos_token_id")
        text = {k: v for k, v in config.items() if k != "architectures"} | {"quantization_config": quantization}
        return {k: config[k] for k in keep} | {"text_config": text}, extra
    if experts != "fp8":
        config["expert_dtype"] = "fp4"
    return config | {"quantization_config": quantization}, extra
