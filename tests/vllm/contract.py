"""As much of vLLM 0.33 as our plugin touches: names, signatures and what they do, for a machine without vLLM.

Written from vLLM's interface, not from its code; `real.py` checks these signatures against the real ones.
"""

import enum
import logging
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch


class PlatformEnum(enum.Enum):
    CUDA, ROCM, TPU, XPU, CPU, OOT, UNSPECIFIED = range(7)


class CurrentPlatform:
    device_type = "cpu"
    _enum = PlatformEnum.CPU


class GroupShape(NamedTuple):
    row: int
    col: int


@dataclass
class Scale:
    static: bool
    group_shape: GroupShape


@dataclass
class QuantKey:
    dtype: torch.dtype
    scale: Scale


@dataclass
class Config:
    """FP8ScaledMMLinearLayerConfig."""

    weight_quant_key: QuantKey
    activation_quant_key: QuantKey
    weight_shape: tuple
    input_dtype: torch.dtype
    out_dtype: torch.dtype


class Fp8BlockScaledMMLinearKernel(ABC):
    """What a block kernel inherits: it holds the config and finds a layer's parameters under either of two names."""

    apply_input_quant = True

    def __init__(self, config):
        self.config = config

    @classmethod
    @abstractmethod
    def is_supported(cls, compute_capability=None): ...

    @classmethod
    @abstractmethod
    def can_implement(cls, config): ...

    def process_weights_after_loading(self, layer):
        raise NotImplementedError

    def apply_weights(self, layer, x, bias=None, **kwargs):
        raise NotImplementedError

    @abstractmethod
    def apply_block_scaled_mm(self, A, B, As, Bs): ...

    def _get_layer_params(self, layer, **kwargs):
        scale = getattr(layer, "weight_scale_inv", None)
        return types.SimpleNamespace(weight=layer.weight, block_scale=layer.weight_scale if scale is None else scale)


class Logger(logging.Logger):
    def info_once(self, msg, *args, scope="local"):
        self.info(msg, *args)


def register_linear_kernel(kernel_class, platform, kernel_type="mp"):
    if kernel_type != "fp8_block":
        raise ValueError(f"Unrecognized kernel type: {kernel_type}")
    lists().setdefault(platform, []).append(kernel_class)


def lists():
    return sys.modules["vllm.model_executor.kernels.linear"]._POSSIBLE_FP8_BLOCK_KERNELS


def modules():
    """name -> module, as `sys.modules` shall hold them."""
    made = {name: types.ModuleType(name) for name in (
        "vllm", "vllm.logger", "vllm.platforms", "vllm.model_executor", "vllm.model_executor.kernels",
        "vllm.model_executor.kernels.linear",
    )}  # fmt: skip
    linear = made["vllm.model_executor.kernels.linear"]
    made["vllm.model_executor.kernels"].linear = linear
    linear._POSSIBLE_FP8_BLOCK_KERNELS = {PlatformEnum.CUDA: [object], PlatformEnum.CPU: [object]}
    linear.register_linear_kernel = register_linear_kernel
    linear.Fp8BlockScaledMMLinearKernel = Fp8BlockScaledMMLinearKernel
    made["vllm.platforms"].PlatformEnum, made["vllm.platforms"].current_platform = PlatformEnum, CurrentPlatform()
    made["vllm.logger"].init_logger = lambda name: Logger(name, logging.INFO)
    return made


def config(n, k, *, block=(128, 128), dtype=torch.bfloat16, static=False, out_dtype=None, element=torch.float8_e4m3fn):
    return Config(
        QuantKey(element, Scale(True, GroupShape(*block))),
        QuantKey(element, Scale(static, GroupShape(1, block[1]))),
        (n, k), dtype, out_dtype or dtype,
    )  # fmt: skip
