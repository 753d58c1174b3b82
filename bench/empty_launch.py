"""What a kernel costs that does nothing: under every time of a small GEMM, whoever made it.

Launches of 132 programs follow each other in a CUDA graph, as the GEMMs are timed; "pdl" as ours are launched, each
started while the one before drains.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockscale.kernels.gluon.measure import graph, interleaved

_CALLS = 100


@gluon.jit
def empty_kernel(PDL: gl.constexpr):
    """Nothing, or only what orders it behind the launch before."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def empty_launches() -> dict[str, float]:
    """Microseconds of an empty launch in a graph of them."""

    def run(pdl: bool) -> None:
        empty_kernel[(132,)](PDL=pdl, num_warps=4, launch_pdl=pdl)

    graphs = {name: graph([lambda pdl=pdl: run(pdl)], _CALLS) for name, pdl in (("launch_us", False), ("pdl_us", True))}
    return interleaved(graphs, _CALLS, 11)
