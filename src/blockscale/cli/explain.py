"""`blockscale explain`: which kernel serves a layer, and why every other one does not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from .. import registry
from ..checkpoint import Checkpoint, StoredLayer, open_checkpoint
from ..errors import BlockscaleError, CheckpointError, NoKernelError, UnknownNameError
from ..formats import get_format
from ..numerics import PRESETS, Numerics, get_numerics
from ..parallel.families import text_config
from ..platform import KINDS, Platform
from ..policy import Policy, model_policy
from ..registry import Plan, Problem, explain, select
from ._output import configurations, console, decisions_json, plan_json, platform_from, print_json, problem_json

_FORMAT = "fp8_128x128"
_EXPERTS = ("grouped_linear", "masked_linear", "gathered_linear")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def register(app: typer.Typer) -> None:
    @app.command("explain")
    def command(
        checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint directory.")] = None,
        shape: Annotated[str | None, typer.Option(help="N,K or E,N,K instead of a checkpoint.")] = None,
        format: Annotated[str | None, typer.Option(help=f"Weight format of --shape. Default: {_FORMAT}.")] = None,
        op: Annotated[
            str | None, typer.Option(help="Operation of --shape. Default: linear, and grouped_linear for E,N,K.")
        ] = None,
        platform: Annotated[
            str | None, typer.Option(help="Describe a platform: kind[:arch][+feature[=version]]…")
        ] = None,
        device: Annotated[str, typer.Option(help="Or take a device of this machine.")] = "cpu",
        numerics: Annotated[
            str, typer.Option(help="Policy: reference, hf, vllm, or one Numerics for every layer.")
        ] = "reference",
        dtype: Annotated[str, typer.Option(help="dtype of x and of the result.")] = "bfloat16",
        kernel: Annotated[str | None, typer.Option(help="Order this kernel or family.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Say which kernel runs, by M (rows of x: tokens), and every reason why the others do not.

        A described platform has only the packages that are named: cuda:sm_80+triton is an A100, rocm:gfx942+triton an
        MI300, xpu:bmg+triton+vllm-xpu-kernels an Arc B580. docs/platforms.md has more.
        """
        if (checkpoint is None) == (shape is None):
            raise BlockscaleError(
                f"explain: needs either a checkpoint or --shape N,K, got {'neither' if shape is None else 'both'}"
            )
        if checkpoint is not None and (format or op):
            raise BlockscaleError("explain: --format and --op describe --shape; a checkpoint has its own")
        if dtype not in _DTYPES:
            raise BlockscaleError(f"explain: --dtype needs one of {', '.join(_DTYPES)}, got {dtype!r}")
        where = platform_from(platform, device)
        policy = None
        if shape is not None:
            problems = Counter([_problem(shape, format or _FORMAT, op, _one_numerics(numerics), _DTYPES[dtype])])
        else:
            assert checkpoint is not None
            found = open_checkpoint(checkpoint)
            policy = model_policy(numerics, found.config)
            problems = _problems(found, policy, _DTYPES[dtype])
            if not problems:
                raise CheckpointError(f"{checkpoint}: holds no block-scaled weights; `blockscale quantize` makes them")
        answers = [_answer(problem, where, kernel, count) for problem, count in problems.items()]
        if as_json:
            said = (
                [dict(zip(("field", "value", "source"), row, strict=True)) for row in policy.rows()] if policy else []
            )
            one = {k: v for k, v in answers[0].items() if k != "layers"} if answers else {}
            print_json(one if shape else {"policy": said, "layers": answers})
        else:
            if policy is not None:
                _show_policy(policy)
            for problem, count in problems.items():
                _show(problem, where, kernel, count)
            if len(problems) > 1:
                _summarize(problems, where, kernel)
            for entry, why in registry.broken.items():
                console().print(f"\n[red]not loaded[/red] {entry}: {escape(why)}", highlight=False)
            if where.kind not in KINDS:
                text = (
                    f"kind {where.kind!r} is none of ours ({', '.join(KINDS)}): only other packages' kernels serve it"
                )
                console().print(f"\n{text}", highlight=False)
            elif platform and not where.features:
                console().print(f"\ndescribed without packages; with one: {where}+{_lacks(where)}", highlight=False)


def _problem(shape: str, format: str, op: str | None, numerics: Numerics, dtype: torch.dtype) -> Problem:
    try:
        *lead, n, k = (int(part) for part in shape.split(","))
    except ValueError as e:
        raise BlockscaleError(f"explain: --shape needs N,K or E,N,K, got {shape!r}") from e
    if min(*lead, n, k) < 1:
        raise BlockscaleError(f"explain: --shape needs whole numbers from 1 up, got {shape!r}")
    op = op or ("grouped_linear" if lead else "linear")
    if len(lead) > 1 or bool(lead) != (op in _EXPERTS):
        raise BlockscaleError(f"explain: {op} needs --shape {'E,N,K' if op in _EXPERTS else 'N,K'}, got {shape!r}")
    fmt = None if op == "dense_linear" else get_format(format)
    if op.endswith("quantize"):
        n = 0
    return Problem(op, n, k, dtype, fmt, "row", dtype, numerics, lead[0] if lead else 0)


def _one_numerics(name: str) -> Numerics:
    """Of a shape alone: "reference" follows the format, and whose rule "hf" and "vllm" mean only a config tells."""
    if name.partition(",")[0] in ("hf", "vllm"):
        raise BlockscaleError(f"explain: --numerics {name} needs a checkpoint, whose config it follows; got --shape")
    first, comma, changes = name.partition(",")
    if first not in ("reference", *PRESETS):
        raise UnknownNameError("numerics", first, ("reference", *PRESETS))
    return get_numerics(f"{'checkpoint' if first == 'reference' else first}{comma}{changes}")


def _problems(checkpoint: Checkpoint, policy: Policy, dtype: torch.dtype) -> Counter[Problem]:
    """Distinct layer shapes of a checkpoint and how many layers have each. Single experts count as one stack."""
    found, stacks = Counter[Problem](), dict[str, list[StoredLayer]]()
    for layer in checkpoint.layers:
        *lead, n, k = layer.shape
        single = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)", layer.name)
        if single:
            stacks.setdefault(f"{single[1]}.*.{single[2]}", []).append(layer)
        elif lead:
            found[_layer_problem("grouped_linear", n, k, layer, policy.experts, dtype, lead[0])] += 1
        elif layer.name.endswith((".wo_a", ".o_a_proj")):
            groups = int(text_config(checkpoint.config).get("o_groups", 1))
            found[_layer_problem("grouped_linear", n // groups, k, layer, policy.grouped_output, dtype, groups)] += 1
        else:
            found[_layer_problem("linear", n, k, layer, policy.linear, dtype, 0)] += 1
    for layers in stacks.values():
        n, k = layers[0].shape
        found[_layer_problem("grouped_linear", n, k, layers[0], policy.experts, dtype, len(layers))] += 1
    return found


def _layer_problem(
    op: str, n: int, k: int, layer: StoredLayer, numerics: Numerics, dtype: torch.dtype, groups: int
) -> Problem:
    static = layer.parts.input_scale is not None
    return Problem(op, n, k, dtype, layer.format, "row", dtype, numerics, groups, static)


def _show_policy(policy: Policy) -> None:
    out = console()
    out.print(f"policy {policy.name}", highlight=False)
    for field, value, source in policy.rows():
        out.print(f"  {field}: {value}\n             - {escape(source)}", highlight=False)


def _answer(problem: Problem, platform: Platform, kernel: str | None, count: int) -> dict[str, Any]:
    plan, _ = _plan(problem, platform, kernel)
    return {
        "problem": problem_json(problem),
        "platform": str(platform),
        "plan": plan_json(plan),
        "decisions": decisions_json(explain(problem, platform), problem, platform),
        "layers": count,
    }


def _plan(problem: Problem, platform: Platform, kernel: str | None) -> tuple[Plan | None, str]:
    """The plan, or None and why there is none: that too is an answer."""
    try:
        return select(problem, platform, kernel=kernel), ""
    except NoKernelError as e:
        return None, str(e)


def _show(problem: Problem, platform: Platform, kernel: str | None, count: int) -> None:
    out = console()
    times = f"  ({count} layers)" if count > 1 else ""
    out.print(f"\n{problem}{times}\non {platform}", highlight=False)
    plan, why = _plan(problem, platform, kernel)
    out.print(f"plan: {plan}" if plan else f"[red]{why}[/red]", highlight=False)
    for decision in explain(problem, platform):
        mark = "[green]accepts[/green]" if decision.accepted else "refuses"
        out.print(f"  {mark}  {decision.kernel.name}", highlight=False)
        lines = decision.reasons or (*decision.notes, *configurations(decision, problem, platform))
        for line in lines:
            out.print(f"             - {escape(line)}", highlight=False)


def _summarize(problems: Counter[Problem], platform: Platform, kernel: str | None) -> None:
    """After pages of reasons, a line for each kind of layer."""
    out = console()
    out.print("\nin short", highlight=False)
    for problem, count in problems.items():
        plan, _ = _plan(problem, platform, kernel)
        experts = f"{problem.groups} x " if problem.groups else ""
        layer = f"{problem.op} {experts}[{problem.n}, {problem.k}] {problem.format}"
        served = str(plan) if plan else "[red]no kernel[/red]"
        out.print(f"  {count:4} x {escape(layer)}: {served}", highlight=False)


def _lacks(platform: Platform) -> str:
    """The package without which a described platform has next to nothing."""
    return "cpu-native" if platform.kind == "cpu" else "triton"
