"""A GGUF file as the source of `quantize`: its tensors dequantized by rows, under Hugging Face names.

Only the llama family, whose tensors map one to one. llama.cpp stores the rows of Llama's q and k interleaved for its
rotary embedding; they are read back in Hugging Face's order. Unquantized tensors are written in BF16.

Source: the `gguf` package (reader and block formats) and llama.cpp's conversion of Llama weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BlockscaleError, CheckpointError
from .source import slabs

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""`general.architecture` -> transformers' class."""

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_UNUSED = ("rope_freqs.weight",)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. heads: of a q or k weight whose rows are interleaved; 0 for all others. path, index: where it is.

    Readers are opened in the process that reads: a memory map does not travel to a worker.
    """

    path: Path
    index: int
    name: str
    shape: tuple[int, ...]
    stored_bytes: int
    heads: int = 0

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def nbytes(self) -> int:
        return self.stored_bytes

    def matrices(self) -> Iterator[GgufTensor]:
        yield self

    def stream(self, multiple: int = 1, again: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in fp32) by slabs; a vector is one row."""
        yield from ((begin, self._rows(begin, end)) for begin, end in slabs(self.shape, multiple))

    def _rows(self, begin: int, end: int) -> Tensor:
        from gguf import dequantize

        stored = _reader(self.path).tensors[self.index]
        if len(self.shape) == 1:
            return torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype(np.float32).reshape(1, -1))
        rows = np.arange(begin, end)
        if self.heads:
            head = self.shape[0] // self.heads
            h, half, j = rows // head, rows % head // (head // 2), rows % (head // 2)
            rows = h * head + j * 2 + half
        data = stored.data[rows]
        return torch.from_numpy(dequantize(data, stored.tensor_type).astype(np.float32, copy=True))


_open: dict[Path, Any] = {}


def _reader(path: Path) -> Any:
    if path not in _open:
        try:
            from gguf import GGUFReader
        except ImportError as e:
            raise BlockscaleError(f"{path}: reading GGUF needs the gguf package: pip install 'blockscale[gguf]'") from e
        try:
            _open[path] = GGUFReader(path)
        except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{path}: not a GGUF file that can be read: {e}") from e
    return _open[path]


def read_gguf(path: Path) -> tuple[dict[str, Any], Sequence[GgufTensor]]:
    """(config.json as transformers needs it, tensors under Hugging Face names). Raises CheckpointError."""
    reader = _reader(path)
    family = _value(reader, "general.architecture")
    if family not in FAMILIES:
        raise CheckpointError(f"{path}: architecture {family!r} is not known; known: {', '.join(FAMILIES)}")
    config = _config(reader, family, path)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = []
    for index, stored in enumerate(reader.tensors):
        if stored.name in _UNUSED:
            continue
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored.name)
        if stored.name in _WHOLE:
            name, turned = _WHOLE[stored.name], 0
        elif match and match[2] in _BLOCK:
            name = f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"
            turned = heads.get(match[2], 0) if family == "llama" else 0
        else:
            raise CheckpointError(f"{path}: {stored.name}: no {family} tensor that is known here")
        shape = tuple(int(n) for n in reversed(stored.shape.tolist()))
        tensors.append(GgufTensor(path, index, name, shape, int(stored.n_bytes), turned))
    config["tie_word_embeddings"] = all(t.name != "lm_head.weight" for t in tensors)
    return config, tensors


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _config(reader: Any, family: str, path: Path) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        value = _value(reader, f"{family}.{key}", default)
        if value is None:
            raise CheckpointError(f"{path}: the key {family}.{key} is missing")
        return value

    heads, hidden = get("attention.head_count"), get("embedding_length")
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "max_position_embeddings": get("context_length"),
        "vocab_size": get("vocab_size", len(tokens.data) if tokens is not None else None),
        "hidden_act": "silu",
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id", 0),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id", 0),
        "torch_dtype": "bfloat16",
    }


def save_tokenizer(path: Path, folder: Path) -> None:
    """The tokenizer inside the GGUF file, as tokenizer.json and companions, if transformers is installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
