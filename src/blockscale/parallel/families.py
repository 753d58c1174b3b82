"""What the projections of a transformer are to each other, by their names: which cut must fit which.

| block       | cut along N                         | along K              | at                                       |
|-------------|-------------------------------------|----------------------|------------------------------------------|
| MLP         | gate_proj, up_proj (or gate_up_proj)| down_proj            | activation groups of down_proj           |
| MLA         | q_b_proj (or q_proj), kv_b_proj     | o_proj               | heads                                    |
| GQA         | q_proj, k_proj, v_proj              | o_proj               | key/value heads with their query heads   |
| DeepSeek-V4 | q_b_proj, o_a_proj, attn_sink       | o_b_proj             | groups of heads that o_a_proj has        |
| experts     | whole experts; inside one: as an MLP|                      | experts                                  |

A block whose parts cannot be cut together has every weight cut along N and its output gathered ("column, gathered"):
more to say to each other, the same numbers. Latent projections (`q_a_proj`, `kv_a_proj_with_mqa` …) are small: every
rank holds them whole unless asked otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.names import is_official_v4, v4_to_transformers

LATENT = ("q_a_proj", "kv_a_proj_with_mqa", "kv_proj", "indexer.wk", "indexer.weights_proj", "eh_proj")
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)")
STACKED = re.compile(r"(?P<experts>.*\.experts)\.(?P<role>gate_up_proj|down_proj)")
_WORDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
HEAD = "lm_head.weight"


def role_of_expert(word: str) -> str:
    """ "gate_proj", "up_proj", "down_proj" or "gate_up_proj", whatever the checkpoint calls it."""
    return _WORDS.get(word, word)


def canonical(checkpoint: Checkpoint) -> dict[str, str]:
    """The name of each tensor in transformers' words -> its name on disk, for every tensor."""
    names = checkpoint.tensors
    if is_official_v4(names):
        return {v4_to_transformers(name): name for name in names}
    return {name: name for name in names}


def is_extra(name: str, config: Mapping[str, Any]) -> bool:
    """Multi-token prediction layers, which the model that runs does not have."""
    layers = text_config(config).get("num_hidden_layers")
    number = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return name.startswith("mtp.") or (number is not None and layers is not None and int(number[1]) >= layers)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


@dataclass(frozen=True)
class Heads:
    """An attention block that can be cut at whole heads.

    count: things to share out (heads, key/value heads, or groups of heads). columns: projection -> rows of N for each
    thing. rows: the projection cut along K and the columns for each thing. per_head: plain tensors cut the same way.
    repeat: of GQA, ranks that share one key/value head, where there are more ranks than those.
    """

    count: int
    columns: Mapping[str, int]
    row: str
    row_width: int


def attention(
    shapes: Mapping[str, tuple[int, ...]], plain: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> Heads | str:
    """How the projections of one `self_attn` (name -> stored shape) are cut, or why they cannot be cut together."""
    config = text_config(config)
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int):
        return "the config has no num_attention_heads"
    if "o_b_proj" in shapes and "o_a_proj" in shapes:
        count, row = config.get("o_groups", 0), "o_b_proj"
        columns: tuple[str, ...] = ("q_b_proj", "o_a_proj")
    elif "kv_b_proj" in shapes:
        query = "q_b_proj" if "q_b_proj" in shapes else "q_proj"
        count, columns, row = heads, (query, "kv_b_proj"), "o_proj"
    else:
        count, columns, row = config.get("num_key_value_heads", heads), ("q_proj", "k_proj", "v_proj"), "o_proj"
        width = plain.get("q_norm.weight")
        if width and shapes.get("q_proj") and width[0] == shapes["q_proj"][0]:
            return "q_norm runs over all heads together"
    missing = [name for name in (*columns, row) if name not in shapes]
    if missing:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not stored block-scaled"
    odd = [name for name in columns if not count or shapes[name][0] % count]
    if odd or shapes[row][1] % count:
        return f"{', '.join(odd) or row} does not divide into {count} parts"
    return Heads(count, {name: shapes[name][0] // count for name in columns}, row, shapes[row][1] // count)
