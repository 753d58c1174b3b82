"""Launches of our Triton kernels, sent to a worker that compiles them for Intel and runs them on this CPU.

Inside `executing(target)` the launchers of `blockscale.kernels.triton` work on CPU tensors as they would on an XPU:
the platform that they see is described, and every launch goes through Intel's compiler and OpenCL.
"""

from __future__ import annotations

import ctypes
import pickle
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

import blockscale
from blockscale.kernels import triton as family
from blockscale.platform import Platform

TRITON = "3.3.0"
"""What the XPU venv has: triton-xpu 3.3.0b1, the newest on PyPI."""
OPTIONS = ("num_warps", "num_stages", "grf_mode")


class Worker:
    """The process in the XPU venv, started when it is asked and again after it died: compilers abort, builds hang.

    cache: folder for what was compiled and built, keyed by its source: a second run needs neither.
    """

    def __init__(self, python: Path, cache: Path, limit_s: float = 600.0) -> None:
        self.python, self.cache, self.limit_s = python, cache, limit_s
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        script, sources = Path(__file__).with_name("worker.py"), Path(blockscale.__file__).parent
        self.cache.mkdir(parents=True, exist_ok=True)
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.cache), "TRITON_CACHE_DIR": str(self.cache / "triton")}
        return subprocess.Popen(
            [self.python, script, sources, self.cache], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request. Raises RuntimeError with what went wrong over there, or that it took longer than the limit."""
        process = self.process = self.process or self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(self.limit_s, process.kill)
        late.start()
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            answer: dict[str, Any] = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as e:
            self.process = None
            status = process.wait()
            how = f"over {self.limit_s:.0f} s" if late.finished.is_set() and status == -9 else f"status {status}"
            raise RuntimeError(f"the worker died ({how}) on {request['kernel']} for {request['target']}") from e
        finally:
            late.cancel()
        if "error" in answer:
            raise RuntimeError(f"{request['kernel']} for {request['target']}: {answer['error']}")
        return answer

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(30)


@dataclass
class Log:
    """Launches of one `executing` block: kernel, seconds, matrix instructions."""

    launches: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)


def platform_of(target: str) -> Platform:
    return Platform.parse(f"xpu:{target}+triton={TRITON}")


@contextmanager
def executing(worker: Worker | None, target: str) -> Iterator[Log]:
    """Run every Triton launch for `target` in the worker; without a worker only record the requests."""
    log = Log()
    run, detect = JITFunction.run, family.detect

    def remote(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        request, tensors = _request(self, target, args, kwargs, grid)
        log.requests.append(request)
        if worker is None:
            return
        answer = worker.ask(do="launch", **request)
        for key, content in answer.pop("buffers").items():
            ctypes.memmove(key, content, len(content))
        log.launches.append({"kernel": request["kernel"], **answer})
        del tensors

    JITFunction.run, family.detect = remote, lambda device: platform_of(target)
    try:
        yield log
    finally:
        JITFunction.run, family.detect = run, detect


def _request(fn: Any, target: str, args: Any, kwargs: Any, grid: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    options = {k: v for k, v in kwargs.items() if k in OPTIONS}
    bound = fn.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in fn.signature.parameters})
    bound.apply_defaults()
    buffers: dict[int, bytes] = {}
    arguments = {name: _argument(value, buffers) for name, value in bound.arguments.items()}
    request = {
        "target": target, "module": fn.module, "kernel": fn.__name__, "arguments": arguments, "options": options,
        "grid": tuple(int(g) for g in grid), "buffers": buffers,
    }  # fmt: skip
    return request, [v for v in bound.arguments.values() if isinstance(v, torch.Tensor)]


def _argument(value: Any, buffers: dict[int, bytes]) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        key = value.data_ptr()
        storage = value.untyped_storage()
        size = storage.nbytes() - value.storage_offset() * value.element_size()
        buffers[key] = ctypes.string_at(key, size) or b"\0"
        dtype = str(value.dtype).removeprefix("torch.")
        return {"kind": "tensor", "dtype": dtype, "key": key, "address": key % 16}
    if isinstance(value, tl.dtype):
        return {"kind": "dtype", "value": value.name}
    if isinstance(value, float):
        return {"kind": "float", "value": value}
    return {"kind": "int" if isinstance(value, int) else "constexpr", "value": value}
