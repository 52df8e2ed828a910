"""Lightning's own Trainer with QuaverPrecision: it trains, saves, resumes, and reads back."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import RECIPES, plain

import quaver as qv

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from quaver.lightning import QuaverPrecision  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples/lightning_fit.py"
LEARNED = 2.0  # 3.47 before the first step, 1.54 at best

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|validation_step|isinstance|litlogger)"),
]


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def wanted(example, tmp_path_factory):
    """The loss of plain torch, in f32."""
    return example["main"](None, folder=str(tmp_path_factory.mktemp("plain")))[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_learns_as_plain_torch_and_resumes_bit_for_bit(example, wanted, recipe, tmp_path):
    loss, model = example["main"](recipe, folder=str(tmp_path))
    assert wanted < LEARNED and abs(loss / wanted - 1) < 0.01
    assert set(qv.convert_report(model).converted) >= {"network.up", "network.down"}

    middle = str(tmp_path / "step=50.ckpt")
    again, resumed = example["main"](recipe, folder=str(tmp_path / "again"), resume=middle)
    assert again == loss
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(plain(a), plain(b)), name
    one, two = (torch.load(p / "step=100.ckpt") for p in (tmp_path, tmp_path / "again"))
    assert same(one["optimizer_states"], two["optimizer_states"])
    assert same(one["QuaverPrecision"], two["QuaverPrecision"])

    # Users without the plugin read the same file.
    read = example["Speller"].load_from_checkpoint(tmp_path / "step=100.ckpt", recipe=recipe)
    for (name, a), b in zip(model.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(plain(a), plain(b)), name


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(plain(a), plain(b)) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("recipe", ["tensorwise", "coat"])
def test_two_processes_of_fsdp2_learn_as_plain_torch_and_resume(recipe, wanted, tmp_path):
    loss = run(tmp_path / "whole", recipe, "--shard")
    assert abs(loss / wanted - 1) < 0.01
    middle = tmp_path / "whole/step=50.ckpt"
    assert run(tmp_path / "again", recipe, "--shard", "--resume", middle) == loss
    one, two = (torch.load(tmp_path / f / "step=100.ckpt") for f in ("whole", "again"))
    assert all(same(one[key], two[key]) for key in ("state_dict", "optimizer_states"))
    state = one["optimizer_states"][0]["state"]
    assert {s["exp_avg.qdata"].dtype for s in state.values()} == {torch.uint8}
    assert {s["exp_avg_sq.qdata"].dtype for s in state.values()} == {torch.float16}


def run(folder, recipe, *flags, steps=100):
    """The held-out loss of two processes. Lightning starts the script again for the second."""
    command = [sys.executable, EXAMPLE, "--recipe", recipe, "--devices", "2", *flags]
    command += ["--steps", str(steps), "--folder", folder]
    done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"held-out loss (\S+)", done.stdout)[1])


def test_two_processes_of_ddp_learn_and_resume(tmp_path):
    loss = run(tmp_path / "whole", "fp8lm-o2", steps=20)
    assert loss < 2.6
    middle = tmp_path / "whole/step=10.ckpt"
    assert run(tmp_path / "again", "fp8lm-o2", "--resume", middle, steps=20) == loss
    one, two = (torch.load(tmp_path / f / "step=20.ckpt") for f in ("whole", "again"))
    assert all(same(one[key], two[key]) for key in ("state_dict", "optimizer_states"))


def fit(model, recipe="coat", **options):
    plugin = QuaverPrecision(recipe)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_steps": 1}
    trainer = pl.Trainer(plugins=[plugin], **quiet, **options)
    trainer.fit(model)
    return trainer


def test_a_checkpoint_of_another_recipe_is_refused(example, tmp_path):
    fit(example["Speller"]("coat")).save_checkpoint(tmp_path / "it.ckpt")
    trainer = pl.Trainer(plugins=[QuaverPrecision("tensorwise")], accelerator="cpu", max_steps=2,
                         logger=False, enable_checkpointing=False)  # fmt: skip
    with pytest.raises(ValueError, match="is of recipe 'coat', the plugin's is 'tensorwise'"):
        trainer.fit(example["Speller"]("tensorwise"), ckpt_path=tmp_path / "it.ckpt")


def test_what_shards_the_model_and_fabric_are_refused(example):
    from lightning.fabric import Fabric
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    plugin = QuaverPrecision("coat")
    sharding = SimpleNamespace(restore_checkpoint_after_setup=True)
    model = example["Speller"]("coat")
    model._trainer = SimpleNamespace(strategy=sharding)
    with pytest.raises(ValueError, match="SimpleNamespace shards the model"):
        plugin.convert_module(model)
    with pytest.raises(
        TypeError, match=r"found QuaverPrecision\('coat'\), which serves one device"
    ):
        FSDPStrategy(precision_plugin=plugin)
    model._trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"in configure_model call quaver.convert\(self, 'coat'"):
        plugin.convert_module(model)
    with pytest.raises(ValueError, match="stores no f16 masters and amax histories"):
        QuaverPrecision("fp8lm-o2").convert_module(model)
    with pytest.raises(TypeError, match="with Fabric call quaver"):
        Fabric(accelerator="cpu", plugins=plugin).setup(torch.nn.Linear(16, 16))


def test_quaver_alone_imports_no_lightning():
    code = "import sys, quaver; assert 'lightning' not in sys.modules; quaver.lightning"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_of_one_trainer_goes_to_another(example):
    model = example["Speller"]("coat")
    fit(model)
    fit(model)
    with pytest.raises(ValueError, match="converted by another recipe"):
        fit(model, "tensorwise")
