"""Speed of one model in every format as tokens per second of CPU time, on one thread: for machines that others use too.

`python bench/formats_cpu_time.py [FORMAT…]` after `python bench/formats.py make`; weight_only. Prefill of 128 tokens
and the median of 12 decode steps after it, as Markdown rows. Time that the process did not run is not counted;
caches and memory are still shared, so read the ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
import transformers

from blockscale.integrations import transformers as ours
from demo_model import CACHE
from formats import FORMATS

PROMPT, STEPS = 128, 12


@torch.inference_mode()
def speeds(name: str) -> tuple[float, float]:
    """(prefill, decode) in tokens per second of CPU time."""
    folder, options = CACHE / f"smollm2-{name}", {"dtype": torch.bfloat16}
    stock = transformers.AutoModelForCausalLM.from_pretrained
    model: Any = stock(folder, **options) if name == "bf16" else ours.load(folder, numerics="weight_only", **options)
    ids = torch.randint(100, 4000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    model(ids[:, :8])
    begin = time.process_time()
    out = model(ids, use_cache=True)
    prefill, steps = time.process_time() - begin, []
    for _ in range(1 + STEPS):
        begin = time.process_time()
        out = model(out.logits[:, -1:].argmax(-1), use_cache=True, past_key_values=out.past_key_values)
        steps.append(time.process_time() - begin)
    return PROMPT / prefill, 1 / statistics.median(steps[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for each in sys.argv[1:] or ("bf16", *FORMATS):
        print("| {} | {:.0f} | {:.1f} |".format(each, *speeds(each)), flush=True)
