"""Accelerate over a converted model: prepare, accumulate, clip, save_state and load_state."""

import pytest
import torch
from accelerate import Accelerator
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
