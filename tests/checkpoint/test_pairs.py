"""Every pair of encodings: those that hold the same values convert there and back to the same files, others refuse."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint import compare_checkpoints, convert_checkpoint, quantize_checkpoint
from blockscale.checkpoint.errors import InexactError

# what the numbers are: (format, style, scale dtype) …
ENCODINGS = {
    "tile": [("fp8_128x128", style, "f32") for style in ("deepseek", "modelopt", "compressed_tensors")],
    "tile_bf16": [("fp8_128x128", style, "bf16") for style in ("deepseek", "compressed_tensors")],
    "tile_pow2": [
        ("fp8_128x128_ue8m0", style, dtype) for style in ("deepseek", "deepseek_v4") for dtype in ("f32", "e8m0")
    ],
    "small_pow2": [
        ("fp8_32x32_ue8m0", "deepseek", "f32"),
        ("fp8_32x32_ue8m0", "deepseek", "e8m0"),
        ("fp8_32x32_ue8m0", "deepseek_v4", "e8m0"),
    ],
    "line": [("fp8_1x128", "deepseek", "f32")],
    "row": [("fp8_row", style, "f32") for style in ("modelopt", "compressed_tensors")],
    "tensor": [("fp8_tensor", style, "f32") for style in ("deepseek", "modelopt", "compressed_tensors")],
    "mxfp8": [
        ("mxfp8", "deepseek", "u8"),
        ("mxfp8", "deepseek", "e8m0"),
        ("mxfp8", "modelopt", "u8"),
        ("mxfp8", "compressed_tensors", "u8"),
    ],
    "mxfp4": [
        ("mxfp4", "deepseek", "u8"),
        ("mxfp4", "deepseek_v4", "e8m0"),
        ("mxfp4", "modelopt", "u8"),
        ("mxfp4", "compressed_tensors", "u8"),
    ],
    "nvfp4": [("nvfp4", "modelopt", None)],
    "nvfp4_inverse": [("nvfp4", "compressed_tensors", None)],
}
# … and in what other kinds they are exact
EXACT = {
    "tile": ["tile", "line"],
    "tile_bf16": ["tile", "tile_bf16", "line"],
    "tile_pow2": ["tile", "tile_bf16", "tile_pow2", "small_pow2", "line", "mxfp8"],
    "small_pow2": ["small_pow2", "mxfp8"],
    "line": ["line"],
    "row": ["row", "line"],
    "tensor": ["tensor", "row", "tile", "line"],
    "mxfp8": ["mxfp8"],
    "mxfp4": ["mxfp4", "mxfp8", "tile", "tile_bf16", "tile_pow2", "small_pow2", "line"],
    "nvfp4": ["nvfp4"],
    "nvfp4_inverse": ["nvfp4_inverse", "nvfp4"],
}
ALL = [(kind, encoding) for kind, encodings in ENCODINGS.items() for encoding in encodings]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two weights, one ragged, whose halves differ by 2^-16: no scale serves a whole row."""
    src = tmp_path_factory.mktemp("pairs") / "src"
    src.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": torch.ones(160)}
    for name, (rows, cols) in {"a": (200, 160), "b": (128, 256)}.items():
        w = torch.randn(rows, cols, generator=generator)
        w[:, 128:] *= 2.0**-16
        tensors[f"model.layers.0.{name}_proj.weight"] = w.bfloat16()
    save_file(tensors, src / "model.safetensors")
    (src / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return src


def contents(path):
    weights = {p.name: p.read_bytes() for p in sorted(path.glob("*.safetensors"))}
    return weights, json.loads((path / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "encoding"), ALL, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else v)
def test_there_and_back(source, tmp_path, kind, encoding):
    def convert(src, dst, to):
        convert_checkpoint(src, dst, to[0], style=to[1], scale_dtype=to[2])

    one = tmp_path / "one"
    quantize_checkpoint(source, one, encoding[0], style=encoding[1], scale_dtype=encoding[2])
    for target_kind, target in ALL:
        there, back = tmp_path / "there", tmp_path / "back"
        if target_kind not in EXACT[kind]:
            with pytest.raises(InexactError):
                convert(one, there, target)
            assert not there.exists()
            continue
        convert(one, there, target)
        assert compare_checkpoints(one, there)["same_values"], target
        if (kind, target_kind) != ("nvfp4_inverse", "nvfp4"):  # an inverse of an inverse need not exist
            convert(there, back, encoding)
            assert contents(back) == contents(one), target
            shutil.rmtree(back)
        shutil.rmtree(there)
