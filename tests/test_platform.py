import pytest
import torch

from blockscale import BlockscaleError, Platform, detect, package_ops
from blockscale.platform import _xpu_arch


@pytest.mark.parametrize(
    ("text", "kind", "arch", "features"),
    [
        ("cpu", "cpu", "", {}),
        ("cuda:sm_90+triton=3.6", "cuda", "sm_90", {"triton": "3.6"}),
        ("xpu:bmg+triton+vllm-xpu-kernels=0.1.16.2", "xpu", "bmg", {"triton": "", "vllm-xpu-kernels": "0.1.16.2"}),
        ("rocm:gfx942+triton", "rocm", "gfx942", {"triton": ""}),
        ("npu:a3", "npu", "a3", {}),
    ],
)
def test_parse_and_print(text, kind, arch, features):
    p = Platform.parse(text)
    assert (p.kind, p.arch, dict(p.features)) == (kind, arch, features)
    assert Platform.parse(str(p)) == p


@pytest.mark.parametrize("text", ["", "cuda:", "cuda:sm 90", "CUDA:sm_90", "cuda:sm_90++triton", ":sm_90"])
def test_bad_text(text):
    with pytest.raises(BlockscaleError, match="need kind"):
        Platform.parse(text)


def test_versions_compare_by_number():
    p = Platform.parse("cuda:sm_90+triton=3.10.1+torch")
    assert p.at_least("triton", "3.6")
    assert not p.at_least("triton", "4")
    assert p.at_least("torch", "99")
    assert not p.at_least("deep_gemm", "1")


@pytest.mark.parametrize(
    ("text", "capability"), [("cuda:sm_90", 90), ("cuda:sm_121a", 121), ("rocm:gfx942", 0), ("cuda", 0)]
)
def test_capability(text, capability):
    assert Platform.parse(text).capability == capability


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("Intel(R) Data Center GPU Max 1550", "pvc"),
        ("Intel(R) Arc(TM) B580 Graphics", "bmg"),
        ("Intel(R) Arc(TM) A770 Graphics", "dg2"),
        ("Intel(R) Graphics [0x1234]", "intel-r-graphics-0x1234"),
    ],
)
def test_xpu_names(name, arch):
    assert _xpu_arch(name) == arch


def test_detect_the_cpu():
    p = detect("cpu")
    assert p.kind == "cpu"
    assert p.value("torch") == torch.__version__.split("+")[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_device_is_an_error():
    with pytest.raises(BlockscaleError, match="finds none"):
        detect("cuda")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_device_with_a_number_too_high_is_an_error(kind, monkeypatch):
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: 2)
    with pytest.raises(BlockscaleError, match=rf"device {kind}:2: torch .* finds 2 of this kind on this machine"):
        detect(f"{kind}:2")


def test_a_package_of_ops_that_is_half_there_is_said_and_one_that_is_not_there_is_not(monkeypatch):
    def missing(name):
        def import_module(module):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return import_module

    modules = {module for record in package_ops._records() for module in record["import"]}
    for module in modules:
        monkeypatch.setattr(package_ops.importlib, "import_module", missing(module.partition(".")[0]))
        monkeypatch.setattr(package_ops, "_records", lambda m=module: ({"package": "p", "import": [m], "schemas": {}},))
        assert package_ops.installed() == ([], [])
        monkeypatch.setattr(package_ops.importlib, "import_module", missing("its_own_need"))
        assert package_ops.installed() == ([("p.error", "No module named 'its_own_need'")], [])
    assert modules == {"vllm_xpu_kernels._C", "vllm_xpu_kernels._xpu_C"}
