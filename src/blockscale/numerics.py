"""What is computed, apart from who computes it: the policy for activations.

A checkpoint fixes its numerics and no kernel may change them. `Numerics` is frozen data: the registry hands it
to kernels inside the `Problem`, and a kernel that cannot do exactly this refuses.

Sources: DeepSeek-V3 report section 3.3 (1x128, fp32 scales); the inference code released with DeepSeek-V4 and
V4.1 (power-of-two scales, amax floored at 1e-4); OCP MX 1.0 for the 1x32 formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType

import torch

from .errors import BlockscaleError, UnknownNameError
from .formats import ELEMENTS, Format, ScaleRounding, get_format

DEFAULT_FLOOR = 1e-10
"""Smallest block amax a dynamic scale is made from: a block of zeros gets a finite scale."""

_SUMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Numerics:
    """The activation policy of a linear.

    weight_only: activations stay as they are, in whatever dtype they have. The user's choice, never a fallback.
    act_group: elements of a row that share an activation scale; None follows the weight's block width.
    act_rounding: scale rounding of activations; None follows the weight format.
    act_floor: lower bound of a group's amax, in units of x.
    act_element: element type of activations; None follows the weight (e5m2 weights take fp8 activations).
    int16: a kernel may multiply in 16-bit fixed point, which costs about 3e-4 of a result (`kernels/cpu`).
    mxfp4_act, nvfp4_act: activation format for FP4 weights; None leaves activations unquantized (W4A16).
    sums: dtype of the partial sums of a linear that is spread over devices, as they travel. "float32" adds them as one
        device would, up to the order; "bfloat16" rounds each to half the bytes first, as serving engines do.
    """

    weight_only: bool = False
    act_group: int | None = None
    act_rounding: ScaleRounding | None = None
    act_floor: float = DEFAULT_FLOOR
    act_element: str | None = None
    int16: bool = False
    mxfp4_act: str | None = "fp8_1x32_ue8m0"
    nvfp4_act: str | None = "nvfp4"
    sums: str = "float32"

    def __post_init__(self) -> None:
        if self.act_group is not None and self.act_group < 1:
            raise BlockscaleError(f"Numerics: act_group needs a positive element count or None, got {self.act_group}")
        if not 0 < self.act_floor < float("inf"):
            raise BlockscaleError(f"Numerics: act_floor needs a positive finite number, got {self.act_floor}")
        if self.act_element is not None and self.act_element not in ("fp8", "fp8e5m2", "fp8fnuz"):
            raise UnknownNameError("activation element", self.act_element, [e for e in ELEMENTS if e != "fp4"])
        if self.act_rounding not in (None, "none", "pow2_ceil", "pow2_floor"):
            raise UnknownNameError("scale rounding", str(self.act_rounding), ["none", "pow2_ceil", "pow2_floor"])
        if self.sums not in _SUMS:
            raise UnknownNameError("dtype of sums", self.sums, _SUMS)
        for name in (self.mxfp4_act, self.nvfp4_act):
            if name is not None:
                get_format(name)

    @property
    def sum_dtype(self) -> torch.dtype:
        """`sums` as torch's."""
        return _SUMS[self.sums]

    def activation_format(self, weight: Format) -> Format | None:
        """Format that x takes before it meets weights stored as `weight`; None leaves x as it is."""
        if self.weight_only:
            return None
        if weight.packed:
            name = self.nvfp4_act if weight.two_level else self.mxfp4_act
            return get_format(name) if name else None
        if weight.name == "mxfp8" and self.act_group is None and self.act_rounding is None:
            return weight
        element = self.act_element or {"fp8e5m2": "fp8"}.get(weight.element.name, weight.element.name)
        if self.act_group is not None or weight.block[1] is not None:
            granularity = f"1x{self.act_group or weight.block[1]}"
        else:
            granularity = "tensor" if weight.block[0] is None else "row"
        rounding = self.act_rounding or weight.scale_rounding
        base = get_format(f"{element}_{granularity}")
        if rounding == "none":
            return base
        ue8m0 = get_format(f"{base.name}_ue8m0")
        return ue8m0 if rounding == "pow2_ceil" else replace(ue8m0, scale_rounding=rounding)

    def __str__(self) -> str:
        """The preset's name, or `checkpoint,field=value,…`. `get_numerics` reads both."""
        for name, preset in PRESETS.items():
            if self == preset:
                return name
        base = Numerics()
        changed = [
            (f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != getattr(base, f.name)
        ]
        return ",".join(["checkpoint", *(f"{name}={value}" for name, value in changed)])


PRESETS: Mapping[str, Numerics] = MappingProxyType(
    {
        "checkpoint": Numerics(),
        "weight_only": Numerics(weight_only=True),
        "deepseek_v3": Numerics(act_group=128, act_rounding="none"),
        "deepseek_v4": Numerics(act_group=128, act_rounding="pow2_ceil", act_floor=1e-4, mxfp4_act="fp8_1x128_ue8m0"),
        "deepseek_v4_1": Numerics(act_group=32, act_rounding="pow2_ceil", act_floor=1e-4, mxfp4_act="fp8_1x32_ue8m0"),
    }
)
"""checkpoint: activations follow the weight format. The others fix one model family's rules."""

_READ: Mapping[str, Callable[[str], object]] = {
    "weight_only": lambda v: {"True": True, "False": False}[v],
    "int16": lambda v: {"True": True, "False": False}[v],
    "act_group": int,
    "act_floor": float,
}


@cache
def get_numerics(text: str | Numerics) -> Numerics:
    """The policy of that name ("checkpoint", "weight_only", "deepseek_v4" …) or `preset,field=value,…`.

    Raises UnknownNameError for an unknown preset or field.
    """
    if isinstance(text, Numerics):
        return text
    name, *changes = text.split(",")
    if name not in PRESETS:
        raise UnknownNameError("numerics", name, PRESETS)
    known = {f.name for f in fields(Numerics)}
    values: dict[str, object] = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in known:
            raise UnknownNameError("numerics field", field, known, where=text)
        try:
            values[field] = None if value == "None" else _READ.get(field, str)(value)
        except (ValueError, KeyError) as e:
            raise BlockscaleError(f"numerics field {field}: cannot read {value!r} ({text})") from e
    return replace(PRESETS[name], **values)  # type: ignore[arg-type]
