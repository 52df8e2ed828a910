"""An unmodified Hugging Face model: convert, train, save, load, and back to plain weights."""

import pytest
import torch
from torch import nn

import quaver as qv
from quaver import recipe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FP8 = [name for name in recipe.names() if recipe.get(name).linear is not None]


def make(name, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = qv.convert(transformers.LlamaForCausalLM(config), recipe=name)
    return model, qv.AdamW(model.parameters(), lr=3e-3, recipe=name)


def step(model, optimizer, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    qv.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FP8)
def test_llama_trains_saves_loads_and_goes_back(name, tmp_path):
    model, optimizer = make(name)
    linear = [m for m in model.modules() if isinstance(m, qv.nn.Linear)]
    assert len(linear) == 2 * 7  # q, k, v, o, gate, up, down; the head is skipped
    losses = [step(model, optimizer, TOKENS) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]

    path = tmp_path / "state.safetensors"
    qv.save(path, model, optimizer, step=12)
    expected = [step(model, optimizer, TOKENS) for _ in range(3)]
    model, optimizer = make(name, seed=1)
    assert qv.load(path, model, optimizer)["step"] == 12
    assert [step(model, optimizer, TOKENS) for _ in range(3)] == expected

    decoded = {
        key: value.dequantize() if isinstance(value, qv.ScaledTensor) else value.clone()
        for key, value in model.state_dict().items()
        if not key.endswith("_history")
    }
    qv.restore(model)
    assert not any(isinstance(m, qv.nn.Linear) for m in model.modules())
    plain = model.state_dict()
    assert plain.keys() == decoded.keys()
    for key, value in plain.items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, decoded[key])

    # What was trained in FP8 is an ordinary model that the library saves and loads.
    model.save_pretrained(tmp_path / "plain")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(type(m) is nn.Linear for m in again.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)


@pytest.mark.parametrize("name", FP8)
def test_fp8_starts_with_the_loss_of_the_plain_model(name):
    losses = []
    for which in ("bf16", name):
        model, _ = make(which)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            losses.append(model(input_ids=TOKENS, labels=TOKENS).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
