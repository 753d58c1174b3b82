"""What a device can do. The only file that asks about hardware or installed packages for a choice; reports have
`environment.py`.

A `Platform` is plain data, so every kernel choice can be computed, explained and tested for any device on any
machine: `Platform.parse("xpu:bmg+triton=3.6")` describes a chip that is not here.
"""

from __future__ import annotations

import ctypes
import os
import platform as _host
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, util
from pathlib import Path

import torch

from . import environment, package_ops, verdicts
from .errors import BlockscaleError
from .version import __version__

KINDS = ("cpu", "cuda", "rocm", "xpu")
"""The kinds that `detect` knows. `kind` itself is an open string: third parties may bring their own."""

_FEATURE_PACKAGES = ("triton", "deep_gemm", "vllm-xpu-kernels", "aiter")
_DISTRIBUTIONS = {"triton": ("triton", "triton-xpu", "pytorch-triton-xpu", "pytorch-triton", "pytorch-triton-rocm")}
"""Packages that install an import name under several distributions; which of them is there differs by device."""
_ARCH = {"cuda": (r"sm_\d+[a-z]?", "sm_90"), "rocm": (r"gfx[\w-]+", "gfx942")}
"""How kinds that name chips by generation spell them, and an example."""
_CHIPS = {
    "t4": "cuda:sm_75", "a100": "cuda:sm_80", "l4": "cuda:sm_89", "l40": "cuda:sm_89", "l40s": "cuda:sm_89",
    "h100": "cuda:sm_90", "h200": "cuda:sm_90", "b200": "cuda:sm_100", "mi210": "rocm:gfx90a", "mi250": "rocm:gfx90a",
    "mi300": "rocm:gfx942", "mi300x": "rocm:gfx942", "mi325x": "rocm:gfx942", "mi355x": "rocm:gfx950",
}  # fmt: skip
"""Chips that people call by their product names, as this library calls them."""
_GRAMMAR = re.compile(r"(?P<kind>[a-z]\w*)(:(?P<arch>[\w.-]+))?(?P<features>(\+[\w.-]+(=[^+]+)?)*)")


@dataclass(frozen=True)
class Platform:
    """One device as the registry sees it.

    kind: "cuda", "rocm", "xpu", "cpu" or a third party's word.
    arch: "sm_90", "gfx942", "bmg", "avx2" …; "" when unknown.
    features: (name, value) pairs: versions of packages, probe and self-test verdicts. "" is "there, no version".
        On cuda also "sms", the multiprocessors, and "chip", the card's name as in "nvidia-h200".
    ops: (name, schema) pairs of the torch ops that packages brought, e.g. "_xpu_C::fp8_gemm". Not part of the text:
        `parse` takes them from the records of package versions that we ship (`kernels/*/schemas.json`).
    """

    kind: str
    arch: str = ""
    features: tuple[tuple[str, str], ...] = ()
    ops: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(sorted(dict(self.features).items())))
        object.__setattr__(self, "ops", tuple(sorted(dict(self.ops).items())))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `kind[:arch][+feature[=value]]…`, e.g. "cuda:sm_90+triton=3.6".

        Raises BlockscaleError when the text does not follow the grammar, or names a chip as its vendor's shop does.
        """
        _refuse_product_name(text)
        match = _GRAMMAR.fullmatch(text.strip())
        if not match:
            raise BlockscaleError(
                f"platform: got {text!r}, need kind[:arch][+feature[=value]]…, e.g. 'cuda:sm_90+triton=3.6'"
            )
        pattern, example = _ARCH.get(match["kind"], (".*", ""))
        if match["arch"] and not re.fullmatch(pattern, match["arch"]):
            raise BlockscaleError(f"platform: got {text!r}, need the chip's generation, e.g. {match['kind']}:{example}")
        features = (f.partition("=") for f in match["features"].split("+") if f)
        described = cls(match["kind"], match["arch"] or "", tuple((name, value) for name, _, value in features))
        return replace(described, ops=tuple(package_ops.recorded(described.value)))

    def __str__(self) -> str:
        head = f"{self.kind}:{self.arch}" if self.arch else self.kind
        return "+".join([head, *(f"{name}={value}" if value else name for name, value in self.features)])

    def has(self, feature: str) -> bool:
        return any(name == feature for name, _ in self.features)

    def value(self, feature: str) -> str | None:
        """The feature's value, "" when it has none, None when the feature is absent."""
        return dict(self.features).get(feature)

    def at_least(self, feature: str, version: str) -> bool:
        """Whether the feature is there in `version` or later. A feature named without a version counts as new."""
        value = self.value(feature)
        return value is not None and (not value or _version(value) >= _version(version))

    def with_features(self, extra: Iterable[tuple[str, str]]) -> Platform:
        return replace(self, features=(*self.features, *extra))

    def schema(self, op: str) -> str | None:
        """Schema of a package's torch op, None when no package brought the op."""
        return dict(self.ops).get(op)

    def __hash__(self) -> int:
        return hash((self.kind, self.arch))  # kernels look up what they know of a platform in each call

    @property
    def capability(self) -> int:
        """CUDA compute capability as one number (sm_90 -> 90); 0 on every other kind."""
        return _capability(self.kind, self.arch)


@cache
def _capability(kind: str, arch: str) -> int:
    match = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    return int(match[1]) if kind == "cuda" and match else 0


def _refuse_product_name(text: str) -> None:
    """A chip under another name would be taken for one that has nothing: every kernel would refuse it."""
    words = re.split(r"[:+]", text.strip().lower())[:2]
    named = next((_CHIPS[word] for word in words if word in _CHIPS), None)
    if named is not None:
        raise BlockscaleError(f"platform: got {text!r}, need '{named}+triton' for that chip and its usual package")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0]))


@cache
def detect(device: torch.device | str = "cpu") -> Platform:
    """Describe a device of this machine, kernels that failed their self-test here included.

    Cached: hardware and packages do not change under a process; `detect.cache_clear()` after a new verdict.
    Raises BlockscaleError when torch has no such device.
    """
    found = _detect(named_device(device))
    return found.with_features(verdicts.failures(identity(found)))


def named_device(device: torch.device | str) -> torch.device:
    """A device by its name, e.g. "cuda:1", whether it is here or not. Raises BlockscaleError for no such name."""
    try:
        return torch.device(device)
    except RuntimeError as e:
        raise BlockscaleError(f"device {device!r}: need cpu, cuda, xpu or another that torch knows") from e


def require(device: torch.device) -> None:
    """Raises BlockscaleError unless torch finds this CUDA or XPU device here; of other kinds nothing is known."""
    if device.type not in ("cuda", "xpu"):
        return
    module = torch.cuda if device.type == "cuda" else torch.xpu
    if not module.is_available():
        raise BlockscaleError(f"device {device}: torch {torch.__version__} finds none on this machine")
    if device.index is not None and device.index >= (count := module.device_count()):
        raise BlockscaleError(f"device {device}: torch {torch.__version__} finds {count} of this kind on this machine")


def identity(found: Platform) -> str:
    """Key of everything that could change a kernel's results: device, driver, versions, the kernels' own files."""
    files = sorted(p for p in Path(__file__).parent.glob("kernels/**/*") if p.suffix in (".py", ".so"))
    ours = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    theirs = [
        f"{e.value} {e.dist.version if e.dist else ''}" for e in metadata.entry_points(group="blockscale.kernels")
    ]
    bare = replace(found, features=tuple(f for f in found.features if not f[0].startswith("self-test.")))
    return verdicts.key([str(bare), environment.driver(found.kind), __version__, *ours, *sorted(theirs)])


@cache
def _detect(device: torch.device) -> Platform:
    versions = [("torch", torch.__version__.split("+")[0]), *_packages()]
    if device.type == "cpu":
        return Platform("cpu", _cpu_arch(), (*versions, *_cpu_native()))
    if device.type == "cuda":
        require(device)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Platform("rocm", properties.gcnArchName.split(":")[0], (*versions, ("hip", torch.version.hip)))
        versions += [("cuda", torch.version.cuda or ""), ("sms", str(properties.multi_processor_count))]
        versions += [("chip", re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-"))]
        return Platform("cuda", f"sm_{properties.major}{properties.minor}", tuple(versions))
    if device.type == "xpu":
        require(device)
        arch = _xpu_arch(torch.xpu.get_device_properties(device).name)
        errors, ops = package_ops.installed()
        verdict = ("scaled_mm", probe_scaled_mm(device))
        return Platform("xpu", arch, (*versions, *errors, verdict), tuple(ops))
    return Platform(device.type, "", tuple(versions))


def apart(kind: str, count: int) -> list[str]:
    """Why the first `count` devices of this host cannot all reach each other's memory; empty where they can."""
    if kind != "cuda":
        return [f"{kind} devices: not known"]
    seen = torch.cuda.device_count()
    if seen < count:
        return [f"this process sees {seen} of {count} devices (CUDA_VISIBLE_DEVICES)"]
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return [
        f"device {a} does not reach the memory of {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)
    ]


def _packages() -> list[tuple[str, str]]:
    return [(name, _package_version(name)) for name in _FEATURE_PACKAGES if _importable(name.replace("-", "_"))]


def _importable(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):  # a module without a spec: something else took its name
        return False


def _package_version(name: str) -> str:
    for distribution in _DISTRIBUTIONS.get(name, (name.replace("_", "-"),)):
        try:
            return metadata.version(distribution) or ""
        except (metadata.PackageNotFoundError, KeyError):  # without metadata, or half of it: vendored, a source tree
            continue
    return ""


def probe_scaled_mm(device: torch.device) -> str:
    """Whether torch multiplies FP8 of 1x128 by 128x128 blocks here, by doing it: "row" or "column" (how the scales
    must lie), or "no: " and what happened. Sixteen rows, two blocks each way, every scale another power of two."""
    functional, found = torch.nn.functional, "no: this torch has no scaled_mm"
    if not hasattr(functional, "scaled_mm"):
        return found
    kinds = functional.ScalingType.BlockWise1x128, functional.ScalingType.BlockWise128x128
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 256, generator=generator).to(torch.float8_e4m3fn) for n in (16, 256))
    a_scale = torch.exp2(torch.arange(32).reshape(16, 2) % 5 - 2.0)
    b_scale = torch.exp2(torch.arange(4).reshape(2, 2) - 1.0)
    x = a.float() * a_scale.repeat_interleave(128, 1)
    w = b.float() * b_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    want, most = x @ w.T, x.abs() @ w.abs().T
    for lie in ("row", "column"):
        scales = [s.to(device) if lie == "row" else s.T.contiguous().to(device).T for s in (a_scale, b_scale)]
        try:
            got = functional.scaled_mm(
                a.to(device), b.to(device).T, scales[0], kinds[0], scales[1], kinds[1], output_dtype=torch.bfloat16
            )
        except (RuntimeError, ValueError, TypeError) as e:
            found = f"no: {str(e).splitlines()[0][:120]}"
            continue
        if bool(((got.float().cpu() - want).abs() <= want.abs() * 2.0**-8 + most * 2.0**-14).all()):
            return lie
        found = "no: it ran and gave wrong numbers"
    return found


def _cpu_arch() -> str:
    """The widest vector extension that kernels may use: avx512, avx2, neon, or the machine's name."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability.startswith("avx512"):
        return "avx512"
    if capability == "avx2":
        return "avx2"
    return "neon" if _host.machine() in ("aarch64", "arm64") else _host.machine()


def _cpu_native() -> list[tuple[str, str]]:
    """The native CPU library where it was built, and the instruction set that it uses: the best that it finds here.

    BLOCKSCALE_CPU_ISA="avx2" chooses a lower one.
    """
    path = Path(__file__).parent / "kernels/cpu/_native.so"
    if not path.exists():
        return []
    best = ctypes.CDLL(str(path)).blockscale_best_isa
    best.restype = ctypes.c_char_p
    return [("cpu-native", os.environ.get("BLOCKSCALE_CPU_ISA") or best().decode())]


def _xpu_arch(name: str) -> str:
    """Intel's marketing name to the compiler's: Max -> pvc, Arc B -> bmg, Arc A and Flex -> dg2."""
    for pattern, arch in ((r"Max\b", "pvc"), (r"Arc.*\bB\d", "bmg"), (r"Arc.*\bA\d|Flex", "dg2")):
        if re.search(pattern, name):
            return arch
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower()
