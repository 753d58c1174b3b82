"""Our kernels inside vLLM: a plugin that adds one linear kernel to its FP8 block lists, on every platform.

vLLM loads `register` through the entry point `vllm.general_plugins`. It then asks `BlockscaleFp8BlockLinearKernel`
about each layer, after its own kernels, and logs what it selected. `BLOCKSCALE_VLLM=first` puts ours before them, `off`
leaves vLLM alone; vLLM's own VLLM_DISABLED_KERNELS takes kernels out by name. Written against vLLM 0.33 (docs/vllm.md).

Computed is what the checkpoint says and what vLLM's own kernels compute: activations in groups of the block's width
with fp32 scales, whatever the scales of the weights are stored in; sums in fp32; one rounding to the layer's dtype.
The layer's parameters stay as they were loaded, so code that reads them (MLA's absorption) still finds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear as lists
from vllm.model_executor.kernels.linear import Fp8BlockScaledMMLinearKernel
from vllm.platforms import PlatformEnum, current_platform

from .. import library, registry
from ..errors import BlockscaleError
from ..formats import ELEMENTS, get_format
from ..numerics import get_numerics
from ..platform import Platform, detect
from ..registry import Problem

SWITCH = "BLOCKSCALE_VLLM"
"""first, last (the default) or off."""
_LISTS = "fp8_block"
_PLATFORMS = ("CUDA", "ROCM", "XPU", "CPU")
_LAST_RESORT = "reference."
logger = init_logger(f"vllm.{__name__}")  # under vLLM's own logger, so that it appears in its logs


class BlockscaleFp8BlockLinearKernel(Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """What vLLM asks and calls. One instance serves one layer."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """(whether blockscale knows this device, why not)."""
        try:
            _platform()
        except BlockscaleError as e:
            return False, str(e)
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """(whether a kernel better than the reference serves such a layer here, every kernel's reasons)."""
        reasons = list(_refusals(config))
        if reasons:
            return False, "; ".join(reasons)
        decisions = registry.explain(_problem(config), _platform(), repack=False)
        if any(d.accepted and not d.kernel.name.startswith(_LAST_RESORT) for d in decisions):
            return True, None
        return False, "; ".join(f"{d.kernel.name}: {', '.join(d.reasons)}" for d in decisions if d.reasons)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Bind the layer's problem once, and say which kernels serve it. The parameters stay as they are."""
        params = self._get_layer_params(layer)
        n, k = params.weight.shape
        ue8m0 = params.block_scale.dtype == torch.float8_e8m0fnu
        problem = _problem(self.config, params.weight.dtype, ue8m0, (n, k))
        plan = registry.plan_for(problem, params.weight.device, repack=False)
        assert problem.format is not None
        self.bound = (n, k, problem.format.name, "row", str(problem.numerics), "")
        logger.info_once("blockscale: %s [%d, %d] served by %s", problem.format.name, n, k, str(plan))

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`x: [..., K]` -> `[..., N]` in the layer's dtype."""
        params = self._get_layer_params(layer)
        y: Tensor = library.OPS.linear(x, params.weight, params.block_scale, None, None, bias, *self.bound)
        return y.to(self.config.out_dtype)

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        """`A: [M, K]`, quantized in the layer's groups with scales As, times `B: [N, K]` with Bs -> `[M, N]`.

        The second half of `apply_weights`, which is one op. vLLM 0.33 does not call it where `apply_weights` is ours.
        """
        n, k, weight, layout, numerics, kernel = self.bound
        act = get_numerics(numerics).activation_format(get_format(weight))
        assert act is not None  # `_problem` names a group
        y: Tensor = library.OPS.matmul(
            A, As, None, B, Bs, None, act.name, "row", n, k, weight, layout, self.config.out_dtype, kernel
        )
        return y


def register() -> None:
    """vLLM's entry point. Called once in each of its processes, possibly again: adds our kernel only once."""
    where = os.environ.get(SWITCH, "last")
    if where not in ("first", "last", "off"):
        raise BlockscaleError(f"{SWITCH}: got {where!r}, need first, last or off")
    if where == "off":
        return
    for name in _PLATFORMS:
        platform = PlatformEnum[name]
        present = lists._POSSIBLE_FP8_BLOCK_KERNELS.setdefault(platform, [])
        if BlockscaleFp8BlockLinearKernel in present:
            continue
        lists.register_linear_kernel(BlockscaleFp8BlockLinearKernel, platform, _LISTS)
        if where == "first":
            present.insert(0, present.pop())
    logger.info_once("blockscale: BlockscaleFp8BlockLinearKernel registered %s for FP8 blocks", where)


def _platform() -> Platform:
    return detect(torch.device(current_platform.device_type))


def _refusals(config: Any) -> Iterator[str]:
    """What no kernel of ours computes, read from vLLM's description of a layer."""
    weight, act = config.weight_quant_key, config.activation_quant_key
    if act.scale.static:
        yield "activation scales are static, needs dynamic ones"
    rows, cols = weight.scale.group_shape
    if rows < 1 or cols < 1:
        yield f"weight blocks are {rows}x{cols}, needs both positive"
    act_rows, act_cols = act.scale.group_shape
    if act_rows != 1 or act_cols < 1:
        yield f"activation groups are {act_rows}x{act_cols}, needs 1 row"
    if config.input_dtype != config.out_dtype:
        yield f"x is {config.input_dtype} and the result {config.out_dtype}, needs the same dtype"
    if _element(weight.dtype) is None:
        yield f"weights are {weight.dtype}, needs an FP8 dtype"


def _problem(
    config: Any, dtype: torch.dtype | None = None, ue8m0: bool = False, shape: tuple[int, int] | None = None
) -> Problem:
    """The layer as the registry sees it. dtype, ue8m0 and shape: of the loaded parameters, where they are known."""
    rows, cols = config.weight_quant_key.scale.group_shape
    group = config.activation_quant_key.scale.group_shape[1]
    element = _element(dtype or config.weight_quant_key.dtype)
    fmt = get_format(f"{element}_{rows}x{cols}{'_ue8m0' if ue8m0 else ''}")
    numerics = get_numerics(f"checkpoint,act_group={group},act_rounding=none")
    n, k = shape or config.weight_shape
    return Problem("linear", n, k, config.input_dtype, fmt, "row", config.out_dtype, numerics)


def _element(dtype: torch.dtype) -> str | None:
    return next((e.name for e in ELEMENTS.values() if e.bits == 8 and e.dtype == dtype), None)
