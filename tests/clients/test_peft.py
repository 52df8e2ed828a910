"""PEFT over a converted model: adapters train, and merging them changes what the model computes."""

import peft
import pytest
import torch
from small import RECIPES, Text, distance, llama, plain

import quaver as qv

pytestmark = pytest.mark.slow

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = Text(4).tokens


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float().clone()


def train(model, steps=8):
    """By torch's own optimizer, as PEFT's users do; returns the losses."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(recipe, seed=0, **options):
    base = llama(recipe, seed=seed)
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS, **options)
    return peft.get_peft_model(base, config)


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_train_and_merge(recipe, kind):
    twin = logits(llama())
    model = adapted(recipe, **KINDS[kind])
    assert distance(logits(model), twin) < 0.15, "an adapter starts as nothing"
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    trained = logits(model)
    assert distance(trained, twin) > 0.25
    for safe in (False, True):
        merged = _copy(model, recipe, kind).merge_and_unload(safe_merge=safe)
        assert distance(logits(merged), trained) < 0.15, f"safe_merge={safe}"
        assert not any("lora" in name for name, _ in merged.named_modules())


def _copy(model, recipe, kind):
    """The same adapted model anew, by PEFT's own way: the adapter's state dict."""
    again = adapted(recipe, **KINDS[kind])
    with torch.no_grad():
        for a, b in zip(again.parameters(), model.parameters(), strict=True):
            a.copy_(b.detach())
    return again


@pytest.mark.parametrize("recipe", RECIPES)
def test_merge_adapter_and_unmerge_adapter(recipe):
    model = adapted(recipe)
    train(model)
    trained = logits(model)
    model.merge_adapter()
    assert distance(logits(model), trained) < 0.15
    model.unmerge_adapter()
    assert distance(logits(model), trained) < 0.15
    with model.disable_adapter():
        assert distance(logits(model), trained) > 0.2


@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_over_which_convert_is_called(recipe):
    """Adapters first, then convert: the base's layers become FP8, the adapters stay trainable."""
    base = llama()
    model = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    qv.convert(model, recipe)
    frozen = {n: plain(p) for n, p in model.named_parameters()
              if not p.requires_grad}  # fmt: skip
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(plain(parameter), frozen[name]), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_adapter_is_saved_and_read_back(recipe, tmp_path):
    model = adapted(recipe)
    train(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(recipe), tmp_path)
    assert distance(logits(again), wanted) < 0.02
