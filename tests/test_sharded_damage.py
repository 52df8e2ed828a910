"""Sharded checkpoints whose index lies: refused by name, nothing read or written outside."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

import quaver as qv
from quaver.distributed.fsdp import checkpoint as sharded
from quaver.schema import with_crc32


def make(seed=0):
    torch.manual_seed(seed)
    model = qv.convert(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)), "fp8lm-o2", skip=())
    return model, qv.AdamW(model.parameters(), lr=1e-2, recipe="fp8lm-o2")


@pytest.fixture
def saved(tmp_path):
    """A folder of one rank, and a model that it fits."""
    model, optimizer = make()
    model(torch.randn(8, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    sharded.save(tmp_path / "state", model, optimizer, step=3, extra="x")
    return tmp_path / "state", *make(1)


def values(model, optimizer):
    states = [v for p in model.parameters() for v in optimizer.state.get(p, {}).values()]
    return [t.detach().float().clone() for t in (*model.state_dict().values(), *states)]


def refused(path, model, optimizer):
    before, generator = values(model, optimizer), torch.get_rng_state()
    with pytest.raises(qv.CheckpointError) as error:
        sharded.load(path, model, optimizer)
    after = values(model, optimizer)
    assert all(map(torch.equal, before, after)) and len(before) == len(after)
    assert torch.equal(torch.get_rng_state(), generator)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_folder_of_one_rank_comes_back(saved):
    path, model, optimizer = saved
    assert sharded.load(path, model, optimizer) == {"step": 3, "extra": "x"}
    expected, _ = make()
    assert not torch.equal(model[0].weight, expected[0].weight)  # it was trained


def edit(path, change, whole=True):
    document = json.loads((path / "checkpoint.json").read_text())
    change(document)
    if whole:  # a forger knows the checksum too
        with_crc32(document)
    (path / "checkpoint.json").write_text(json.dumps(document))


def rename_shard(name):
    def change(document):
        document["files"][name] = document["files"].pop(next(iter(document["files"])))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("folder"), "lacks folder"),
        (lambda d: d.update(folder="/etc"), "folder must be a or b"),
        (lambda d: d.update(folder="../state/a"), "folder must be a or b"),
        (lambda d: d.update(folder=7), "folder must be a text"),
        (lambda d: d.update(files=None), "files must be an object"),
        (lambda d: d.update(files={}), "its tensors have"),
        (lambda d: d.update(ranks=0), "ranks must be at least 1"),
        (lambda d: d.update(ranks="4"), "ranks must be a whole number"),
        (lambda d: d.pop("tensors"), "lacks tensors"),
        (lambda d: d["tensors"]["model.1.bias"].update(shape=[10**12]), "its tensors have"),
        (lambda d: d["tensors"]["model.1.bias"].update(shape=[2**62, 4]), "its tensors have"),
        (lambda d: d["tensors"]["model.1.bias"].update(shape=[-1]), "has shape [-1]"),
        (lambda d: d["tensors"]["model.1.bias"].update(shape=None), "shape must be a list"),
        (lambda d: d["tensors"]["model.1.bias"].update(dtype="nonsense"), "unknown dtype"),
        (lambda d: d["tensors"]["model.1.bias"].update(dtype="load"), "unknown dtype"),
        (lambda d: d["tensors"]["model.1.bias"].update(dtype="int32"), "float32 [16] here"),
        (lambda d: d["tensors"]["model.1.bias"].update(shape=[15]), "model.1.bias"),
        (lambda d: d["tensors"].pop("model.1.bias"), "lacks model.1.bias"),
        (
            lambda d: d["tensors"].pop(next(n for n in d["tensors"] if n.endswith(".amax"))),
            "the shards hold",
        ),
        (lambda d: d["tensors"].pop("rng.0.torch"), "torch's is missing"),
        (lambda d: d["tensors"].pop("rng.0.plain"), "rng.0.plain must be bytes"),
        (lambda d: d.update(step="3"), "step must be a whole number"),
        (lambda d: d["optimizer"].pop("states"), "lacks states"),
        (rename_shard("/etc/passwd"), "'/etc/passwd' is no name of a shard"),
        (rename_shard("../a/x.safetensors"), "is no name of a shard"),
        (rename_shard("shard-00009-model-00001-of-00001.safetensors"), "is missing"),
    ],
)
def test_an_index_that_lies(saved, change, message):
    path, model, optimizer = saved
    edit(path, change)
    assert message in refused(path, model, optimizer)


def test_an_index_that_changed(saved):
    edit(saved[0], lambda d: d.update(step=4), whole=False)
    assert "checkpoint.json is damaged: its checksum does not match" in refused(*saved)


def test_a_shard_that_is_a_link_or_foreign(saved, tmp_path):
    path = saved[0]
    shard = next((path / "a").iterdir())
    moved = tmp_path / "moved"
    shard.rename(moved)
    shard.symlink_to(moved)
    assert "a symbolic link" in refused(*saved)
    shard.unlink()
    moved.rename(shard)
    shutil.copy(shard, path / "a" / "shard-00002-model-00001-of-00001.safetensors")
    assert "is no part of the checkpoint" in refused(*saved)


def test_saving_removes_nothing_of_others_and_follows_no_link(saved, tmp_path):
    path, model, optimizer = saved
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "shard-00001-model-00001-of-00001.safetensors").write_text("precious")
    (path / "b").symlink_to(precious)
    with pytest.raises(qv.CheckpointError, match="b holds other files than shards"):
        sharded.save(path, model, optimizer)
    assert [p.read_text() for p in precious.iterdir()] == ["precious"]
    (path / "b").unlink()
    (path / "b").mkdir()
    (path / "b" / "note.txt").touch()
    with pytest.raises(qv.CheckpointError, match="b holds other files than shards"):
        sharded.save(path, model, optimizer)
    assert (path / "b" / "note.txt").exists()
    os.remove(path / "b" / "note.txt")
    sharded.save(path, model, optimizer, step=9)
    assert sorted(os.listdir(path)) == [".lock", "b", "checkpoint.json"]
    assert sharded.load(path, model, optimizer)["step"] == 9
