"""The part of PTX that decides what a Hopper kernel of ours does: integers, branches, barriers, TMA, memory.

An instruction becomes a function of a program and a thread (`programs.py`) that returns where to go on, or None for the
next one. What computes floating-point values is left out. Semantics: NVIDIA, PTX ISA 8.7, sections 9.7.1 to 9.7.13.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SHARED = 1 << 20  # where shared memory starts
PARAMETERS = 1 << 40  # parameter i lies at PARAMETERS * (i + 1), and so does what a pointer in it points to

Step = Callable[[Any, Any], int | None]
Value = Callable[[Any, Any], int]

_LEFT_OUT = (
    "fma.", "wgmma.", "stmatrix", "cvt.rn", "mul.f32", "add.f32", "fence", "setmaxnreg", "membar", "bar.warp.sync",
    "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "griddepcontrol.launch_dependents",
)  # fmt: skip
_COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
            "ge": operator.ge}  # fmt: skip
_LONG = (1 << 64) - 1


@dataclass
class Barrier:
    """An mbarrier: a phase is complete when all arrivals and all announced bytes have come."""

    count: int
    pending: int
    bytes: int = 0
    phases: int = 0

    def come(self, arrivals: int, announced: int) -> None:
        self.pending -= arrivals
        self.bytes += announced
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phases, self.pending = self.phases + 1, self.count


@dataclass(frozen=True)
class Move:
    """One TMA request. what: the kernel's name of the descriptor. at: coordinates, columns first. after_wait: whether
    the thread had waited for the kernel before (`griddepcontrol.wait`)."""

    what: str
    at: tuple[int, ...]
    after_wait: bool


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    """Rounded towards zero; -1 for a division by zero, whose result PTX leaves open."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "min": min, "max": max, "shl": operator.lshift, "shr": operator.rshift, "not": operator.invert, "neg": operator.neg,
    "div": _quotient, "rem": lambda a, b: a - _quotient(a, b) * b, "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "bfe": lambda a, start, length: a >> start & (1 << length) - 1, "selp": lambda a, b, c: a if c else b,
    "mov": lambda a: a, "cvt": lambda a: a, "cvta": lambda a: a, "shfl": lambda a, *_: a,
}  # fmt: skip


class Kernel:
    """A kernel's code. Labels in braces belong to those alone, as inline assembly needs it."""

    def __init__(self, text: str) -> None:
        self.code: list[Step] = []
        self._labels: dict[str, int] = {}
        self._targets: dict[str, list[str]] = {}
        self._scope, scopes = "", 0
        body = text[text.index("{", text.index(".reqntid")) + 1 :]
        for raw in body.splitlines():
            line = raw.split("//")[0].strip()
            if line == "{":
                scopes += 1
                self._scope = f"#{scopes}"
            elif line == "}" and not self._scope:
                break
            elif line == "}":
                self._scope = ""
            elif match := re.fullmatch(r"(\S+): \.branchtargets", line):
                self._targets[match[1]] = []
            elif re.fullmatch(r"\$\w+[,;]", line):
                self._targets[list(self._targets)[-1]].append(line[:-1])
            elif match := re.fullmatch(r"([\w$]+):", line):
                self._labels[self._label(match[1])] = len(self.code)
            elif line.endswith(";") and line[0] not in ".$":
                self._add(line[:-1])

    def _label(self, name: str) -> str:
        return name if name.startswith("$") else name + self._scope

    def _add(self, line: str) -> None:
        guard = re.match(r"@(!?)(%?\w+)\s+", line)
        op, _, text = (line[guard.end() :] if guard else line).replace("\t", " ").partition(" ")
        op, text = op.strip(), text.strip()
        if op.startswith(_LEFT_OUT):
            return
        step = self._step(op, [a.strip() for a in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)])
        if not guard:
            self.code.append(step)
            return
        unless, register = bool(guard[1]), guard[2]
        self.code.append(lambda p, t: step(p, t) if bool(t.regs.get(register, 0)) != unless else None)

    def _step(self, op: str, args: list[str]) -> Step:
        name = op.split(".")[0]
        if name == "bra":
            to = self._label(args[0])
            return lambda p, t: self._labels[to]
        if name == "brx":
            return lambda p, t: self._labels[self._targets[args[1]][t.regs[args[0]]]]
        if op.startswith("cp.async.bulk.tensor"):
            return _copy(op, args)
        special = {"ret": _end, "griddepcontrol": _end, "bar": _meet, "barrier": _meet, "elect": _elect,
                   "mbarrier": _mbarrier, "ld": _memory, "st": _memory, "atom": _memory, "setp": _compare}  # fmt: skip
        return special.get(name, _compute)(op, args)


def _value(text: str) -> Value:
    if text.startswith("{"):  # two halves of 64 bits
        parts = [_value(part.strip()) for part in text.strip("{}").split(",")]
        return lambda p, t: sum((part(p, t) & 0xFFFFFFFF) << 32 * i for i, part in enumerate(parts))
    if text in ("%tid.x", "%ctaid.x", "%nctaid.x"):
        return lambda p, t: {"%tid.x": t.tid, "%ctaid.x": p.pid, "%nctaid.x": p.run.programs}[text]
    if text.startswith("%"):
        return lambda p, t: t.regs.get(text, 0)
    if text.startswith(("0f", "0d")):
        return lambda p, t: 0
    match = re.fullmatch(r"\w+_param_(\d+)", text)
    known = PARAMETERS * (int(match[1]) + 1) if match else SHARED if text == "global_smem" else int(text, 0) & _LONG
    return lambda p, t: known


def _address(text: str) -> Value:
    base, _, offset = text.strip("[]").partition("+")
    of, plus = _value(base.strip()), int(offset or 0)
    return lambda p, t: of(p, t) + plus


def _compute(op: str, args: list[str]) -> Step:
    name, *kinds = op.split(".")
    wide = "wide" in kinds
    bits = 64 if kinds[0] in ("b64", "s64", "u64") else 32
    is_signed = any(kind.startswith("s") and kind[1:].isdigit() for kind in kinds[-1:])
    act, operands, to = _ARITHMETIC[name], [_value(a) for a in args[1:]], args[0]
    read = 32 if wide or (name == "cvt" and kinds[-1].endswith("32")) else 64 if name in ("cvt", "cvta") else bits
    size = 64 if wide or name == "cvta" else bits

    def step(p: Any, t: Any) -> None:
        values = [operand(p, t) & (1 << read) - 1 for operand in operands]
        if is_signed:
            values = [signed(v, read) for v in values]
        if wide and len(values) == 3:
            values[2] = operands[2](p, t)
        result = act(*values)
        t.regs[to] = (result >> bits if "hi" in kinds else result) & (1 << size) - 1

    return step


def _compare(op: str, args: list[str]) -> Step:
    _, how, kind = op.split(".")
    compare, a, b, bits = _COMPARE[how], _value(args[1]), _value(args[2]), int(kind[1:])

    def step(p: Any, t: Any) -> None:
        x, y = a(p, t) & (1 << bits) - 1, b(p, t) & (1 << bits) - 1
        t.regs[args[0]] = int(compare(signed(x, bits), signed(y, bits)) if kind[0] == "s" else compare(x, y))

    return step


def _end(op: str, args: list[str]) -> Step:
    return lambda p, t: setattr(t, "ended" if op == "ret" else "after_wait", True)


def _elect(op: str, args: list[str]) -> Step:
    chosen = args[0].split("|")[1]  # the first thread of a warp is the one that we run
    return lambda p, t: t.regs.__setitem__(chosen, 1)


def _meet(op: str, args: list[str]) -> Step:
    number, threads = _value(args[0]), int(args[1]) if len(args) > 1 else 0

    def step(p: Any, t: Any) -> None:
        t.waits_for = ("bar", number(p, t), p.meet(number(p, t), threads))

    return step


def _mbarrier(op: str, args: list[str]) -> Step:
    at = _address(args[0] if ".init" in op else args[1])
    last = _value(args[-1]) if not args[-1].startswith("[") else _value("1")

    def init(p: Any, t: Any) -> None:
        p.barriers[at(p, t)] = Barrier(last(p, t), last(p, t))

    def wait(p: Any, t: Any) -> None:
        t.waits_for = ("mbarrier", at(p, t), last(p, t))
        t.regs[args[0]] = 1  # complete, once it goes on

    def arrive(p: Any, t: Any) -> None:
        announces = "expect_tx" in op
        p.barriers[at(p, t)].come(1 if announces else last(p, t), last(p, t) if announces else 0)

    return init if ".init" in op else wait if "try_wait" in op else arrive


def _copy(op: str, args: list[str]) -> Step:
    inward = op.index(".global") > op.index(".shared")
    descriptor, coordinates = re.fullmatch(r"\[(\S+), \{(.*)\}\]", args[1 if inward else 0]).groups()  # type: ignore[union-attr]
    of, at = _value(descriptor), [_value(c.strip()) for c in coordinates.split(",")]
    bar = _address(args[2]) if inward else None

    def step(p: Any, t: Any) -> None:
        move = Move(p.run.name(of(p, t)), tuple(signed(c(p, t)) for c in at), t.after_wait)
        (p.sent if inward else p.stored).append(move)
        if bar:
            p.barriers[bar(p, t)].come(0, -p.run.box_bytes[move.what])

    return step


def _memory(op: str, args: list[str]) -> Step:
    name, space = op.split(".")[:2]
    if space == "param":
        index = int(re.findall(r"_param_(\d+)", args[1])[0])
        return lambda p, t: t.regs.__setitem__(args[0], p.run.values[index])
    size = int(re.findall(r"[busf](\d+)", op)[-1]) // 8
    at = _address(args[0] if name == "st" else args[1])
    items = [item.strip() for item in args[1 if name == "st" else 0].strip("{}").split(",")]
    operands = [_value(text) for text in (args[2:3] if name == "atom" else items if name == "st" else [])]

    def step(p: Any, t: Any) -> None:
        memory = p.shared if space == "shared" else p.run.memory
        for i, item in enumerate(items):
            here = range(at(p, t) + i * size, at(p, t) + (i + 1) * size)
            held = sum(memory.get(byte, 0) << 8 * j for j, byte in enumerate(here))
            if name != "st":
                t.regs[item] = held
            if name != "ld":
                new = operands[i](p, t) + (held if name == "atom" else 0)
                memory.update((byte, new >> 8 * j & 255) for j, byte in enumerate(here))
                if space == "global":
                    p.written.append(here[0])

    return step
