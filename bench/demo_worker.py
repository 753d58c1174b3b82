"""One model in a process of its own, so that its peak memory is its own: answers commands on stdin with JSON lines.

`python demo_worker.py (stock|blockscale) FOLDER DTYPE [NUMERICS]`.
Commands: `load`, `generate`, `perplexity`, `split`, `quit`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from blockscale.integrations import transformers as ours
from blockscale.integrations.transformers import measure
from demo_model import text

PROMPT = "The encyclopaedia is a work that"
NEW_TOKENS = 48
PREFILL_TOKENS = 512
WINDOWS = 4


class Worker:
    """How it loads is the only difference between the variants; all else is the same code on the same tokens."""

    def __init__(self, how: str, folder: str, dtype: str, numerics: str = "reference") -> None:
        self.numerics = numerics
        self.how, self.folder, self.dtype = how, Path(folder), getattr(torch, dtype)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.ids = self.tokenizer(text(), return_tensors="pt").input_ids
        self.model: Any = None

    def load(self) -> dict[str, Any]:
        start = time.perf_counter()
        if self.how == "blockscale":
            self.model = ours.load(self.folder, dtype=self.dtype, numerics=self.numerics)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return {"load_s": time.perf_counter() - start, "kernels": measure.kernels_in_use(self.model)}

    def generate(self) -> dict[str, Any]:
        """One continuation and one prefill, timed; peak memory until now."""
        prompt = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        decode = measure.generate(self.model, prompt, NEW_TOKENS, stop=False)
        prefill = measure.generate(self.model, self.ids[:, :PREFILL_TOKENS], 1)
        return {
            "decode": decode.decode_tokens_per_second,
            "prefill": prefill.prefill_tokens_per_second,
            "peak_memory_bytes": measure.peak_memory("cpu"),
            "text": self.tokenizer.decode(decode.tokens),
        }

    def perplexity(self) -> dict[str, Any]:
        """Of WINDOWS x 512 tokens, and the most likely token at each position."""
        loss, top = 0.0, []
        with torch.inference_mode():
            for i in range(WINDOWS):
                window = self.ids[:, i * PREFILL_TOKENS : (i + 1) * PREFILL_TOKENS]
                logits = self.model(window).logits[0].float()
                loss += torch.nn.functional.cross_entropy(logits[:-1], window[0, 1:], reduction="sum").item()
                top += logits.argmax(-1).tolist()
        return {"perplexity": math.exp(loss / (WINDOWS * (PREFILL_TOKENS - 1))), "top": top}

    def split(self) -> dict[str, Any]:
        """Where the time of a decode step goes, as shares."""
        prompt = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        with measure.time_split(self.model) as split:
            measure.generate(self.model, prompt, NEW_TOKENS, stop=False)
        return split.as_dict()


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not meet the answers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        if line.strip() == "quit":
            return
        try:
            answer = getattr(worker, line.strip())()
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
