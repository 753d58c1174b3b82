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


@pytest.mark.parametrize("cuts", [[1], [65536], [65535, 65537], [131072, 131073], list(range(1000, 300_000, 7001))])
def test_pieces_do_not_matter(cuts):
    edges = [0, *cuts, len(DATA)]
    assert of(*(DATA[a:b] for a, b in pairwise(edges))) == of(DATA)


@pytest.mark.parametrize("at", [0, 7, 8, 65535, 65536, 299_999, 300_000])
def test_every_flip_is_seen(at):
    changed = DATA.clone()
    changed[at] ^= 1
    assert of(changed) != of(DATA)


def test_moves_zeros_and_lengths_are_seen():
    assert of(torch.cat([DATA[8:], DATA[:8]])) != of(DATA)
    assert of(torch.cat([DATA[65536:131072], DATA[:65536], DATA[131072:]])) != of(DATA)
    assert of(torch.cat([DATA[:-100], torch.zeros(100, dtype=torch.uint8)])) != of(DATA)
    assert of(torch.zeros(5)) != of(torch.zeros(6))
    assert of() != of(torch.zeros(1))
