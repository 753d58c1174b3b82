"""Qwen3-MoE-FP8 and MiniMax-M2: one expert a module, `weight_scale_inv`, and a skip list in the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._common import Tensors, save

HIDDEN, HEADS, KV_HEADS, HEAD, EXPERTS, TOP_K, VOCAB, LAYERS = 256, 4, 2, 64, 8, 2, 512, 2


def make_qwen3_moe(path: Path, *, intermediate: int = 128, scale: str = "bf16", shards: int = 1, seed: int = 2) -> Path:
    """intermediate=192 makes the experts ragged. scale: "bf16" as released, "f32", "f32_pow2" or "e8m0"."""
    t = Tensors(seed)
    _model(t, "mlp.", ("gate_proj", "up_proj", "down_proj"), intermediate, scale, norm_width=HEAD)
    skip = [f"model.layers.{i}.{m}" for i in range(LAYERS) for m in ("input_layernorm", "post_attention_layernorm")]
    skip += [f"model.layers.{i}.mlp.gate" for i in range(LAYERS)]
    config = _config() | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 384,
        "moe_intermediate_size": intermediate,
        "num_experts": EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "quantization_config": _quantization("e4m3", ["lm_head", *skip], scale),
    }
    return save(path, t.found, config, shards=shards)


def make_minimax_m2(path: Path, *, intermediate: int = 128, scale: str = "f32", shards: int = 1, seed: int = 2) -> Path:
    """`block_sparse_moe.experts.E.w1/w2/w3`, norms as wide as all heads."""
    t = Tensors(seed)
    _model(t, "block_sparse_moe.", ("w1", "w3", "w2"), intermediate, scale, norm_width=None)
    for i in range(LAYERS):
        name = f"model.layers.{i}.block_sparse_moe.e_score_correction_bias"
        t.found[name] = t.random(EXPERTS, std=0.1)
    config = _config() | {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "intermediate_size": intermediate,
        "num_local_experts": EXPERTS,
        "rotary_dim": 32,
        "rope_theta": 5000000,
        "use_qk_norm": True,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "quantization_config": _quantization("float8_e4m3fn", ["gate", "e_score_correction_bias", "lm_head"], scale),
    }
    return save(path, t.found, config, shards=shards)


def _model(
    t: Tensors, moe: str, projections: tuple[str, str, str], size: int, scale: str, norm_width: int | None
) -> None:
    """projections: names of gate, up and down. norm_width: of q_norm and k_norm; None is all heads together."""

    def fp8(module: str, n: int, k: int) -> None:
        t.fp8(module, n, k, block=128, scale=scale, suffix="weight_scale_inv")

    t.bf16("model.embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    t.bf16("lm_head.weight", VOCAB, HIDDEN)
    t.norm("model.norm.weight", HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name, n, k in (
            ("q_proj", HEADS * HEAD, HIDDEN),
            ("k_proj", KV_HEADS * HEAD, HIDDEN),
            ("v_proj", KV_HEADS * HEAD, HIDDEN),
            ("o_proj", HIDDEN, HEADS * HEAD),
        ):
            fp8(f"{p}self_attn.{name}", n, k)
        t.norm(f"{p}self_attn.q_norm.weight", norm_width or HEADS * HEAD)
        t.norm(f"{p}self_attn.k_norm.weight", norm_width or KV_HEADS * HEAD)
        t.norm(f"{p}input_layernorm.weight", HIDDEN)
        t.norm(f"{p}post_attention_layernorm.weight", HIDDEN)
        t.bf16(f"{p}{moe}gate.weight", EXPERTS, HIDDEN)
        gate, up, down = projections
        for e in range(EXPERTS):
            fp8(f"{p}{moe}experts.{e}.{gate}", size, HIDDEN)
            fp8(f"{p}{moe}experts.{e}.{up}", size, HIDDEN)
            fp8(f"{p}{moe}experts.{e}.{down}", HIDDEN, size)


def _quantization(fmt: str, skip: list[str], scale: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": fmt,
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": skip,
    }
    return said | ({"scale_fmt": "ue8m0"} if scale in ("f32_pow2", "e8m0") else {})


def _config() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
