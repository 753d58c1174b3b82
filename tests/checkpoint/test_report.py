"""The report page, the search for scales, and the tensor-parallel verdict."""

import html.parser
import json

import pytest
import torch
from safetensors.torch import save_file

from blockscale import get_format, reference
from blockscale.checkpoint import convert_checkpoint, quantize_checkpoint
from blockscale.checkpoint.encode import make_encoding
from blockscale.checkpoint.report import kind_of, page
from blockscale.checkpoint.search import searched_scale
from blockscale.checkpoint.stats import Stats
from blockscale.checkpoint.svg import bars, dots


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]


def test_the_page_stands_alone(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "out", "mxfp4")
    text = (tmp_path / "out" / "quantization_report.html").read_text()
    found = Page(text)
    assert (found.links, found.tags.count("svg"), "script" in found.tags) == ([], 2, False)
    assert found.tags.count("circle") == 2 * 7  # seven weights, seven legend entries
    assert "model.layers.0.mlp.down_proj" in text
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["summary"]["tensors"] == 7
    assert {sum(t["scales"].values()) for t in report["tensors"]} == {256 * 8, 128 * 8, 192 * 8, 256 * 6}


def test_names_are_escaped():
    row = {"name": "layers.0.<b>", "shape": [1, 1], "relative_error": 0.1, "sqnr_db": 20.0, "scales": {"0": 1}}
    summary = {"tensors": 1, "copied": 0, "mean_relative_error": 0.1, "max_relative_error": 0.1}
    text = page("x", summary, [row])
    assert "<b>" not in text
    assert "&lt;b&gt;" in text


def test_an_exact_conversion_says_so(models, tmp_path):
    """No error plot and no worst ten where nothing changed."""
    convert_checkpoint(models("v31"), tmp_path / "out", scale_dtype="e8m0")
    text = (tmp_path / "out" / "quantization_report.html").read_text()
    assert "<title>Quantization report: convert e8m0</title>" in text
    assert "No value changed." in text
    assert (text.count("<svg"), "worst</h2>" in text) == (1, False)


def test_the_page_says_how_much_was_measured(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    save_file({"layers.0.up_proj.weight": torch.randn(2048, 2048).bfloat16()}, src / "model.safetensors")
    quantize_checkpoint(src, tmp_path / "out", "fp8_128x128")
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    measured = report["tensors"][0]["measured"]
    assert measured == 2**18
    assert "measured on 6.2% of the elements" in (tmp_path / "out" / "quantization_report.html").read_text()


def test_plots_of_odd_data():
    assert dots({"a": [(0.0, 0.0)]}, "x", "y").startswith("<svg")
    assert (
        dots({f"s{i}": [(0.0, 1.0)] for i in range(12)}, "x", "y").count("<rect") == 4
    )  # two series, two legend entries
    assert dots({"a": [(3.0, 0.1)], "b": [(-1.0, 0.2)]}, "x", "y").count("<circle") == 4
    assert bars({}, "x", "y") == "<p>none</p>"
    assert bars({-3: 5, 2: 1}, "x", "y").count("<rect") == 6


@pytest.mark.parametrize(("bad", "relative"), [(torch.nan, 0.025), (torch.inf, 0.025), (1e30, 0.03)])
def test_errors_are_numbers_whatever_the_weights_are(bad, relative):
    """NaN and infinities do not count; squares beyond fp32 do."""
    x = torch.randn(128, 128) * (bad if bad == 1e30 else 1)
    x[3, 4] = bad
    stats = Stats(x.numel(), 1, full=True)
    stats.add(x, reference.quantize(x, get_format("fp8_128x128")), 0)
    assert stats.result()["relative_error"] == pytest.approx(relative, rel=0.25)


def test_kinds():
    assert kind_of("model.layers.3.mlp.experts.17.up_proj") == (3, "mlp.experts.up_proj")
    assert kind_of("layers.0.attn.wq_a") == (0, "attn.wq_a")
    assert kind_of("lm_head") == (None, "lm_head")


# -- searched scales ----------------------------------------------------------------------------------------------


def squared_error(x, q):
    return float((reference.dequantize(q) - x).double().square().sum())


@pytest.mark.parametrize("name", ["fp8_128x128", "fp8_32x32_ue8m0", "mxfp8", "mxfp4", "nvfp4"])
def test_searched_scales_are_never_worse(name):
    x = torch.randn(70, 192) * torch.randn(70, 1).exp()
    x[3, 5] = 40.0
    fmt = get_format(name)
    plain = reference.quantize(x, fmt)
    scale = searched_scale(x, make_encoding(fmt), plain.global_scale)
    searched = reference.quantize(x, fmt, scale=scale, global_scale=plain.global_scale)
    assert squared_error(x, searched) <= squared_error(x, plain) * (1 + 1e-9)
    if fmt.packed:
        assert squared_error(x, searched) < squared_error(x, plain) * 0.95


def test_quantize_with_searched_scales(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "plain", "mxfp4", report="full")
    quantize_checkpoint(llama, tmp_path / "mse", "mxfp4", scales="mse", report="full")

    def error(path):
        return json.loads((path / "quantization_report.json").read_text())["summary"]["mean_relative_error"]

    assert error(tmp_path / "mse") < error(tmp_path / "plain") * 0.98
