"""Which files make up a checkpoint, and what a folder must not do."""

import json

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint import open_checkpoint
from blockscale.errors import CheckpointError


def two_shards(path):
    path.mkdir()
    save_file({"a": torch.ones(2)}, path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, path / "model-00002-of-00002.safetensors")
    return path


def index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "model-00001-of-00002.safetensors", "b": "model-00003.safetensors"}, "missing shard"),
        ({"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}, "c: the index says"),
        ({"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}, "a: the index says"),
        ({"a": "../secret.safetensors"}, "is not the plain name"),
        ({"a": "/etc/passwd"}, "is not the plain name"),
        ({"a": "sub/x.safetensors"}, "is not the plain name"),
        ({"a": "x\0.safetensors"}, "is not the plain name"),
        ({"a": "config.json"}, "is not the plain name"),
        ({"a": ""}, "is not the plain name"),
        ({"a": 3}, "weight_map needs"),
        ([], "weight_map needs"),
        (None, "weight_map needs"),
    ],
)
def test_index_tricks(tmp_path, weight_map, says):
    path = index(two_shards(tmp_path / "c"), weight_map)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path)
    assert says in str(e.value)


def test_a_tensor_missing_from_the_index(tmp_path):
    path = two_shards(tmp_path / "c")
    save_file({"a": torch.ones(2), "x": torch.ones(1)}, path / "model-00001-of-00002.safetensors")
    index(path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="x: in the shard, but not in"):
        open_checkpoint(path)


def test_shards_without_an_index(tmp_path):
    path = two_shards(tmp_path / "c")
    assert list(open_checkpoint(path).tensors) == ["a", "b"]
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="says 2 shards, found 1"):
        open_checkpoint(path)


def test_links_out_of_the_tree(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    path = tmp_path / "c"
    path.mkdir()
    (path / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leaves the checkpoint"):
        open_checkpoint(path)


def test_links_of_the_hugging_face_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert list(open_checkpoint(snapshot).tensors) == ["a"]


def test_pickles_are_never_read(tmp_path):
    path = tmp_path / "c"
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle file, which is never read"):
        open_checkpoint(path)


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")


def test_writing_to_a_loaded_tensor_leaves_the_file(tmp_path):
    path = tmp_path / "c"
    path.mkdir()
    save_file({"a": torch.ones(4)}, path / "model.safetensors")
    before = (path / "model.safetensors").read_bytes()
    open_checkpoint(path).load("a").fill_(7)
    assert (path / "model.safetensors").read_bytes() == before


def test_odd_alignment_is_read(raw_file, tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [3, 7]},
    }
    path = raw_file(header, bytes([1, 2, 3]) + torch.tensor([2.5]).numpy().tobytes())
    assert open_checkpoint(path).load("b").tolist() == [2.5]
