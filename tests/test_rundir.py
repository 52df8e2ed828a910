"""A run's folder believes no name, follows no link and mixes no runs."""

import json
import os
import shutil
from pathlib import Path

import pytest
from runs import losses

from quaver import train
from quaver.errors import UsageError
from quaver.rundir import RunDir


@pytest.fixture
def done(settings):
    """A run of two steps, its folder, and its settings with changes."""

    def make(**changes):
        return settings(**({"steps": 2, "save_every": 1} | changes))

    train.run(make())
    return Path(make().out), make


def tree(folder):
    """Every file below a folder with its contents, except the lock."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def refused(folder, asked, message):
    before = tree(folder)
    with pytest.raises(UsageError) as error:
        train.run(asked)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0
    assert tree(folder) == before


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_overwrite_believes_no_name(done, tmp_path):
    """The configuration may be anybody's; the files that go are known."""
    out, make = done
    other = tmp_path / "other"
    shutil.copytree(out / "f32", other)
    edit(out / "config.json", lambda c: c.update(recipes=["../other", str(other), "f32"]))
    mine = out / "f32" / "checkpoint" / "state-of-the-art.safetensors"
    mine.write_text("a user's")
    (out / "bf16").mkdir()
    (out / "bf16" / "notes.txt").write_text("a user's")
    before = tree(other)
    train.run(make(overwrite=True, recipe=("coat",)))
    assert tree(other) == before
    assert {n for n, data in tree(out / "f32").items() if data} == {
        "checkpoint/state-of-the-art.safetensors"
    }
    assert (out / "bf16" / "notes.txt").exists()


def test_overwrite_keeps_to_folders_of_runs(settings, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (model / "loss.png").write_text("a user's")
    refused(model, settings(out=str(model), overwrite=True), "holds other files and no run")


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
@pytest.mark.parametrize(
    "name",
    [".lock", "config.json", "summary.json", "f32", "f32/metrics.jsonl", "f32/checkpoint",
     "f32/tensorboard", "f32/checkpoint/state.safetensors"],
)  # fmt: skip
def test_a_planted_link_is_refused_by_name(done, tmp_path, name, flag):
    out, make = done
    victim = tmp_path / "victim"
    planted = out / name
    if planted.is_dir():
        shutil.copytree(planted, victim)
        shutil.rmtree(planted)
    else:
        victim.write_text("precious")
        planted.unlink(missing_ok=True)
    planted.symlink_to(victim)
    before = tree(victim) if victim.is_dir() else victim.read_text()
    with pytest.raises(UsageError, match=f"{planted} is a symbolic link"):
        train.run(make(**{flag: True}))
    assert (tree(victim) if victim.is_dir() else victim.read_text()) == before


def test_a_link_in_place_of_a_temporary_or_a_lock_is_not_followed(settings, tmp_path):
    """In a folder that a run is about to make its own."""
    out, victim = Path(settings().out), tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious")
    for name in (".config.json.tmp", ".summary.json.tmp"):
        (out / name).symlink_to(victim)
    train.run(settings(steps=1))
    assert victim.read_text() == "precious"


def test_a_checkpoint_of_another_run_is_refused(done, tmp_path):
    out, make = done
    for changes, message in (
        ({"seed": 1}, "seed 1 (now 0)"),
        ({"lr": 0.5}, "lr 0.5 (now 0.001)"),
        ({"recipe": ("bf16",)}, "recipe"),
    ):
        train.run(make(out=str(tmp_path / "other"), overwrite=True, **changes))
        source, target = RunDir(tmp_path / "other"), RunDir(out)
        name = changes.get("recipe", ("f32",))[0]
        shutil.copy(source.checkpoint_path(name), target.checkpoint_path("f32"))
        target.summary_path.unlink(missing_ok=True)
        refused(out, make(resume=True), message)


def test_a_summary_that_is_damaged_or_of_another_run_is_refused(done, tmp_path):
    out, make = done
    summary = out / "summary.json"
    whole = summary.read_text()
    edit(summary, lambda s: s["recipes"]["f32"].update(final_loss=0.1))
    refused(out, make(resume=True), "its checksum does not match")
    summary.write_text(whole[: len(whole) // 2])
    refused(out, make(resume=True), "summary.json is damaged")
    train.run(make(out=str(tmp_path / "other"), seed=1))
    shutil.copy(tmp_path / "other" / "summary.json", summary)
    refused(out, make(resume=True), "is of a run with seed 1 (now 0)")


def test_metrics_that_are_damaged_are_refused(done):
    out, make = done
    path = out / "f32" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 5', '"loss": 4', 1))
    refused(out, make(resume=True), "metrics.jsonl is damaged")
    os.remove(out / "summary.json")
    refused(out, make(resume=True), "metrics.jsonl is damaged")


def test_what_a_killed_writer_left_goes_with_the_run(done):
    out, make = done
    left = out / "f32" / "checkpoint" / f".state.safetensors.{'0' * 32}.quaver"
    left.write_bytes(bytes(1000))
    train.run(make(overwrite=True))
    assert not left.exists()
    assert len(losses(out)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(settings, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        train.run(settings(out=str(tmp_path / "closed" / "run")))
