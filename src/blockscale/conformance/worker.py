"""`python -m blockscale.conformance.worker DEVICE`: a process that tries the cases it is sent, one line of JSON each.

Own processes and not `multiprocessing`: a kernel may take its process down, and `spawn` would run the caller's script
again. In: `{"case": …, "kernel": name or null, "skip": [kernel, …]}`. Out, on the stdout that it was started with
(what kernels print goes to stderr): `{"at": kernel}` before each kernel, `{"kernel", "failure", "error"}` after it,
`{"done": true}` at the end, with `"lost": true` when the device no longer answers and the process must be replaced.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any, TextIO

import torch

from ..platform import detect
from .cases import Case
from .suite import candidates, examine, prepare


def main(device: str, answers: TextIO) -> None:
    """Serve stdin until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        case = Case.from_json(request["case"])
        lost = False
        kernels = [k for k in candidates(case, detect(device), request["kernel"]) if k.name not in request["skip"]]
        prepared = prepare(case) if kernels else None
        for kernel in kernels:
            _say(answers, at=kernel.name)
            failure, error, row = examine(kernel, case, device, *(prepared or ()))
            said = asdict(failure) if failure else None
            _say(answers, kernel=kernel.name, failure=said, error=error, row_error=row)
            if failure and not _answers(device):
                lost = True
                break
        _say(answers, done=True, lost=lost)
        if lost:
            return


def _say(answers: TextIO, **message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _answers(device: str) -> bool:
    """Whether the device still computes: an illegal access ends a CUDA context, not the process."""
    try:
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except Exception:  # whatever the broken driver raises
        return False


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("BLOCKSCALE_WORKER_THREADS", "1")))
    main(sys.argv[1], out)
