"""Plans: what is cut where, what is refused and why."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from blockscale import reference
from blockscale.checkpoint import open_checkpoint
from blockscale.checkpoint.ranges import RangeReader
from blockscale.cli import app
from blockscale.formats import get_format
from blockscale.numerics import Numerics
from blockscale.parallel import PlanError, RankCheckpoint, plan_sharding, take, wire_of
from blockscale.parallel.planner import count_experts
from blockscale.parallel.summary import summarize
from blockscale.policy import model_policy
from makers import make_deepseek_v4, make_minimax_m2


def rows(plan):
    """By name; layers that the model does not have are left out."""
    return {row["name"]: row for row in summarize(plan)["rows"] if row["kind"] != "unused"}


def test_v3_over_two_ranks_is_cut_at_heads_and_groups(folders):
    plan = plan_sharding(open_checkpoint(folders["v3"]), 2, 2)
    found = rows(plan)
    held = {
        name.removeprefix("model.layers.*."): (row["kind"], row["cut"], row["parts"]) for name, row in found.items()
    }
    assert held["self_attn.q_b_proj"] == ("column", "N", [192, 192])
    assert held["self_attn.o_proj"] == ("row", "K", [128, 128])
    assert held["self_attn.kv_a_proj_with_mqa"] == ("replicated", "", [])
    assert held["mlp.down_proj"] == ("row", "K", [160, 160])
    assert held["lm_head.weight"] == ("gathered", "N", [256, 256])
    assert held["mlp.experts.*.up_proj"][0] == "expert"
    assert plan.splits["model.layers.2.mlp.experts.0.up_proj"].kind == "unused"  # multi-token prediction
    assert found["model.layers.*.mlp.gate_proj"]["part_formats"] == ["fp8_32x128"]


def test_latent_projections_are_split_on_request(folders):
    plan = plan_sharding(open_checkpoint(folders["v3"]), 2, 2, latents="split")
    row = rows(plan)["model.layers.*.self_attn.kv_a_proj_with_mqa"]
    assert plan.splits["model.layers.0.self_attn.kv_a_proj_with_mqa"].kind == "gathered"
    assert row["shape"] == [576, 256]


def test_more_ranks_than_heads_gather_and_say_so(folders):
    plan = plan_sharding(open_checkpoint(folders["v3"]), 3, 3)
    split = plan.splits["model.layers.0.self_attn.o_proj"]
    assert split.kind == "gathered"
    assert split.reason == "2 heads (or groups of heads) over 3 ranks"


def test_key_value_heads_are_shared_by_ranks(folders):
    plan = plan_sharding(open_checkpoint(folders["qwen3"]), 4, 4)
    assert plan.splits["model.layers.0.self_attn.k_proj"].rows == (((0, 64),), ((0, 64),), ((64, 128),), ((64, 128),))
    assert plan.splits["model.layers.0.self_attn.q_proj"].rows[3] == ((192, 256),)


def test_norms_over_all_heads_keep_heads_together(tmp_path):
    plan = plan_sharding(open_checkpoint(make_minimax_m2(tmp_path / "m")), 2, 2)
    assert plan.splits["model.layers.0.self_attn.q_proj"].reason == "q_norm runs over all heads together"


def test_v4_is_cut_at_groups_of_heads(folders):
    plan = plan_sharding(open_checkpoint(folders["v4"]), 2, 1)
    assert plan.splits["layers.0.attn.wo_a"].rows == (((0, 128),), ((128, 256),))
    assert plan.splits["layers.0.attn.wo_b"].cols == ((0, 128), (128, 256))
    assert plan.splits["layers.1.attn.indexer.wq_b"].kind == "gathered"


@pytest.mark.parametrize(
    ("name", "tp", "ep"), [("v3", 3, 3), ("v3", 8, 2), ("v4", 4, 2), ("qwen3", 8, 8), ("qwen3", 2, 1)]
)
def test_every_rank_reads_its_share_and_no_more(folders, name, tp, ep):
    checkpoint = open_checkpoint(folders[name])
    plan = plan_sharding(checkpoint, tp, ep)
    for rank in range(tp):
        source = RankCheckpoint(plan, rank)
        before = syscall_bytes()
        for layer, part in plan.pieces(rank):
            assert source.load(layer.name).format == part.part_format
        for info in checkpoint.plain:
            if info.name not in plan.unread:
                source.rows(info.name)
        asked = syscall_bytes() - before
        source.close()
        assert source.bytes_read == plan.nbytes(rank) == source.share
        assert source.share <= asked <= 1.01 * source.share + 4096  # the system's count, its own small reads included


def syscall_bytes():
    with open("/proc/self/io") as f:
        return int(f.readline().split()[1])


def test_shares_add_up(folders):
    """Parts without overlap, and what every rank holds counted once."""
    checkpoint = open_checkpoint(folders["qwen3"])
    plan = plan_sharding(checkpoint, 2, 2)
    whole = summarize(plan)["replicated_bytes"]
    twice = 2 * 2 * 2 * 2  # k_proj and v_proj of two layers: 64 rows each of one block, whose two BF16 scales both read
    assert sum(plan.nbytes(rank) for rank in (0, 1)) == checkpoint.nbytes + whole + twice


def test_rectangles_are_the_tensors_rectangles(folders):
    checkpoint = open_checkpoint(folders["qwen3"])
    info = checkpoint.tensors["lm_head.weight"]
    with RangeReader() as reader:
        got = reader.rectangle(info, (3, 9), (16, 48))
        assert got.equal(checkpoint.tensor("lm_head.weight")[3:9, 16:48])
        assert reader.bytes_read == got.nbytes


@pytest.mark.parametrize(
    ("name", "tp", "ep", "why"),
    [
        ("v3", 8, 3, "ep=3 must divide tp=8"),
        ("qwen3", 16, 16, r"model\.layers\.0\.mlp\.experts: 8 experts over ep=16 groups: some would hold none"),
        ("v3", 64, 4, r"model\.layers\.0\.mlp\.down_proj: K=320 elements over 64 ranks"),
    ],
)
def test_an_impossible_plan_is_refused_with_layer_and_reason(folders, name, tp, ep, why):
    with pytest.raises(PlanError, match=why):
        plan_sharding(open_checkpoint(folders[name]), tp, ep)


def test_nvfp4_activations_without_a_stored_scale_cannot_be_cut(tmp_path):
    checkpoint = open_checkpoint(make_deepseek_v4(tmp_path / "m", experts="nvfp4"))
    policy = model_policy(Numerics(), checkpoint.config)
    plan = plan_sharding(checkpoint, 2, 1, policy)  # this one stores input scales
    assert plan.splits["layers.0.ffn.experts.0.w2"].kind == "row"


def test_stacked_experts_are_read_by_expert_and_slice(tmp_path):
    stacks = {
        "gate_up_proj": reference.quantize(torch.randn(4, 2 * 192, 128), get_format("fp8_128x128")),
        "down_proj": reference.quantize(torch.randn(4, 128, 192), get_format("fp8_128x128")),
    }
    prefix = "model.layers.0.mlp.experts."
    tensors = {prefix + name: w.data for name, w in stacks.items()}
    tensors |= {f"{prefix}{name}_scale_inv": w.scale for name, w in stacks.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "quantization_config": quantization}))
    plan = plan_sharding(open_checkpoint(tmp_path), 4, 2)
    for rank in range(4):
        source = RankCheckpoint(plan, rank)
        for layer, part in plan.pieces(rank):
            want = take(stacks[layer.name.rpartition(".")[2]], part)
            got = source.load(layer.name)
            assert got.shape[0] == 2
            assert torch.equal(reference.dequantize(got), reference.dequantize(want))
        assert source.bytes_read == plan.nbytes(rank)


def test_inspect_prints_plan_and_bytes(folders):
    result = CliRunner().invoke(app, ["inspect", str(folders["v3"]), "--tp", "8", "--ep", "4", "--json"])
    assert result.exception is None, result.output
    plan = json.loads(result.output)["plan"]
    assert (plan["tp"], plan["ep"], len(plan["bytes"])) == (8, 4, 8)
    down = next(row for row in plan["rows"] if row["name"] == "model.layers.*.mlp.down_proj")
    assert (down["cut"], down["parts"], down["cut_groups"]) == ("K", [40] * 8, 3)
    text = CliRunner().invoke(app, ["inspect", str(folders["v4"]), "--tp", "2", "--ep", "2"])
    assert text.exception is None
    assert "bytes a rank" in text.output


def test_inspect_refuses_what_cannot_be(folders):
    result = CliRunner().invoke(app, ["inspect", str(folders["qwen3"]), "--tp", "16", "--ep", "16"])
    assert isinstance(result.exception, PlanError)


def test_experts_are_counted(folders):
    assert [count_experts(open_checkpoint(folders[name])) for name in ("v3", "v4", "qwen3")] == [8, 8, 8]


def test_the_wire_carries_fp8_only_where_no_number_changes(folders):
    fp8 = open_checkpoint(folders["v3"]).layers[0].format
    assert wire_of(fp8, Numerics(), False).format.name == "fp8_1x128"
    assert wire_of(fp8, Numerics(weight_only=True), False).format is None
    again = wire_of(fp8, Numerics(), False, again=True)
    assert again.format is None
    assert "would quantize once more" in again.reason
    assert wire_of(fp8, Numerics(act_rounding="pow2_ceil"), False, again=True).format.name == "fp8_1x128_ue8m0"
