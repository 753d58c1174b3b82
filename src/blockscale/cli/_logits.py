"""What two models say about the same text: perplexity, Kullback-Leibler divergence, agreement of the best token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import open_checkpoint
from ..errors import CheckpointError
from .run import integration, tokenizer_of


def compare_logits(a: Path, b: Path, text: str, tokens: int, chunks: int) -> dict[str, Any]:
    """perplexity_a, perplexity_b; kl: mean of KL(a || b) in nats a token; top1_agreement: a share; tokens: counted.

    Block-scaled checkpoints run on their stored bytes, others through transformers in their own dtype. Needs
    transformers and a tokenizer in `a`. Both models are in memory at once.
    """
    integration()  # silences transformers, which would warn of texts longer than the context: they are cut below
    ids = tokenizer_of(a)(text, return_tensors="pt")["input_ids"][0]
    if ids.numel() < 2:
        raise CheckpointError(f"verify --logits: the text has {ids.numel()} tokens, needs at least 2")
    pieces = [piece for piece in ids.split(tokens)[:chunks] if piece.numel() > 1]
    one, two = _model(a), _model(b)
    losses, divergence, agree, counted = [0.0, 0.0], 0.0, 0, 0
    with torch.inference_mode():
        for piece in pieces:
            log_a, log_b = (m(piece[None]).logits[0, :-1].float().log_softmax(-1) for m in (one, two))
            targets = piece[1:, None]
            losses[0] -= float(log_a.gather(1, targets).sum())
            losses[1] -= float(log_b.gather(1, targets).sum())
            divergence += float((log_a.exp() * (log_a - log_b)).sum())
            agree += int((log_a.argmax(-1) == log_b.argmax(-1)).sum())
            counted += targets.numel()
    return {
        "perplexity_a": math.exp(losses[0] / counted),
        "perplexity_b": math.exp(losses[1] / counted),
        "kl": divergence / counted,
        "top1_agreement": agree / counted,
        "tokens": counted,
    }


def _model(path: Path) -> Any:
    if open_checkpoint(path).layers:
        from ..integrations.transformers import load

        return load(path)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")
