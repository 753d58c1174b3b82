"""Steps that read a block-scaled layer: to another format, or back to plain floats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import ScaleError
from ..tensor import BlockScaled
from .byteio import ByteReader, read_bytes
from .checksum import Checksum
from .encode import Encoding, storable_global_scale, storable_scale
from .errors import InexactError
from .exact import convert_exact, errors, values
from .header import DTYPES, TensorInfo
from .names import weight_of
from .reader import Scales, StoredLayer, scales_of
from .source import SLAB
from .stats import Stats
from .steps import Advance, Write
from .writer import Spec


@dataclass(frozen=True)
class LayerSource:
    """A stored layer, read by slabs of rows. infos: its parts by tensor name. Stacked experts come one by one."""

    layer: StoredLayer
    infos: Mapping[str, TensorInfo]

    @property
    def matrices(self) -> int:
        return math.prod(self.layer.shape[:-2])

    def slabs(
        self, multiple: int, total: Checksum | None = None, only: int | None = None
    ) -> Iterator[tuple[int, int, BlockScaled]]:
        """(matrix, first row, slab) in order; a slab's data is overwritten when the next is asked for.

        multiple: slabs start at multiples of so many rows. total: is updated. only: this matrix, to be read again.
        """
        layer = self.layer
        rows, cols = layer.shape[-2:]
        info = self.infos[layer.parts.data]
        width = layer.format.data_shape(rows, cols)[1]
        block_rows = layer.format.block_shape(rows, cols)[0]
        scales = self._scales(total)
        per_matrix = scales.scale.reshape(self.matrices, *scales.scale.shape[-2:])
        with ByteReader(info, again=only is not None) as reader:
            for matrix in range(self.matrices) if only is None else (only,):
                for begin, end in self._ranges(multiple):
                    at = (matrix * rows + begin) * width * info.torch_dtype.itemsize
                    piece = reader.read(at, at + (end - begin) * width * info.torch_dtype.itemsize)
                    if total is not None:
                        total.update(piece)
                    yield matrix, begin, BlockScaled(
                        piece.view(info.torch_dtype).reshape(end - begin, width),
                        per_matrix[matrix, begin // block_rows : -(-end // block_rows)],
                        layer.format,
                        shape=(end - begin, cols),
                        global_scale=_of_matrix(scales.global_scale, matrix),
                        input_scale=_of_matrix(scales.input_scale, matrix),
                    )  # fmt: skip

    def slab_count(self, multiple: int) -> int:
        """How many `slabs` yields."""
        return self.matrices * sum(1 for _ in self._ranges(multiple))

    def _ranges(self, multiple: int) -> Iterator[tuple[int, int]]:
        rows, cols = self.layer.shape[-2:]
        return row_ranges(rows, cols, math.lcm(multiple, self.layer.format.block[0] or 1))

    def _scales(self, total: Checksum | None) -> Scales:
        small = {}
        for name in self.layer.parts.all:
            if name != self.layer.parts.data:
                piece = read_bytes(self.infos[name])
                if total is not None:
                    total.update(piece)
                small[name] = piece.view(self.infos[name].torch_dtype).reshape(self.infos[name].shape)
        return scales_of(self.layer, small)


def row_ranges(rows: int, cols: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Ranges of about SLAB elements, each but the last a multiple of `multiple` rows."""
    step = max(1, SLAB // max(1, cols * multiple)) * multiple
    yield from ((r, min(r + step, rows)) for r in range(0, rows, step))


def _of_matrix(t: Tensor | None, matrix: int) -> Tensor | None:
    return t.reshape(-1)[matrix] if t is not None and t.dim() else t


@dataclass(frozen=True)
class Convert:
    """A stored layer into another encoding.

    Exact wherever it can be. requantize: quantize anew the slabs that cannot; otherwise they raise InexactError.
    """

    source: LayerSource
    encoding: Encoding
    requantize: bool = False
    full_report: bool = False

    @property
    def name(self) -> str:
        return self.source.layer.name

    @property
    def nbytes(self) -> int:
        return self.source.layer.nbytes

    @property
    def _static(self) -> bool:
        return self.source.layer.parts.input_scale is not None

    @property
    def _stacked(self) -> bool:
        return len(self.source.layer.shape) > 2

    @property
    def outputs(self) -> tuple[Spec, ...]:
        return self.encoding.specs(self.name, self.source.layer.shape, self._static)

    @property
    def _multiple(self) -> int:
        """Rows at which slabs may be cut; a format with one scale for all rows wants them together."""
        block = self.encoding.format.block[0]
        return block if block is not None else self.source.layer.shape[-2]

    def run(self, write: Write, advance: Advance) -> dict[str, Any]:
        layer, total = self.source.layer, Checksum()
        stats = Stats(math.prod(layer.shape), self.source.slab_count(self._multiple), self.full_report)
        names = self.encoding.parts(self.name, self._static, self._stacked)
        small: dict[str, list[Tensor]] = {}
        levels: dict[int, Tensor] = {}
        requantized = 0
        for i, (matrix, begin, q) in enumerate(self.source.slabs(self._multiple, total)):
            new, parts = self._exactly(q)
            if new is None:
                new = self._requantized(q, matrix, levels)
                parts = self.encoding.tensors(self.name, _with_input_scale(new, q), self._stacked)
                requantized += 1
                stats.add(values(q).float(), new, i)
            else:
                stats.add_exact(new, mixed=self.requantize)
            write(names.data, parts.pop(names.data))
            for name, t in parts.items():
                if name == names.scale or begin == 0:
                    small.setdefault(name, []).append(t.reshape(-1))
            advance(q.data.numel())
        for name, pieces in small.items():
            write(name, torch.cat([piece.view(torch.uint8) for piece in pieces]))
        record: dict[str, Any] = {"name": self.name, "step": "convert", "from": layer.format.name}
        record |= {"format": self.encoding.format.name, "shape": list(layer.shape), "exact": requantized == 0}
        record["checksum"] = total.hexdigest()
        return record | stats.result()

    def checksum(self) -> str:
        total = Checksum()
        for _ in self.source.slabs(self._multiple, total):
            pass
        return total.hexdigest()

    def _exactly(self, q: BlockScaled) -> tuple[BlockScaled | None, dict[str, Tensor]]:
        """The slab with the same values and the tensors to store, or (None, {}) when one of the two cannot be."""
        new = convert_exact(q, self.encoding.format)
        if new is None:
            return None, {}
        try:
            return new, self.encoding.tensors(self.name, _with_input_scale(new, q), self._stacked)
        except ScaleError:
            return None, {}

    def _requantized(self, q: BlockScaled, matrix: int, levels: dict[int, Tensor]) -> BlockScaled:
        """levels: global scales by matrix, filled here."""
        layer, fmt = self.source.layer, self.encoding.format
        if not self.requantize:
            scales = f"{layer.scale_dtype} scales"
            raise InexactError(
                f"{layer.file}: {self.name}: {layer.format} ({scales}) to {fmt} ({self.encoding.scale_dtype} scales) "
                "would change values; --allow-requantize quantizes anew and reports the error"
            )
        x = values(q).float()
        if not fmt.two_level:
            return reference.quantize(x, fmt, scale=storable_scale(x, self.encoding))
        if matrix not in levels:
            levels[matrix] = self._global_scale(matrix)
        return reference.quantize(x, fmt, global_scale=levels[matrix])

    def _global_scale(self, matrix: int) -> Tensor:
        """NVFP4's second level, from the largest value of the whole matrix: one more pass over it."""
        amax = torch.zeros(())
        for _, _, q in self.source.slabs(self._multiple, only=matrix):
            amax = torch.maximum(amax, reference.dequantize(q).abs().amax())
        return storable_global_scale(amax, self.encoding)


def _with_input_scale(new: BlockScaled, old: BlockScaled) -> BlockScaled:
    return replace(new, input_scale=old.input_scale)


@dataclass(frozen=True)
class Dequantize:
    """A stored layer as plain floats. dtype: safetensors' code, e.g. "BF16"."""

    source: LayerSource
    dtype: str

    @property
    def name(self) -> str:
        return self.source.layer.name

    @property
    def nbytes(self) -> int:
        return self.source.layer.nbytes

    @property
    def outputs(self) -> tuple[Spec, ...]:
        stacked = len(self.source.layer.shape) > 2
        return (Spec(self.name if stacked else weight_of(self.name), self.dtype, self.source.layer.shape),)

    def run(self, write: Write, advance: Advance) -> dict[str, Any]:
        total, layer, (out,) = Checksum(), self.source.layer, self.outputs
        error = power = 0.0
        for matrix, begin, q in self.source.slabs(1, total):
            exact = values(q)
            y = exact.to(torch.float32).to(DTYPES[self.dtype])
            self._check_range(exact, y, matrix, begin)
            found = errors(exact, y.double())
            error, power = error + found[0], power + found[1]
            write(out.name, y)
            advance(q.data.numel())
        relative = float(f"{math.sqrt(error / power) if power else 0.0:.6g}")
        record: dict[str, Any] = {"name": self.name, "step": "dequantize", "from": layer.format.name}
        record["format"] = self.dtype
        record |= {"shape": list(layer.shape), "exact": relative == 0, "relative_error": relative}
        return record | {"checksum": total.hexdigest()}

    def _check_range(self, exact: Tensor, y: Tensor, matrix: int, first_row: int) -> None:
        lost = y.isinf() & exact.isfinite()
        if lost.any():
            row, col = lost.nonzero()[0].tolist()
            at = [*([matrix] if self.source.matrices > 1 else []), first_row + row, col]
            raise InexactError(
                f"{self.source.layer.file}: {self.name}: {exact[row, col].item():g} at {at} is too large for "
                f"{self.dtype}; needs a dtype with a wider range (--dtype bf16 or f32)"
            )

    def checksum(self) -> str:
        total = Checksum()
        for _ in self.source.slabs(1, total):
            pass
        return total.hexdigest()
