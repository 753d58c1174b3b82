"""The numerics of a whole model: one frozen object, made from the model's family and a preset.

Engines disagree about what a model computes; the disagreements are small in each layer and visible in the logits
(DeepSeek-V4, relative to the released code: 3e-2 for FP4 experts with 16-bit activations, 4e-2 for the routing weight
in the other place and an FP8 `wo_a`, 5e-2 for fp32 activation scales). So the choice is named, and printed:

| preset        | dense FP8 activations            | FP4-expert activations | DeepSeek-V4's wo_a | routing weight |
|---------------|----------------------------------|------------------------|--------------------|----------------|
| reference     | as the family's authors run it   | the same               | 16-bit activations | V4: before w2  |
| hf            | fp32 scales, group of the block  | 1x32 ue8m0             | FP8                | after w2       |
| vllm          | fp32 scales, group of the block  | 1x128 ue8m0 (DeepGEMM) | FP8                | after w2       |
| a `Numerics`  | that, for every layer            | that                   | that               | as reference   |

Sources: the inference code released with DeepSeek-V3, V3.2 and V4 (`act_quant`, `linear`, `Expert.forward`);
transformers 5.23 `finegrained_fp8`; vLLM 0.33. vLLM's FP4 activations depend on its backend (1x32 on FlashInfer, none
on Marlin, CPU, XPU and ROCm): this is DeepGEMM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import UnknownNameError
from .numerics import PRESETS, Numerics, get_numerics

POLICIES = ("reference", "hf", "vllm")


@dataclass(frozen=True)
class Policy:
    """name: what was asked for. linear, experts, grouped_output (V4's `wo_a`): numerics by kind of layer.

    weigh_first: routing weights multiply before the second expert matrix's activations are quantized.
    kernel: an order for every layer, or None. sources: (field, where its value comes from).
    """

    name: str = "checkpoint"
    linear: Numerics = PRESETS["checkpoint"]
    experts: Numerics = PRESETS["checkpoint"]
    grouped_output: Numerics = PRESETS["checkpoint"]
    weigh_first: bool = False
    kernel: str | None = None
    sources: tuple[tuple[str, str], ...] = ()

    def rows(self) -> list[tuple[str, str, str]]:
        """(field, value, source) of everything in force, for people."""
        sources = dict(self.sources)
        values = {
            "linear": str(self.linear),
            "experts": str(self.experts),
            "grouped_output": str(self.grouped_output),
            "routing weight": "before the second matrix" if self.weigh_first else "after the second matrix",
        }
        return [(key, value, sources.get(key, self.name)) for key, value in values.items()]


def model_policy(preset: str | Numerics | Policy, config: Mapping[str, Any], *, kernel: str | None = None) -> Policy:
    """The policy for a model with this `config.json`.

    preset: "reference", "hf", "vllm", the name of a `Numerics` preset (or one itself) for every layer, or a Policy.
    The names take changes, for every layer: "reference,sums=bfloat16".
    Raises UnknownNameError with the near names.
    """
    if isinstance(preset, Policy):
        return replace(preset, kernel=kernel or preset.kernel)
    reference = _reference(config)
    name, _, changes = preset.partition(",") if isinstance(preset, str) else ("", "", "")
    if name in POLICIES:
        found = reference if name == "reference" else _engine(name, config)
        return replace(_changed(found, changes) if changes else found, kernel=kernel)
    if isinstance(preset, str) and preset.split(",")[0] not in PRESETS:
        raise UnknownNameError("numerics", preset.split(",")[0], (*POLICIES, *PRESETS))
    same, said = get_numerics(preset), "asked for"
    sources = (("linear", said), ("experts", said), ("grouped_output", said), *reference.sources[3:])
    return Policy(str(same), same, same, same, reference.weigh_first, kernel, sources)


def _changed(policy: Policy, changes: str) -> Policy:
    """A policy with fields of its numerics changed: "field=value,…"."""
    kinds = ("linear", "experts", "grouped_output")
    values: dict[str, Any] = {kind: get_numerics(f"{getattr(policy, kind)},{changes}") for kind in kinds}
    sources = tuple((key, f"{said}; {changes} asked for" if key in kinds else said) for key, said in policy.sources)
    return replace(policy, name=f"{policy.name},{changes}", sources=sources, **values)


def _reference(config: Mapping[str, Any]) -> Policy:
    """What the authors of the model's family run."""
    family = str(config.get("model_type", ""))
    if family == "deepseek_v4":
        wide = _block(config) != 32
        acts = PRESETS["deepseek_v4" if wide else "deepseek_v4_1"]
        code = f"DeepSeek-V4{'' if wide else '.1'} inference code"
        return Policy(
            "reference", acts, acts, PRESETS["weight_only"], True,
            sources=(
                ("linear", f"{code}: act_quant with {'128' if wide else '32'}-wide power-of-two scales, amax >= 1e-4"),
                ("experts", f"{code}: FP4 weights meet the same FP8 activations; NVFP4 as its input_scale says"),
                ("grouped_output", f"{code}: wo_a is dequantized and multiplied in bf16"),
                ("routing weight", f"{code}: Expert.forward multiplies before w2"),
            ),
        )  # fmt: skip
    if family in ("deepseek_v3", "deepseek_v32"):
        powers = _scale_fmt(config) == "ue8m0"
        acts = Numerics(act_group=128, act_rounding="pow2_ceil", act_floor=1e-4) if powers else PRESETS["deepseek_v3"]
        said = "V3.2 inference code, scale_fmt ue8m0" if powers else "V3 inference code: amax / 448 in fp32"
        return _uniform("reference", acts, f"DeepSeek-{said}")
    numerics, said = PRESETS["checkpoint"], "activations follow the weight's block and scale rule"
    return _uniform("reference", numerics, said, weighing="what experts give is weighed as it is summed")


def _engine(name: str, config: Mapping[str, Any]) -> Policy:
    group = _block(config)
    wide = name == "vllm"
    acts = Numerics(act_group=group, act_rounding="none", mxfp4_act="fp8_1x128_ue8m0" if wide else "fp8_1x32_ue8m0")
    where = "vLLM 0.33, DeepGEMM backend" if wide else "transformers 5.23 finegrained_fp8"
    return _uniform(name, acts, where)


def _uniform(name: str, numerics: Numerics, where: str, weighing: str | None = None) -> Policy:
    fields = (
        *((field, where) for field in ("linear", "experts", "grouped_output")),
        ("routing weight", weighing or where),
    )
    return Policy(name, numerics, numerics, numerics, sources=fields)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    said = config.get("quantization_config") or (nested or {}).get("quantization_config") or {}
    return said if isinstance(said, Mapping) else {}


def _block(config: Mapping[str, Any]) -> int | None:
    """Columns of a weight block, as configured."""
    block = _quantization(config).get("weight_block_size")
    return int(block[1]) if isinstance(block, list) and len(block) == 2 else None


def _scale_fmt(config: Mapping[str, Any]) -> str | None:
    return _quantization(config).get("scale_fmt")
