"""Run a compiled Hopper launch without a GPU, all but its arithmetic: what every warp sends for, waits for and stores.

The first thread of each warp executes the PTX as its documentation defines integers, barriers and TMA (`ptx.py`). Data
comes at once, and which warp goes on is drawn by lot. Warps that wait for each other for ever raise `Deadlock`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ptx import PARAMETERS, Barrier, Kernel, Move
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from aot import compile_for_hopper
from blockscale.kernels.gluon.launch import Launch


class Deadlock(AssertionError):
    """Warps that wait for each other."""


@dataclass
class Thread:
    """One thread: its registers, and where it stands."""

    tid: int
    regs: dict[str, int] = field(default_factory=dict)
    pc: int = 0
    waits_for: tuple[str, int, int] | None = None  # ("mbarrier", address, parity) or ("bar", number, round)
    after_wait: bool = False
    ended: bool = False


@dataclass
class Program:
    """One program (CTA) of a launch, and what it did. written: addresses in global memory, as often as written."""

    run: Run
    pid: int
    shared: dict[int, int] = field(default_factory=dict)
    barriers: dict[int, Barrier] = field(default_factory=dict)
    sent: list[Move] = field(default_factory=list)
    stored: list[Move] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    _met: dict[int, tuple[int, int]] = field(default_factory=dict)  # of `bar` number: (rounds, warps of the next one)

    def meet(self, number: int, threads: int) -> int:
        """Arrive at `bar` number, which so many threads share (0: all); the round to wait for."""
        rounds, warps = self._met.get(number, (0, 0))
        full = warps + 1 == (threads // 32 or self.run.warps)
        self._met[number] = (rounds + 1, 0) if full else (rounds, warps + 1)
        return rounds + 1

    def execute(self, order: random.Random) -> None:
        threads = [Thread(32 * warp) for warp in range(self.run.warps)]
        code = self.run.kernel.code
        while live := [t for t in threads if not t.ended]:
            ready = [t for t in live if self._may_go_on(t)]
            if not ready:
                raise Deadlock(f"program {self.pid}: " + ", ".join(f"thread {t.tid} at {t.waits_for}" for t in live))
            thread = order.choice(ready)
            thread.waits_for = None
            while thread.waits_for is None and not thread.ended:
                at, thread.pc = thread.pc, thread.pc + 1
                target = code[at](self, thread)
                if target is not None:
                    thread.pc = target

    def _may_go_on(self, thread: Thread) -> bool:
        if thread.waits_for is None:
            return True
        kind, at, which = thread.waits_for
        return self._met[at][0] >= which if kind == "bar" else self.barriers[at].phases & 1 != which


class Run:
    """A launch, program after program in any order.

    edit: changes the PTX first. memory: the bytes of global memory that programs wrote.
    """

    def __init__(self, launch: Launch, edit: Callable[[str], str] = str) -> None:
        ptx = edit(compile_for_hopper(launch).asm["ptx"])
        self.kernel = Kernel(ptx)
        self.warps = int(re.findall(r"\.reqntid (\d+)", ptx)[0]) // 32
        self.programs = launch.grid[0]
        self.memory: dict[int, int] = {}
        self.values: list[int] = []  # of the PTX's parameters
        self.names: list[str] = []
        self.box_bytes: dict[str, int] = {}
        for name, argument in zip(launch.kernel.arg_names, launch.arguments, strict=False):
            if isinstance(argument, TensorDescriptor):
                self.box_bytes[name] = argument.base.element_size() * math.prod(argument.block_shape)
                self._parameters(name, None, *argument.shape, *argument.strides)
            else:
                self._parameters(name, None if isinstance(argument, Tensor) else argument)
        self._parameters("scratch", None, None)  # Triton's own
        declared = len(re.findall(r"\.param [^\n]*_param_\d+", ptx))
        assert declared == len(self.values), f"{declared} parameters in the PTX, {len(self.values)} arguments"

    def _parameters(self, name: str, *values: Any) -> None:
        for value in values:
            self.values.append(PARAMETERS * (len(self.values) + 1) if value is None else int(value))
            self.names.append(name)

    def name(self, address: int) -> str:
        """The kernel's name of the argument that lies, or points, there."""
        return self.names[address // PARAMETERS - 1]

    def offset(self, address: int) -> int:
        """Bytes from where a pointer argument points."""
        return address % PARAMETERS

    def execute(self, seed: int = 0) -> Iterator[Program]:
        order = random.Random(seed)
        for pid in order.sample(range(self.programs), self.programs):
            program = Program(self, pid)
            program.execute(order)
            yield program
