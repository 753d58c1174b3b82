"""Tensor and expert parallelism on torch.distributed, for layers of any width.

    torchrun --nproc-per-node 2 -m blockscale run CKPT "prompt"

1. `plan_sharding` says, from headers alone, which rank holds which part of which tensor: `plan` is
   the data, `planner`, `families` and `cuts` make it.
2. `RankCheckpoint` reads exactly those bytes; `piece` makes a part a weight of its own, also where the cut falls inside
   a scale block or an activation group: no value changes, nothing is requantized, no kernel has to know.
3. `ColumnParallelLinear`, `RowParallelLinear`, `ParallelExperts` and `ColumnParallelDense` run on the parts.
4. `joined` makes the processes that torchrun started into one run, which ends together. `route` decides whether sums
   go through memory that the GPUs share (`direct`) or by torch.distributed's backend (`collectives`), and says why.

| cut                            | equals one device                                                    |
|--------------------------------|----------------------------------------------------------------------|
| N (column), experts (dispatch) | bit for bit, for the same kernel                                     |
| K (row)                        | up to the order of an fp32 sum: partial sums stay in fp32 until added |
| experts (reduce)               | up to the order of an fp32 sum                                       |
| inside experts (ep < tp)       | the same, and contributions are not rounded before they are added    |

docs/parallel.md is the page for users.
"""

from .collectives import Group
from .direct import DirectGroup
from .errors import PlanError, RankError
from .experts import ParallelExperts
from .linear import ColumnParallelDense, ColumnParallelLinear, RowParallelLinear
from .load import RankCheckpoint
from .mlp import ParallelMLP
from .piece import Piece, piece, take
from .plan import ShardingPlan, Split
from .planner import plan_sharding
from .route import Route
from .wire import Wire, wire_of
from .world import World, joined, started

__all__ = [
    "ColumnParallelDense",
    "ColumnParallelLinear",
    "DirectGroup",
    "Group",
    "ParallelExperts",
    "ParallelMLP",
    "Piece",
    "PlanError",
    "RankCheckpoint",
    "RankError",
    "Route",
    "RowParallelLinear",
    "ShardingPlan",
    "Split",
    "Wire",
    "World",
    "joined",
    "piece",
    "plan_sharding",
    "started",
    "take",
    "wire_of",
]
