"""Compile Triton launches with Intel's Triton, run them on a CPU through OpenCL. In the XPU venv, without torch.

Answers pickled requests on stdin, one after the other, until end of file (see `executor.py`, its other end):

    {"do": "launch", target, module, kernel, arguments, options, grid} -> {"buffers": {key: bytes}, …}
    {"do": "compile", …the same…}                                      -> {"spv": bytes, …}

An answer is {"error": text} when something raised. Arguments are dicts of one of `int`, `float`, `none`, `constexpr`,
`dtype` (a Triton dtype by name) or `tensor` (dtype, key; the bytes of each key come once in "buffers").
"""

import contextlib
import ctypes
import hashlib
import os
import pickle
import re
import struct
import sys
import tempfile
import time
import traceback
import types
import warnings
from pathlib import Path

SOURCES, CACHE = Path(sys.argv[1]), Path(sys.argv[2])
"""Folder of the package `blockscale`; where built programs are kept (Triton's own cache is in TRITON_CACHE_DIR)."""


def bare_packages():
    """Our packages without their `__init__`, which import torch: kernels import nothing but Triton."""
    for name in ("blockscale", "blockscale.kernels", "blockscale.kernels.triton"):
        module = types.ModuleType(name)
        module.__path__ = [str(SOURCES.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


bare_packages()

import numpy as np  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends import backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime import jit  # noqa: E402

ARCHITECTURES = {"pvc": 1, "bmg": 2, "dg2": 3}
DTYPES = {d.name: d for d in (tl.float16, tl.bfloat16, tl.float32, tl.int32, tl.uint8)}

# The one native helper that compilation needs maps a SYCL enum to a name; it would be built against SYCL headers.
# The registry holds a copy of the module, so the globals of the class that it registered are what must change.
backends["intel"].compiler.__init__.__globals__["compile_module_from_src"] = lambda source, name: types.SimpleNamespace(
    parse_device_arch=lambda number: {v: k for k, v in ARCHITECTURES.items()}[number]
)


def target_of(arch):
    """What a driver would say of these chips. DG2: sub-groups of 8, no 2-D block loads, no bf16 conversions."""
    newer = arch != "dg2"
    return GPUTarget("xpu", {
        "name": arch, "architecture": ARCHITECTURES[arch], "sub_group_sizes": [16, 32] if newer else [8, 16, 32],
        "max_work_group_size": 1024, "max_num_sub_groups": 64, "has_fp64": newer, "gpu_eu_count": 512,
        "gpu_subslice_count": 64, "has_subgroup_matrix_multiply_accumulate": newer,
        "has_subgroup_matrix_multiply_accumulate_tensor_float32": newer, "has_subgroup_2d_block_io": newer,
        "has_bfloat16_conversions": newer,
    }, 32)  # fmt: skip


class Pointer:
    """What Triton looks at in a tensor."""

    def __init__(self, dtype, address):
        self.dtype, self.address = dtype, address

    def data_ptr(self):
        return self.address


def python_value(argument):
    kind, value = argument["kind"], argument.get("value")
    if kind == "tensor":
        return Pointer(argument["dtype"], argument["address"])
    if kind == "dtype":
        return DTYPES[value]
    return value


_compiled = {}


def compiled(request):
    """(Triton's compiled kernel, seconds it took): the steps that `JITFunction.run` takes at a first launch."""
    began = time.monotonic()
    __import__(request["module"])
    fn = getattr(sys.modules[request["module"]], request["kernel"])
    backend = make_backend(target_of(request["target"]))
    values = {name: python_value(a) for name, a in request["arguments"].items()}
    binder = jit.create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, _ = binder(**values, debug=False, **request["options"])
    options = backend.parse_options({**request["options"], "debug": False})
    key = (request["target"], request["kernel"], str(specialization), str(options))
    if key not in _compiled:
        names = [p.name for p in fn.params]
        types_, hints = [s[0] for s in specialization], [s[1] for s in specialization]
        signature = dict(zip(names, types_, strict=True))
        paths = jit.find_paths_if(types_, lambda _, value: value == "constexpr")
        constants = {path: jit.get_iterable_path(list(bound.values()), path) for path in paths}
        hinted = jit.find_paths_if(hints, lambda _, value: isinstance(value, str))
        attributes = {path: backend.parse_attr(jit.get_iterable_path(hints, path)) for path in hinted}
        source = ASTSource(fn, signature, constants, attributes)
        result = triton.compile(source, target=target_of(request["target"]), options=options.__dict__)
        _compiled[key] = (key, result, [n for n, t in signature.items() if t != "constexpr"])
    return *_compiled[key], time.monotonic() - began


# -- running ------------------------------------------------------------------------------------------------------


def opencl():
    """Intel's CPU runtime out of this venv: its libraries loaded by hand, and an .icd file of our own (the wheel's
    holds a placeholder instead of a path)."""
    lib = Path(sys.prefix) / "lib"
    for name in ("libintlc.so.5", "libirng.so", "libimf.so", "libsvml.so"):
        ctypes.CDLL(str(lib / name), mode=ctypes.RTLD_GLOBAL)
    vendors = tempfile.mkdtemp(prefix="icd")
    Path(vendors, "intel-cpu.icd").write_text(f"{lib / 'libintelocl.so'}\n")
    os.environ["OCL_ICD_VENDORS"] = vendors
    import pyopencl

    device = pyopencl.get_platforms()[0].get_devices()[0]
    return pyopencl, device, pyopencl.Context([device])


DROPPED_CAPABILITIES, DROPPED_MODES = {5892}, set(range(5893, 5898))
DROPPED_EXTENSION = b"SPV_INTEL_kernel_attributes"


def without_hints(spv):
    """SPIR-V without KernelAttributesINTEL (5892): hints such as the work-group's size that the CPU runtime rejects."""
    words = struct.unpack(f"<{len(spv) // 4}I", spv)
    kept, i = list(words[:5]), 5
    while i < len(words):
        count, opcode = words[i] >> 16, words[i] & 0xFFFF
        instruction = words[i : i + count]
        i += count
        text = struct.pack(f"<{count - 1}I", *instruction[1:]).split(b"\0")[0]
        if (
            (opcode == 17 and instruction[1] in DROPPED_CAPABILITIES)
            or (opcode == 16 and instruction[2] in DROPPED_MODES)
            or (opcode == 10 and text == DROPPED_EXTENSION)
        ):
            continue
        kept += instruction
    return struct.pack(f"<{len(kept)}I", *kept)


_runtime, _programs = [], {}


def program(key, kernel):
    """The OpenCL kernel of a compiled launch, with the DPAS emulation linked in where it multiplies matrices."""
    if key in _programs:
        return _programs[key]
    if not _runtime:
        _runtime.extend(opencl())
    cl, device, context = _runtime
    low = cl._cl
    il, emulation = without_hints(kernel.asm["spv"]), Path(__file__).with_name("dpas.cl").read_text()
    said = f"{device.platform.version} {device.name} {device.driver_version} {emulation}".encode()
    kept = CACHE / f"{hashlib.sha256(said + il).hexdigest()}.cl"
    if kept.exists():
        built = low._Program(context, [device], [kept.read_bytes()])
        built._build(options=b"", devices=[device])
    else:
        built = low._create_program_with_il(context, il)
        try:
            if "matrix_mad" in kernel.asm["llir"]:
                extra = cl.Program(context, emulation)._get_prg()
                for part in (built, extra):
                    part.compile(b"", [device], [])
                built = low._Program.link(context, [built, extra], b"", [device])
            else:
                built._build(options=b"", devices=[device])
        except cl.Error as e:
            raise RuntimeError(f"OpenCL build: {built.get_build_info(device, cl.program_build_info.LOG)}") from e
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(built.get_info(cl.program_info.BINARIES)[0])
        part.replace(kept)
    _programs[key] = cl.Kernel(built, kernel.metadata.name)
    return _programs[key]


def launch(request):
    key, kernel, names, seconds = compiled(request)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyopencl warns of its own low-level calls
        function = program(key, kernel)
    cl, _, context = _runtime
    built = time.monotonic()
    queue, flags = cl.CommandQueue(context), cl.mem_flags
    held = {k: np.frombuffer(b, np.uint8).copy() for k, b in request["buffers"].items()}
    buffers = {k: cl.Buffer(context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=a) for k, a in held.items()}
    values = []
    for name in names:
        argument = request["arguments"][name]
        if argument["kind"] == "tensor":
            values.append(buffers[argument["key"]])
        elif argument["kind"] == "float":
            values.append(np.float32(argument["value"]))
        else:
            values.append(np.int32(argument["value"]))
    if kernel.metadata.shared:
        values.append(cl.LocalMemory(kernel.metadata.shared))
    threads = kernel.metadata.num_warps * kernel.metadata.threads_per_warp
    grid = (*request["grid"], 1, 1)[:3]
    function.set_args(*values)
    cl.enqueue_nd_range_kernel(queue, function, (grid[0] * threads, grid[1], grid[2]), (threads, 1, 1))
    changed = {}
    for k, array in held.items():
        now = np.empty_like(array)
        cl.enqueue_copy(queue, now, buffers[k])
        queue.finish()
        if not np.array_equal(now, array):
            changed[k] = now.tobytes()
    return {"buffers": changed, **facts(kernel, seconds), "build_s": built - began, "run_s": time.monotonic() - built}


def facts(kernel, seconds):
    return {
        "compile_s": seconds,
        "dpas": len(re.findall(r"call[^\n]*matrix_mad", kernel.asm["llir"])),
        "shared": kernel.metadata.shared,
        "threads_per_warp": kernel.metadata.threads_per_warp,
        "bytes": len(kernel.asm["spv"]),
        "flags": kernel.metadata.build_flags,
    }


def compile_only(request):
    _, kernel, _, seconds = compiled(request)
    return {"spv": kernel.asm["spv"], **facts(kernel, seconds)}


def main():
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to stderr
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = pickle.load(sys.stdin.buffer)
            try:
                answer = {"launch": launch, "compile": compile_only}[request["do"]](request)
            except BaseException:
                answer = {"error": traceback.format_exc()}
            pickle.dump(answer, stream)
            stream.flush()


if __name__ == "__main__":
    main()
