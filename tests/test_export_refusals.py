"""Exports: mistakes are named, a killed writer leaves nothing, and memory is bounded."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from exported import plain
from torch import nn

import quaver as qv
from quaver import models
from quaver.hf.formats import FORMATS


def test_frozen_layers_of_other_codes_are_refused(tmp_path):
    model = qv.side_tune(plain(), reduction=4)
    with pytest.raises(ValueError, match=r"q_proj is a FrozenLinear, which keeps codes of another"):
        qv.export(model, tmp_path / "out")


# Bad input: named, and nothing written


def _bad(spoil):
    model = plain()
    with torch.no_grad():
        spoil(model.model.layers[1].mlp.up_proj.weight)
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (plain, {"format": "fp8"}, ValueError, "format must be one of bf16, fp8-block"),
        (plain, {"max_shard_size": "5 apples"}, ValueError, "max_shard_size .* got '5 apples'"),
        (plain, {"max_shard_size": 0}, ValueError, "max_shard_size"),
        (plain, {"max_shard_size": True}, ValueError, "max_shard_size"),
        (plain, {"tokenizer": "gpt2"}, TypeError, "tokenizer must have save_pretrained, got str"),
        (lambda: nn.Linear(4, 4), {}, TypeError, "one of transformers or a quaver.*got Linear"),
        (
            lambda: models.build(models.Config(family="gpt", dim=32, layers=1, heads=2)),
            {},
            ValueError,
            "quaver.models.GPT is no architecture",
        ),
        (lambda: plain().to("meta"), {}, ValueError, "is on the meta device"),
        *(
            (lambda: _bad(lambda w: w[3, 5].fill_(float("nan"))), {"format": form}, ValueError,
             "model.layers.1.mlp.up_proj.weight has values that are not finite")
            for form in FORMATS
        ),
        *(
            (lambda recipe=recipe: qv.convert(_bad(lambda w: w[3, 5].fill_(float("inf"))), recipe),
             {"format": form}, ValueError, "not finite")
            for form in FORMATS for recipe in ("fp8lm-o2", "coat")
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        qv.export(make(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(tmp_path):
    model = plain(num_hidden_layers=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name, why in (("link", "a symbolic link"), ("file", "no folder"), (".", "not empty")):
        with pytest.raises(ValueError, match=f"new or an empty folder, .* is {why}"):
            qv.export(model, tmp_path / name)
    qv.export(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="is not empty"):
        qv.export(model, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "link"]


def test_a_shard_of_a_model_is_refused(tmp_path):
    from torch.distributed.tensor import DTensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = plain()
        layer, mesh = model.model.layers[0].mlp.up_proj, init_device_mesh("cpu", (2,))
        layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"up_proj.weight is sharded over ranks; save by"):
            qv.export(model, tmp_path / "out")
    finally:
        torch.distributed.destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has adapters; export model.merge_and_unload\(\)"):
        qv.export(model, tmp_path / "out")
    qv.export(model.merge_and_unload(), tmp_path / "out")


KILLED = """
import sys, time
from pathlib import Path
from quaver.files import new_folder
with new_folder(Path(sys.argv[1]), "test") as inside:
    (inside / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_for_long(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        qv.export(plain(num_hidden_layers=1), tmp_path / "out2")
        assert len(list(tmp_path.glob(".out.*"))) == 1  # held by a living process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.1)
    qv.export(plain(num_hidden_layers=1), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out2"]


# Memory

PEAK = """
import ctypes, gc, sys, quaver as qv
from quaver import models
def build(recipe, layers):
    sizes = dict(vocab=256, dim=512, heads=8, kv_heads=8, ffn=1408, layers=layers)
    return qv.convert(models.build(models.Config(**sizes)), recipe)
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
for case in sys.argv[2:]:
    recipe, form = case.split(",")
    qv.export(build(recipe, 1), f"{sys.argv[1]}/{case}-small", form)  # imports what it needs
    model = build(recipe, 10)
    held = sum(p.numel() * (2 if isinstance(p, qv.ScaledTensor) else p.element_size())
               for p in model.parameters())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is no part of the model
    open("/proc/self/clear_refs", "w").write("5")  # the peak is that from here on
    before = status("VmRSS")
    qv.export(model, f"{sys.argv[1]}/{case}", form)
    print(case, (status("VmHWM") - before) / held)
    model = None
"""


@pytest.mark.slow
def test_peak_memory_above_the_models_own(tmp_path):
    """The bar is 0.35 of the bytes of the parameters; one weight is a few per cent of 10 blocks."""
    cases = ["bf16,bf16", "bf16,fp8-block", "fp8lm-o2,fp8-block", "coat,fp8-tensor"]
    command = [sys.executable, "-c", PEAK, str(tmp_path), *cases]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found = dict(line.split() for line in run.stdout.splitlines())
    assert found.keys() == set(cases)
    assert all(float(share) <= 0.35 for share in found.values()), found
