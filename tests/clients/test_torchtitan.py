"""torchtitan's own classes: its debug model converted, sharded, trained, saved and resumed."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run
from torch import nn

import quaver as qv

machine = pytest.importorskip("torchtitan.tools.utils", reason="torchtitan is not installed")
if not torch.cuda.is_available():  # it expects a GPU where it finds no device
    machine.device_type, machine.device_module = "cpu", torch.cpu
titan = pytest.importorskip("quaver.torchtitan", exc_type=ImportError)

from quaver.nn import MLP, Linear, Norm  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples/torchtitan_train.py"
CODES = {"exp_avg": "e4m3-tensor", "exp_avg_sq": "f16-tensor"}
STEPS = 40
TIMEOUT = 900  # seconds, of some ten runs on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def spec(recipe, flavor="debugmodel", model="llama3", **options):
    import importlib

    registry = importlib.import_module(f"torchtitan.models.{model}").model_registry
    converter = titan.QuaverConverter.Config(recipe=recipe, **options)
    return registry(flavor, converters=[converter])


def built(recipe, dtype=torch.float32, **options):
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return spec(recipe, **options).model.build()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_is_converted_on_the_meta_device():
    from torchtitan.models.common.linear import Linear as Theirs

    model = built("tensorwise")
    model.verify_module_protocol()
    kinds = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    assert len(kinds) == 6 * 5 and all(isinstance(m, Theirs) for m in kinds.values())
    report = qv.convert_report(model)
    assert set(report.converted) == set(kinds) and report.share == 1
    assert type(model.lm_head) is Theirs and report.left["lm_head"]
    qv.restore(model)
    assert all(type(m) is Theirs for m in model.modules() if isinstance(m, nn.Linear))


def test_coat_finds_norms_and_mlps():
    found = [type(m) for m in built("coat", torch.bfloat16).modules()]
    assert sum(issubclass(k, Norm) for k in found) == 12
    assert sum(issubclass(k, MLP) for k in found) == 6


def test_a_mixture_of_experts_keeps_its_routers():
    left = qv.convert_report(built("tensorwise", model="deepseek_v3")).left
    routers = [n for n in left if n.endswith("router.gate")]
    assert routers and all("chooses between experts" in left[n] for n in routers)


def test_a_config_keeps_its_class_and_its_json():
    plain = spec("bf16").model
    from torchtitan.models.llama3 import Llama3Model

    assert isinstance(plain, Llama3Model.Config)
    assert json.loads(json.dumps(plain.to_dict()))["quaver"]["recipe"] == "bf16"
    assert json.loads(json.dumps(titan.adamw(1e-3, **CODES).to_dict()))["exp_avg"] == "e4m3-tensor"


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(ValueError, match="fp8lm-o2 keeps f16 masters"):
        spec("fp8lm-o2")
    with pytest.raises(ValueError, match=r"parameters of torch.bfloat16 and torch.float32"):
        built("coat")
    with pytest.raises(ValueError, match="no module of the model is called 'lm_haed'"):
        built("tensorwise", skip=["lm_haed"])
    from torchtitan.config import ParallelismConfig
    from torchtitan.trainer import Trainer

    made = spec("tensorwise")
    job = Trainer.Config(model_spec=made, parallelism=ParallelismConfig(tensor_parallel_degree=2))
    with pytest.raises(ValueError, match=r"set parallelism.tensor_parallel_degree=1"):
        made.model.update_from_config(config=job)
    config = titan.adamw(1e-3)
    config.implementation = "fused_opt_states_bf16"
    with pytest.raises(ValueError, match="is for torch's Adam"):
        config.build(model_parts=[nn.Linear(16, 16)])
    with pytest.raises(ValueError, match="exp_avg must be one of"):
        titan.adamw(1e-3, exp_avg="e4m4").build(model_parts=[nn.Linear(16, 16)])


def test_the_container_steps_as_adamw_does():
    torch.manual_seed(0)
    model, twin = nn.Linear(16, 16), nn.Linear(16, 16)
    twin.load_state_dict(model.state_dict())
    mine = titan.adamw(1e-2, weight_decay=0.0, **CODES).build(model_parts=[model])
    recipe = mine.optimizers[0].recipe
    assert (recipe.exp_avg, recipe.exp_avg_sq) == ("e4m3-tensor", "f16-tensor")
    alone = qv.AdamW(twin.parameters(), 1e-2, weight_decay=0.0, recipe=recipe)
    for _ in range(3):
        for m in (model, twin):
            m(torch.ones(4, 16)).square().sum().backward()
        for o in (mine, alone):
            o.step()
            o.zero_grad()
    assert torch.equal(model.weight, twin.weight)


def _whole(model):
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
            for n, p in model.named_parameters()}  # fmt: skip


def _train(rank, folder, runs):
    """{name: (held-out loss, that of the resumed run, whether its weights have the same bits)}."""
    import torch.distributed as dist

    main = runpy.run_path(str(EXAMPLE))["main"]
    found = {"plain": main(None, STEPS, f"{folder}/plain")[0]}
    for name, (recipe, states) in runs.items():
        mine = f"{folder}/{name}"
        loss, model = main(recipe, STEPS, mine, **states)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(f"{mine}/checkpoint/step-{STEPS}")
        dist.barrier()
        again, resumed = main(recipe, STEPS, mine, resume=True, **states)
        one, two = _whole(model), _whole(resumed)
        found[name] = loss, again, all(torch.equal(one[n], two[n]) for n in one)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_learns_as_plain_torchtitan_and_resumes_bit_for_bit(ranks, tmp_path):
    runs = {"tensorwise": ("tensorwise", CODES)} | ({"coat": ("coat", {})} if ranks == 1 else {})
    for found in run(ranks, _train, str(tmp_path), runs, timeout=TIMEOUT):
        wanted = found.pop("plain")
        assert wanted < 1.25, "8 before the first step, 1.10 at best"
        for name, (loss, again, same) in found.items():
            assert abs(loss / wanted - 1) < 0.01, name
            assert again == loss and same, name
