"""transformers' quantizer interface, implemented: block-scaled checkpoints load as stored."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoint import Checkpoint, open_checkpoint
from ...errors import BlockscaleError, CheckpointError
from ...nn import DenseLinear, Experts, WeightModule
from ...numerics import Numerics
from ...policy import Policy, model_policy
from .binding import Bindings, bind
from .filling import as_stored, fill, settle, stored_tensors
from .sharded import Parallel, Sharder

TESTED = "5.23"
"""The transformers series that these interfaces were tested with: they are private, and upstream is moving them."""


@dataclass(frozen=True)
class Choice:
    """What the user asked of every model: see `blockscale.policy.model_policy`."""

    numerics: str | Numerics | Policy = "reference"
    kernel: str | None = None
    parallel: Parallel | None = None


enabled: Choice | None = None
"""Of `enable`: for every thread. None when it is not in force."""
LOADING: ContextVar[Choice | None] = ContextVar("blockscale_loading", default=None)
"""Of the `load` or `enabled` that is running in this context, if any."""


def check_version() -> None:
    """Raise BlockscaleError when the installed transformers is not of the tested series."""
    if not transformers.__version__.startswith(TESTED + "."):
        raise BlockscaleError(
            f"blockscale.integrations.transformers works with transformers {TESTED}.x, got {transformers.__version__}: "
            f"pip install 'transformers>={TESTED},<{_after(TESTED)}'"
        )


def _after(series: str) -> str:
    major, minor = series.split(".")
    return f"{major}.{int(minor) + 1}"


class StoredConfig(QuantizationConfigMixin):
    """A checkpoint's `quantization_config`, kept word for word, so that saving writes what was read."""

    def __init__(self, **said: Any) -> None:
        self.said = said
        self.quant_method = said.get("quant_method", "fp8")

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.said)


class BlockscaleQuantizer(HfQuantizer):
    """Puts our modules where the file holds block-scaled weights, and the file's bytes into them.

    Everything else (names, devices, dtypes, tied and unquantized weights) stays transformers' business.
    """

    requires_calibration = False
    checkpoint: Checkpoint
    bindings: Bindings
    sharder: Sharder | None = None
    head: str | None = None
    """Path of an output projection of which this rank reads its rows."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        check_version()
        if not self.pre_quantized:
            raise BlockscaleError("this loads quantized checkpoints; make one with `blockscale quantize SRC DST`")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Never cast 8-bit floats."""
        code = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return None if "F8" in code or "float8" in code else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files or not checkpoint_files[0].endswith(".safetensors"):
            raise CheckpointError("block-scaled models load from safetensors files; got a state_dict or pickle files")
        self.checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        choice = LOADING.get() or enabled or Choice()
        policy = model_policy(choice.numerics, self.checkpoint.config, kernel=choice.kernel)
        model.blockscale_policy = policy
        with torch.device("cpu"):  # transformers builds models under the meta device
            self.sharder = Sharder(choice.parallel) if choice.parallel else None
            self.bindings = bind(model, self.checkpoint, _renamer(model), policy, self.sharder)
        if self.sharder is not None:
            self.head = self.sharder.take_head(model)
        self._expect_only_the_rest(model)
        return model

    def _expect_only_the_rest(self, model: Any) -> None:
        """Keep transformers from missing our tensors in the file, and our buffers from its tensors."""
        owners = {path: path for path in self.bindings.modules}
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                owners |= {path: name for path in owners if path.startswith(f"{name}.")}
        if self.head is not None:
            owners[self.head] = self.head
        if not owners:
            return
        prefix = f"{model.base_model_prefix}."
        on_disk = "|".join(sorted({re.escape(path.removeprefix(prefix)) for path in owners.values()}))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()), rf"^({re.escape(prefix)})?({on_disk})\."
        }  # fmt: skip
        in_memory = "|".join(map(re.escape, owners))
        model._keys_to_ignore_on_load_missing = {
            *(model._keys_to_ignore_on_load_missing or ()), rf"^({in_memory})\.stored_"
        }  # fmt: skip

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            source = cast(Checkpoint, self.sharder or self.checkpoint)  # what `fill` wants of either is `load`
            for path, slots in self.bindings.slots.items():
                module = model.get_submodule(path)
                assert isinstance(module, WeightModule)
                fill(module, slots, self.bindings.names[path], source)
                settle(module, model.dtype)
            if self.sharder is not None:
                self.sharder.adapt(model, self.head)
                model.blockscale_rank = self.sharder.source
        _use_dense_kernels(model)
        model._weight_conversions = []  # get_state_dict_and_metadata gives the checkpoint's names already
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors as the checkpoint names and stores them, for save_pretrained.

        Block-scaled weights come from the modules' memory. A plain tensor comes from the model too; where the model
        holds it in another dtype and it was not changed, or does not hold it at all (multi-token prediction layers),
        the checkpoint's own bytes are carried over.
        """
        if self.sharder is not None:
            raise BlockscaleError(
                "save_pretrained: this rank holds a part of the model; the checkpoint it came from is whole"
            )
        ours: dict[str, Tensor] = {}
        for path, slots in self.bindings.slots.items():
            ours.update(stored_tensors(model.get_submodule(path), slots))
        held = model.state_dict()
        saved: dict[str, Tensor] = {}
        for name, info in self.checkpoint.tensors.items():
            if name in ours:
                saved[name] = as_stored(ours[name], info.torch_dtype, info.shape)
            else:
                saved[name] = self._plain(name, held.get(self.bindings.plain.get(name, "")))
        return saved, {}

    def _plain(self, name: str, held: Tensor | None) -> Tensor:
        stored = self.checkpoint.tensor(name)
        if held is None or held.is_meta or held.shape != stored.shape:
            return stored.clone()
        held = held.cpu()
        if held.dtype != stored.dtype and torch.equal(stored.to(held.dtype), held):
            return stored.clone()
        return held


def _renamer(model: Any) -> Callable[[str], str]:
    """Checkpoint name -> the model's name, as transformers itself renames."""
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    prefix, known = model.base_model_prefix, {name for name, _ in model.named_modules()}

    def rename(name: str) -> str:
        new = str(apply_renamings(name, renamings))
        top = new.partition(".")[0]
        if top not in known and prefix and f"{prefix}.{top}" in known:
            return f"{prefix}.{new}"
        if top == prefix and prefix not in known:
            return new.removeprefix(f"{prefix}.")
        return new

    return rename


def _use_dense_kernels(model: Any) -> None:
    """Let plain linears (lm_head first of all) take our kernels for unquantized weights."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
            model.set_submodule(name, DenseLinear.of(module))
