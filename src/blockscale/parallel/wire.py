"""What activations look like between ranks: quantized where that changes no number, as they are where it would.

A rank that holds some rows of x may quantize them before they travel when every scale belongs to one row: the bytes
are then those that the receiver would have made. One byte an element and a scale for 128, instead of two bytes.
`Numerics` decides, and `Wire.reason` says what was decided and why.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import Format
from ..numerics import Numerics


@dataclass(frozen=True)
class Wire:
    """format: of x between ranks; None sends x in its own dtype. reason: why."""

    format: Format | None
    reason: str


def wire_of(weight: Format, numerics: Numerics, static: bool, *, again: bool = False) -> Wire:
    """How rows of x travel to a weight in this format.

    static: a scale for x is stored beside the weight. again: the receiver can only take 16-bit x and quantizes it
    once more (grouped kernels do), which gives the same numbers only for scales that are powers of two.
    """
    act = numerics.activation_format(weight)
    if act is None:
        return Wire(None, "the numerics leave activations as they are")
    if act.two_level or act.packed:
        return Wire(None, f"{act} takes a second scale from all rows")
    if static or act.block[0] != 1 or act.block[1] is None:
        return Wire(None, f"{act} has one scale for a whole row or for all of x")
    if again and act.scale_rounding == "none":
        return Wire(None, f"{act} has fp32 scales: the receiver's kernel would quantize once more, to other bytes")
    return Wire(act, f"each scale of {act} belongs to one row: quantized before it travels")
