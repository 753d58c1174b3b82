"""One rank of `test_direct.py`: a DirectGroup over memory that processes share on a CPU, its kernels interpreted.

python direct_ranks.py RANK SIZE PORT FILE
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from rank_checks import tokens, weight

from blockscale import reference
from blockscale.numerics import get_numerics
from blockscale.parallel import ColumnParallelLinear, Group, ParallelMLP, RowParallelLinear, direct, piece, take, turns
from blockscale.parallel.cuts import cut, shares


class FileMemory:
    """What `parallel.memory.SharedMemory` is on GPUs: a file that every process maps."""

    path = ""

    def __init__(self, group, device, nbytes):
        self.size, self.nbytes = group.size(), nbytes
        self.all = torch.from_file(self.path, shared=True, size=nbytes * self.size, dtype=torch.uint8)
        base = self.all.data_ptr()
        self.addresses = torch.tensor([base + rank * nbytes for rank in range(self.size)], dtype=torch.int64)
        dist.barrier()

    def view(self, rank, offset, shape, dtype):
        count = torch.Size(shape).numel() * dtype.itemsize
        start = rank * self.nbytes + offset
        return self.all[start : start + count].view(dtype).view(*shape)

    def barrier(self):
        dist.barrier()

    def beside(self):
        return contextlib.nullcontext()

    def join(self):
        pass


def small_sums(group, rank, size):
    """One kernel: repeated, of several sizes and dtypes, equal to the sum in the order of the ranks."""
    for call, (rows, dtype) in enumerate([(1, torch.float32), (40, torch.float32), (3, torch.bfloat16)] * 3):
        every = [
            torch.randn(rows, 256, generator=torch.Generator().manual_seed(9 * call + r)).to(dtype) for r in range(size)
        ]
        total = torch.zeros(rows, 256)
        for x in every:
            total = total + x.float()
        bias = torch.arange(256.0) if call % 2 else None
        got = group.start_sum(every[rank].clone(), torch.float32, bias)()
        assert torch.equal(got, total if bias is None else total + bias), (call, rows, dtype)


def rows_in_turns(group, rank, size):
    """Row parallel, in several rounds, gathered and scattered, an uneven number of rows; the same bits everywhere."""
    n, k, rows = 64, 128 * size, 5 * size + 1
    whole, x = weight(n, k, "fp8_128x128"), tokens(rows, k)
    ranges = cut(k, size, 128)
    part = piece((n, k), whole.format, cols=ranges, rank=rank, group=128)
    mine = x[:, slice(*ranges[rank])].contiguous()
    want = reference.linear(x, whole, numerics=get_numerics("checkpoint"))
    found = {}
    for sums in ("float32", "bfloat16"):
        numerics = f"checkpoint,sums={sums}"
        for bias in (None, torch.randn(n, generator=torch.Generator().manual_seed(3))):
            options = {"group": group, "part": part, "numerics": numerics}
            got = RowParallelLinear(take(whole, part), bias, **options)(mine)
            exact = want if bias is None else want + bias
            error = float((got - exact).norm() / exact.norm())
            assert error < (1e-6 if sums == "float32" else 4e-3), (sums, error)
            every = [torch.empty_like(got) for _ in range(size)]
            dist.all_gather(every, got)
            assert all(torch.equal(other, got) for other in every)
            even = slice(0, 5 * size)
            gathered = RowParallelLinear(take(whole, part), bias, **options)(mine[even])
            scattered = RowParallelLinear(take(whole, part), bias, scatter=True, **options)(mine[even])
            assert torch.equal(scattered, gathered[slice(*shares(5 * size, size)[rank])])
        found[sums] = got
    assert not torch.equal(found["float32"], found["bfloat16"])


def mlp(group, rank, size):
    """Tokens on all ranks, with the norm before the layer: as the backend's exchange does it, up to a sum's order."""
    hidden, inner, each = 256, 128 * size, 4
    gate_up, down = weight(2 * inner, hidden, "fp8_128x128", 3), weight(hidden, inner, "fp8_128x128", 4)
    x = tokens(each * size, hidden, torch.bfloat16)
    normed = (torch.linspace(0.5, 1.5, hidden).bfloat16(), 1e-6)
    ranges = cut(inner, size, 128)
    rows = tuple(((b, e), (inner + b, inner + e)) for b, e in ranges)
    first = take(gate_up, piece((2 * inner, hidden), gate_up.format, rows=rows[rank]))
    second = piece((hidden, inner), down.format, cols=ranges, rank=rank, group=128)
    mine = slice(each * rank, each * (rank + 1))

    def layer(group):
        column = ColumnParallelLinear(first, group=group, rows=rows, rows_of_x=True)
        row = RowParallelLinear(take(down, second), group=group, part=second, scatter=True, met=True)
        return column, ParallelMLP(column, row, norm=normed)

    (other, backend), (column, made) = layer(Group(dist.group.WORLD)), layer(group)
    want, sent = backend(x[mine]).float(), other(x[mine])
    for _ in range(5):  # through all of the room for gathers, and again
        got = made(x[mine]).float()
        assert bool(((got - want).abs() <= want.abs() * 2**-7 + want.norm() * 1e-6).all())  # one bf16 step
        assert torch.equal(column(x[mine]), sent)


def main():
    rank, size, port, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    FileMemory.path = path
    direct.SMALL = 1 << 16
    with torch.no_grad():
        group = direct.DirectGroup(dist.group.WORLD, torch.device("cpu"), room=1 << 17, memory=FileMemory)
        small_sums(group, rank, size)
        direct.DirectGroup.takes_turns = lambda self, rows, width, sums: rows >= self.size
        group._slot = 64 * 4 * 2  # two rows a round
        rows_in_turns(group, rank, size)
        group._slot = 1 << 14
        mlp(group, rank, size)
        turns.TILE, group._processors = (1, 64), 5  # own rows join the region before
        owners = shares(4 * size, size)
        assert turns.regions(owners, rank, 256, 5) != turns.regions(owners, rank, 256, 0)
        mlp(group, rank, size)
        rows_in_turns(group, rank, size)
    print(f"rank {rank} done")
    dist.destroy_process_group()


main()
