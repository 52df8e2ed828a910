"""Accelerate over a converted model: prepare, accumulate, clip, save_state and load_state."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from rank_pool import run
from small import RECIPES, Text, assert_computes_with, llama, mlp, plain, values

import quaver as qv

pytestmark = pytest.mark.slow

OPTIMIZERS = {
    "torch": lambda p, recipe: torch.optim.AdamW(p, lr=3e-3),
    "quaver": lambda p, recipe: qv.AdamW(p, lr=3e-3, recipe=recipe),
}


def prepared(recipe, make, seed=0):
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        step_scheduler_with_optimizer=False,
    )
    model = llama(recipe, seed=seed)
    optimizer = OPTIMIZERS[make](model.parameters(), recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    loader = torch.utils.data.DataLoader(Text(32), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, schedule, loader)


def epoch(accelerator, model, optimizer, schedule, loader):
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_is_saved_and_resumed(recipe, make, safe, tmp_path):
    run = prepared(recipe, make)
    first = epoch(*run)
    run[0].save_state(str(tmp_path), safe_serialization=safe)
    expected = epoch(*run)
    assert expected[-1] < 0.8 * first[0]
    again = prepared(recipe, make, seed=1)
    again[0].load_state(str(tmp_path))
    assert epoch(*again) == expected
    for (name, a), b in zip(run[1].named_parameters(), again[1].parameters(), strict=True):
        assert torch.equal(plain(a), plain(b)), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_unwrapped_and_saved(recipe, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(mlp(recipe))
    accelerator.save_model(model, str(tmp_path))
    state = accelerator.get_state_dict(model)
    other = accelerator.unwrap_model(model)
    again = mlp(recipe, seed=1)
    again.load_state_dict(state)
    assert all(torch.equal(p, values(other)[n]) for n, p in values(again).items())
    assert_computes_with(again, values(other))


# FSDP2


def _fsdp2(recipe, make, kind, seed):
    """The prepared parts of a run."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type=kind,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    model = llama(recipe, seed=seed)
    optimizer = FSDP2[make](model.parameters(), recipe)
    loader = torch.utils.data.DataLoader(Text(32), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


FSDP2 = OPTIMIZERS | {
    "codes": lambda p, recipe: qv.AdamW(p, lr=3e-3, recipe=replace(
        qv.recipe.get(recipe), exp_avg="e4m3-tensor", exp_avg_sq="f16-tensor", plain_moments=True
    )),
}  # fmt: skip


@contextmanager
def named_gpus():
    """Accelerate ignores its plugin on a CPU, so the ranks are named GPUs' here; everything after
    that is its own."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _fsdp2_epoch(accelerator, model, optimizer, loader):
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _fsdp2_run(rank, recipe, make, kind, folder):
    with named_gpus():
        whole = _fsdp2(recipe, make, kind, seed=0)
        first = _fsdp2_epoch(*whole)
        whole[0].save_state(folder)
        wanted = _fsdp2_epoch(*whole)
        again = _fsdp2(recipe, make, kind, seed=1)
        again[0].load_state(folder)
        found = _fsdp2_epoch(*again)
        one, two = ([p.full_tensor() for p in run[1].parameters()] for run in (whole, again))
        same = all(map(torch.equal, one, two))
        report = qv.memory_report(whole[1], whole[2].optimizer)
        return first, wanted, found, same, report["bytes_per_param"]


@pytest.mark.parametrize(
    ("recipe", "make", "kind"),
    [
        (None, "torch", "SHARDED_STATE_DICT"),
        ("tensorwise", "torch", "SHARDED_STATE_DICT"),
        ("tensorwise", "codes", "SHARDED_STATE_DICT"),
        ("tensorwise", "codes", "FULL_STATE_DICT"),
        ("coat", "codes", "SHARDED_STATE_DICT"),
    ],
)
def test_a_sharded_state_is_saved_and_resumed(recipe, make, kind, tmp_path):
    plain = run(2, _fsdp2_run, None, "torch", "SHARDED_STATE_DICT", str(tmp_path / "plain"))
    found = run(2, _fsdp2_run, recipe, make, kind, str(tmp_path / "run"))
    for (_, best, *_), (first, wanted, resumed, same, kept) in zip(plain, found, strict=True):
        assert wanted[-1] < 0.8 * first[0] and abs(wanted[-1] / best[-1] - 1) < 0.1
        assert resumed == wanted and same
        if make == "codes":  # 1 and 2 bytes, and a scale a tensor
            assert kept["exp_avg"] < 1.1 and kept["exp_avg_sq"] < 2.1


def _refused(rank, recipe, make):
    try:
        with named_gpus():
            _fsdp2_epoch(*_fsdp2(recipe, make, "SHARDED_STATE_DICT", seed=0))
    except (RuntimeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fp8lm-o2", "under Accelerate's FSDP2 use a recipe of plain weights"),
        ("coat", "which FSDP2's shards would cut; wanted f32, or one scale a tensor"),
    ],
)
def test_what_fsdp2_would_cut_is_refused_by_name(recipe, message):
    assert all(message in text for text in run(2, _refused, recipe, "quaver"))
