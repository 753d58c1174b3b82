"""Parts of stored matrices: no value changes, and guards keep activation groups whole."""

import pytest
import torch

from blockscale import reference
from blockscale.formats import get_format
from blockscale.numerics import get_numerics
from blockscale.parallel import piece, take
from blockscale.parallel.cuts import cut
from blockscale.parallel.piece import activation_group

FORMATS = ["fp8_128x128", "fp8_128x128_ue8m0", "fp8_32x32", "fp8_row", "fp8_tensor", "mxfp8", "mxfp4", "nvfp4"]


def weight(n, k, fmt, experts=0):
    shape = (experts, n, k) if experts else (n, k)
    return reference.quantize(torch.randn(shape), get_format(fmt))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("n", "k", "ranks"), [(576, 192, 2), (192, 320, 4), (320, 320, 8), (300, 160, 3)])
def test_parts_dequantize_to_the_parts_of_the_whole(fmt, n, k, ranks):
    w = weight(n, k, fmt)
    whole = reference.dequantize(w)
    rows, cols = cut(n, ranks, 128), cut(k, ranks, 128)
    for rank in range(ranks):
        part = piece((n, k), w.format, rows=(rows[rank],), cols=cols, rank=rank, group=128)
        got = reference.dequantize(take(w, part))
        assert got.shape == part.part_shape
        mine = whole[slice(*rows[rank]), slice(*cols[rank])]
        assert torch.equal(got[:, part.front : part.front + mine.shape[1]], mine)
        guards = torch.cat([got[:, : part.front], got[:, part.front + mine.shape[1] :]], 1)
        assert guards.abs().sum() == 0
    assert part.part_format.block[1] == w.format.block[1]


def test_row_cuts_inside_a_block_are_a_finer_format_with_repeated_scales():
    w = weight(576, 256, "fp8_128x128")
    part = take(w, piece((576, 256), w.format, rows=((288, 576),)))
    assert part.format.name == "fp8_32x128"
    assert torch.equal(part.scale, w.scale[[2, 2, 2, 3, 3, 3, 3, 4, 4]])
    assert torch.equal(part.data.view(torch.uint8), w.data[288:].view(torch.uint8))


def test_fused_rows_and_stacks():
    w = weight(2 * 192, 128, "fp8_128x128_ue8m0", experts=3)
    part = piece((384, 128), w.format, rows=((48, 96), (240, 288)), experts=(1, 3))
    got = take(w, part)
    assert got.shape == (2, 96, 128)
    assert got.format.name == "fp8_16x128_ue8m0"
    whole = reference.dequantize(w)[1:]
    assert torch.equal(reference.dequantize(got), torch.cat([whole[:, 48:96], whole[:, 240:288]], 1))


@pytest.mark.parametrize(
    ("size", "ranks", "groups"), [(320, 8, (0, 1, 2)), (192, 4, (0, 1)), (512, 4, ()), (1024, 3, (2, 5))]
)
def test_every_rank_names_the_same_cut_groups(size, ranks, groups):
    cols = cut(size, ranks, 128)
    parts = [piece((64, size), get_format("fp8_128x128"), cols=cols, rank=r, group=128) for r in range(ranks)]
    assert {p.cut for p in parts} == {groups}
    for p in parts:
        assert (p.cols[0] - p.front) % 128 == 0
        assert p.part_shape[1] % 128 == 0 or p.cols[1] == size


def test_a_scale_for_a_whole_row_needs_a_guard_on_every_rank():
    fmt = get_format("fp8_row")
    group = activation_group(fmt, get_numerics("checkpoint"), False)
    assert group is None
    parts = [piece((8, 64), fmt, cols=((0, 32), (32, 64)), rank=r, group=group) for r in (0, 1)]
    assert [(p.front, p.back, p.cut, p.guarded()) for p in parts] == [(0, 16, (0,), (None, 0))] * 2


def test_no_scale_no_group():
    fp8, tensor = get_format("fp8_128x128"), get_format("fp8_tensor")
    assert activation_group(fp8, get_numerics("weight_only"), False) == 1
    assert activation_group(fp8, get_numerics("deepseek_v4_1"), False) == 32
    assert activation_group(tensor, get_numerics("checkpoint"), True) == 1
