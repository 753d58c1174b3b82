"""Whole models the slow and obvious way: dequantize every weight, fake-quantize every activation, all in fp32.

Nothing of the library is used but the names of its modules. The dequantized weights go into a plain checkpoint that
stock transformers loads, so its own renaming and stacking are checked against ours too.
"""

import json
import math

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import blockscale

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def expand(scale, rows, cols, shape):
    return scale.float().repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(cols, 1)[:, : shape[1]]


def unpack(byte):
    code = byte.view(torch.uint8).long()
    return E2M1[torch.stack([code & 15, code >> 4], -1).flatten(-2)]


def dequantize(name, tensors, block):
    """fp32 weight of the tensor `name`, or None when it is not quantized."""
    stem = name.removesuffix("weight")
    data = tensors[name]
    if f"{stem}weight_scale_2" in tensors:
        values = unpack(data)
        return values * expand(tensors[f"{stem}weight_scale"], 1, 16, values.shape) * tensors[f"{stem}weight_scale_2"]
    scale = tensors.get(f"{stem}weight_scale_inv", tensors.get(f"{stem}scale"))
    if scale is None or not name.endswith("weight"):
        return None
    if data.dtype == torch.int8:
        values = unpack(data)
        return values * expand(scale, 1, 32, values.shape)
    return data.float() * expand(scale, block, block, data.shape)


def plain_checkpoint(source, target, change=lambda name, weight: weight):
    """The same model without quantization, in fp32, under the same names. change: damage a dequantized weight."""
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    config = json.loads((source / "config.json").read_text())
    block = config.pop("quantization_config")["weight_block_size"][0]
    config.pop("expert_dtype", None)
    plain = {}
    for name, tensor in tensors.items():
        weight = dequantize(name, tensors, block)
        if weight is not None:
            plain[name] = change(name, weight)
        elif not name.endswith(("weight_scale_inv", ".scale", "weight_scale", "weight_scale_2", "input_scale")):
            plain[name] = tensor.float() if tensor.is_floating_point() else tensor
    target.mkdir()
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return target


def e4m3(x, group, powers, floor):
    """Fake quantization: one scale for `group` elements of a row."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=floor) / 448
    if powers:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    quantized = (padded / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return quantized.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def nvfp4(x, level):
    """Fake quantization with an E4M3 scale for 16 elements under a given second level."""
    blocks = x.float().unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / level).clamp(max=448).to(torch.float8_e4m3fn).float() * level
    scaled = torch.where(scale > 0, blocks / scale, 0).clamp(-6, 6)
    positive = E2M1[:8]
    distance = (scaled.abs()[..., None] - positive).abs()
    even_first = distance + torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]) * 1e-6  # a tie goes to the even code
    return (positive[even_first.argmin(-1)] * scaled.sign() * scale).flatten(-2).to(x.dtype)


def quantized_linears(ours):
    """Names of a loaded model's modules whose input `linear` (or `output`) of `model` quantizes."""
    kinds = (blockscale.nn.Linear, blockscale.nn.BlockDiagonalLinear)
    return {name for name, module in ours.named_modules() if isinstance(module, kinds)}


def model(folder, linears, *, linear, experts, output=None, weigh_first=False):
    """A stock model from a plain checkpoint with fake quantization put in.

    linears: names of the modules whose input `linear` quantizes. experts, output: the same for experts and for V4's
    grouped output projections. weigh_first: the routing weight multiplies before the second matrix.
    """
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in made.named_modules():
        if name in linears:
            act = (output or (lambda x: x)) if hasattr(module, "n_groups") else linear
            module.register_forward_pre_hook(lambda m, args, act=act: (act(args[0]), *args[1:]))
        elif name.endswith(".experts"):
            module.forward = routed(module, experts, weigh_first)
    return made


def routed(module, act, weigh_first):
    limit = getattr(module, "limit", math.inf)

    def forward(x, index, weights):
        y = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for expert, weight in zip(index[token].tolist(), weights[token].float(), strict=True):
                gate, up = (act(x[token : token + 1]) @ module.gate_up_proj[expert].T).chunk(2, -1)
                h = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
                h = h * weight if weigh_first else h
                out = act(h) @ module.down_proj[expert].T
                y[token] += (out if weigh_first else out * weight)[0]
        return y

    return forward
