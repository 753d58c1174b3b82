"""From `gemm.py --tune` to the table that the Hopper kernels ship: python bench/fit_gemm.py tune.json [tune.json …]

Several runs are joined by the ratio to DeepGEMM in the same run. Prints how far the rule alone is from the best that
was measured, which is what a shape that the table does not hold gets.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys

from blockscale.kernels.gluon import selection
from blockscale.kernels.gluon.config import parse
from shapes import regime

TABLE = pathlib.Path(selection.__file__).parent / "h200.json"
SMS = 132
PEERS = ("deepgemm", "deepgemm_pdl", "prototype", "cublaslt", "bf16")


def relative(row: dict) -> dict[str, float]:
    """time(configuration) / time(DeepGEMM) of one measured shape."""
    return {c: t / row["time_us"]["deepgemm"] for c, t in row["time_us"].items() if c not in PEERS}


def main(paths: list[str]) -> None:
    joined: dict[tuple[int, int, int], dict[str, list[float]]] = {}
    for path in paths:
        for row in json.loads(pathlib.Path(path).read_text())["rows"]:
            if "deepgemm" in row["time_us"]:
                for config, ratio in relative(row).items():
                    joined.setdefault((row["n"], row["k"], row["m"]), {}).setdefault(config, []).append(ratio)
    table: dict[str, dict[str, str]] = {}
    best_of: dict[str, list[float]] = {}
    model_of: dict[str, list[float]] = {}
    for (n, k, m), configs in sorted(joined.items()):
        means = {c: sum(v) / len(v) for c, v in configs.items()}
        best = min(means, key=means.__getitem__)
        parse(best)
        table.setdefault(f"{n}x{k}", {})[str(m)] = best
        best_of.setdefault(regime(m), []).append(1 / means[best])
        model = str(selection.by_rule(m, n, k, SMS))
        if model in means:
            model_of.setdefault(regime(m), []).append(means[best] / means[model])
        else:
            print("not measured:", m, n, k, model)
        if model in means and means[best] / means[model] < 0.97:
            print(f"model {m:5} {n:6} {k:6} {model} {means[best] / means[model]:.3f} of {best}")
    for name, values in best_of.items():
        mean = lambda v: math.exp(sum(map(math.log, v)) / len(v))  # noqa: E731
        print(name, f"best over DeepGEMM {mean(values):.4f} (worst {min(values):.3f});",
              f"model over best {mean(model_of.get(name, [math.nan])):.4f} "
              f"(worst {min(model_of.get(name, [0])):.3f})")  # fmt: skip
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
