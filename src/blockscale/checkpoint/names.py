"""Names of the parts of a stored weight: the only file that knows them.

Elsewhere `scale` multiplies and nothing else. On disk there are many words for it:

| style              | data                    | scale            | global scale        | input scale        |
|--------------------|-------------------------|------------------|---------------------|--------------------|
| deepseek           | weight                  | weight_scale_inv | -                   | input_scale        |
| deepseek_v4        | weight                  | scale            | weight_scale_2      | input_scale        |
| modelopt           | weight                  | weight_scale     | weight_scale_2      | input_scale        |
| compressed_tensors | weight or weight_packed | weight_scale     | weight_global_scale | input_global_scale |
| gpt_oss            | <module>_blocks         | <module>_scales  | -                   | -                  |

compressed-tensors' two global scales are stored as 1 / value. Both belong to NVFP4; static FP8 has a plain
`input_scale` in every style.

`weight_scale_inv` multiplies in spite of its name (DeepSeek-V3's `weight_dequant`). Stacked experts, which
transformers stores as one tensor `experts.gate_up_proj [E, N, K]`, put the suffix on the tensor's own name.

Sources: the tensor names of DeepSeek-V3, V4-Flash, Qwen3-FP8, MiniMax-M2 and their NVFP4 exports; gpt-oss;
the compressed-tensors and ModelOpt export formats.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import UnknownNameError


@dataclass(frozen=True)
class Parts:
    """Full tensor names of one stored weight.

    inverse: global and input scale are stored as 1 / value (compressed-tensors). blocked: the data is `[…, N, K / 32,
    16]` bytes, a block of 32 FP4 elements to each last row (gpt-oss).
    """

    data: str
    scale: str
    global_scale: str | None = None
    input_scale: str | None = None
    inverse: bool = False
    blocked: bool = False

    @property
    def module(self) -> str:
        """The module that the weight belongs to."""
        return self.data.removesuffix(_BLOCKS) if self.blocked else module_of(self.data)

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(n for n in (self.data, self.scale, self.global_scale, self.input_scale) if n is not None)


@dataclass(frozen=True)
class Style:
    """How one family of checkpoints names the parts of module `m`: `m.<word>`."""

    name: str
    scale: str
    data: str = "weight"
    packed_data: str = "weight"
    global_scale: str = "weight_scale_2"
    input_scale: str = "input_scale"
    inverse: bool = False
    blocked: bool = False

    def parts(self, module: str, *, packed: bool, two_level: bool, static: bool, stacked: bool = False) -> Parts:
        """Names for one module. packed: FP4 data; two_level: has a global scale; static: has an input scale.

        stacked: several experts in one tensor, which is itself called `module`.
        """
        if self.blocked:
            return Parts(module + _BLOCKS, module + _BLOCK_SCALES, blocked=True)
        inverse = self.inverse and two_level
        given = self.input_scale if two_level else "input_scale"
        if stacked:
            return Parts(
                data=module,
                scale=f"{module}_{self.scale.removeprefix('weight_')}",
                global_scale=f"{module}_{self.global_scale.removeprefix('weight_')}" if two_level else None,
                input_scale=f"{module}_{given}" if static else None,
                inverse=inverse,
            )
        return Parts(
            data=f"{module}.{self.packed_data if packed else self.data}",
            scale=f"{module}.{self.scale}",
            global_scale=f"{module}.{self.global_scale}" if two_level else None,
            input_scale=f"{module}.{given}" if static else None,
            inverse=inverse,
        )


STYLES = {
    style.name: style
    for style in (
        Style("deepseek", scale="weight_scale_inv"),
        Style("deepseek_v4", scale="scale"),
        Style("modelopt", scale="weight_scale"),
        Style(
            "compressed_tensors",
            scale="weight_scale",
            packed_data="weight_packed",
            global_scale="weight_global_scale",
            input_scale="input_global_scale",
            inverse=True,
        ),
        Style("gpt_oss", scale="", blocked=True),
    )
}


def get_style(name: str) -> Style:
    """The style of that name. Raises UnknownNameError with the nearest names."""
    if name not in STYLES:
        raise UnknownNameError("checkpoint style", name, STYLES)
    return STYLES[name]


WEIGHT = ".weight"
_PACKED = ".weight_packed"
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"


def module_of(tensor: str) -> str:
    """`model.layers.0.q_proj.weight` -> `model.layers.0.q_proj`; names of another form are their own module."""
    for suffix in (_PACKED, WEIGHT):
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix)
    return tensor


def weight_of(module: str) -> str:
    """Name of a module's unquantized weight."""
    return module + WEIGHT


def find_parts(data: str, names: Collection[str]) -> Parts | None:
    """The parts that belong to the tensor `data`, or None when no scale is stored for it."""
    if data.endswith(_BLOCKS) and (scales := data.removesuffix(_BLOCKS) + _BLOCK_SCALES) in names:
        return Parts(data, scales, blocked=True)
    module = module_of(data)
    if data.endswith(_PACKED):
        candidates = [f"{module}.weight_scale"]
    elif data.endswith(WEIGHT):
        candidates = [f"{module}.weight_scale_inv", f"{module}.weight_scale", f"{module}.scale"]
    else:  # stacked experts
        candidates = [f"{data}_scale_inv", f"{data}_scale"]
    scale = next((name for name in candidates if name in names), None)
    if scale is None:
        return None
    stem = f"{module}." if data != module else f"{data}_"
    level = {n: f"{stem}{n}" for n in ("weight_scale_2", "weight_global_scale", "scale_2", "global_scale")}
    static = {n: f"{stem}{n}" for n in ("input_scale", "input_global_scale", "activation_scale")}
    found = next((key for key, name in level.items() if name in names), None)
    given = next((key for key, name in static.items() if name in names), None)
    return Parts(
        data,
        scale,
        level[found] if found else None,
        static[given] if given else None,
        inverse=found in ("weight_global_scale", "global_scale") or given == "input_global_scale",
    )


def scale_candidates(data: str) -> str:
    """For messages: the names under which a scale of this tensor would be looked for."""
    module = module_of(data)
    if data == module:
        return f"{data}_scale_inv or {data}_scale"
    return f"{module}.weight_scale_inv, {module}.weight_scale or {module}.scale"


def style_of(parts: Parts, method: str) -> Style:
    """The style that a stored weight is in. method: the config's quant_method, where names alone do not tell."""
    if parts.blocked:
        return STYLES["gpt_oss"]
    if parts.inverse or parts.data.endswith(_PACKED) or method == "compressed-tensors":
        return STYLES["compressed_tensors"]
    if parts.scale.endswith(("_scale_inv", "weight_scale_inv")):
        return STYLES["deepseek"]
    return STYLES["modelopt" if parts.scale.endswith(("weight_scale", "_scale")) else "deepseek_v4"]


def owner_of_scale(name: str) -> str | None:
    """Module whose weight a scale with this name multiplies, for the names that can be nothing else."""
    for suffix in (".weight_scale_inv", ".weight_scale_2", ".weight_scale", ".weight_global_scale"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


# -- DeepSeek-V4: official names -> the names of transformers ----------------------------------------------------

_V4_WHOLE = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}
_V4_HC_HEAD = {"hc_head_fn": "fn", "hc_head_base": "base", "hc_head_scale": "scale"}
_V4_SEGMENTS = (
    # (official, transformers), applied in this order; the way back is the table of slots (`integrations`)
    (r"\.attn\.indexer\.compressor\.", r".self_attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", r".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.wq_b\.", r".self_attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.attn_sink$", r".self_attn.sinks"),
    (r"\.attn\.wq_a\.", r".self_attn.q_a_proj."),
    (r"\.attn\.wq_b\.", r".self_attn.q_b_proj."),
    (r"\.attn\.wkv\.", r".self_attn.kv_proj."),
    (r"\.attn\.wo_a\.", r".self_attn.o_a_proj."),
    (r"\.attn\.wo_b\.", r".self_attn.o_b_proj."),
    (r"\.attn\.q_norm\.", r".self_attn.q_a_norm."),
    (r"\.attn\.", r".self_attn."),
    (r"\.wkv\.", r".kv_proj."),
    (r"\.wgate\.", r".gate_proj."),
    (r"\.compressor\.norm\.", r".compressor.kv_norm."),
    (r"\.compressor\.indexer\.norm\.", r".compressor.indexer.kv_norm."),
    (r"\.ape$", r".position_bias"),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_norm\.", r".input_layernorm."),
    (r"\.ffn_norm\.", r".post_attention_layernorm."),
    (r"\.ffn\.shared_experts\.w1\.", r".mlp.shared_experts.gate_proj."),
    (r"\.ffn\.shared_experts\.w2\.", r".mlp.shared_experts.down_proj."),
    (r"\.ffn\.shared_experts\.w3\.", r".mlp.shared_experts.up_proj."),
    (r"\.ffn\.gate\.bias$", r".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.", r".mlp."),
)


def is_official_v4(names: Collection[str]) -> bool:
    """Whether tensors carry DeepSeek-V4's own names: no `model.` prefix, `layers.L.attn.wq_a`."""
    return any(re.match(r"layers\.\d+\.(attn\.wq_a|ffn\.experts)\.", name) for name in names)


def v4_to_transformers(name: str) -> str:
    """An official DeepSeek-V4 tensor name as transformers' modules call it. `mtp.*` keeps its name.

    Single experts keep `experts.E.w1`: transformers stacks them, which is a change of tensors and not of names.
    """
    head, _, rest = name.partition(".")
    if name in _V4_HC_HEAD:
        return f"model.hc_head.hc_{_V4_HC_HEAD[name]}"
    if head in _V4_WHOLE:
        return f"{_V4_WHOLE[head]}.{rest}"
    if head != "layers":
        return name
    for official, theirs in _V4_SEGMENTS:
        name = re.sub(official, theirs, name)
    return "model." + re.sub(r"(?<!_hc)\.scale$", ".weight_scale_inv", name)
