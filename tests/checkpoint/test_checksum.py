"""The checksum depends on bytes and their places, and not on how they arrive."""

from itertools import pairwise

import pytest
import torch

from blockscale.checkpoint.checksum import Checksum

DATA = torch.randint(0, 256, (300_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def of(*pieces):
    total = Checksum()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


@pytest.mark.parametrize("cuts", [[1], [65024], [65023, 65025], [130048, 130049], list(range(1000, 300_000, 7001))])
def test_pieces_do_not_matter(cuts):
    edges = [0, *cuts, len(DATA)]
    assert of(*(DATA[a:b] for a, b in pairwise(edges))) == of(DATA)


@pytest.mark.parametrize("at", [0, 7, 8, 65023, 65024, 299_999, 300_000])
def test_every_flip_is_seen(at):
    changed = DATA.clone()
    changed[at] ^= 1
    assert of(changed) != of(DATA)


def test_moves_zeros_and_lengths_are_seen():
    assert of(torch.cat([DATA[8:], DATA[:8]])) != of(DATA)
    assert of(torch.cat([DATA[65024:130048], DATA[:65024], DATA[130048:]])) != of(DATA)
    assert of(torch.cat([DATA[:-100], torch.zeros(100, dtype=torch.uint8)])) != of(DATA)
    assert of(torch.zeros(5)) != of(torch.zeros(6))
    assert of() != of(torch.zeros(1))


@pytest.mark.parametrize("width", [64, 256, 512, 576, 1024, 4096, 7168])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_change_places_are_seen(width, dtype):
    """What a converter does to q and k for another rotary embedding."""
    w = torch.randn(128, width).to(dtype)
    swapped = w.clone()
    swapped[[3, 5]] = w[[5, 3]]
    assert of(swapped) != of(w)
    assert of(w.view(2, 64, width).transpose(0, 1).reshape(128, width)) != of(w)
