"""An unmodified Hugging Face model: convert, train, save, load, and back to plain weights."""

import pytest
import torch
from torch import nn

import quaver as qv
from quaver import recipe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FP8 = [name for name in recipe.names() if recipe.get(name).linear is not None]


def plain(family="Llama", seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def make(name, seed=0):
    model = qv.convert(plain(seed=seed), recipe=name)
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
        if not key.endswith(("_history", "_master_scale"))
    }
    qv.restore(model)
    assert not any(isinstance(m, qv.nn.Linear) for m in model.modules())
    plain = model.state_dict()
    assert plain.keys() == decoded.keys()
    for key, value in plain.items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, decoded[key])

    # A model trained in FP8 is an ordinary model that the library saves and loads.
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


# Norms of two layers that feed linear layers alone, and MLPs of the forms we know.
FAMILIES = {
    "Llama": (14, 4, 2),
    "Mistral": (14, 4, 2),
    "Qwen2": (14, 4, 2),
    "Qwen3": (14, 4, 2),
    "Gemma": (14, 4, 2),
    "Gemma2": (14, 4, 2),
    "Mixtral": (8, 2, 0),
    "GPTNeoX": (8, 4, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_convert_unmodified_and_train(family):
    changes = {"head_dim": 16} if family.startswith("Gemma") else {}
    model = plain(family, **changes)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        before = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    qv.convert(model, "coat")
    report = qv.convert_report(model)
    kinds = list(report.converted.values())
    assert tuple(kinds.count(kind) for kind in ("linear", "norm", "mlp")) == FAMILIES[family]
    assert all(report.left.values()) and "lm_head" in report.left
    assert all(isinstance(m, t) for m, t in zip(model.modules(), types, strict=True))
    assert list(model.state_dict()) == keys
    optimizer = qv.AdamW(model.parameters(), lr=3e-3, recipe="coat")
    losses = [step(model, optimizer, TOKENS) for _ in range(4)]
    assert losses[0] == pytest.approx(before, rel=0.01) and losses[-1] < 0.9 * losses[0]
    qv.restore(model)
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == keys


@pytest.mark.parametrize("name", FP8)
def test_gpt2_converts_its_conv1d_and_trains(name):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        before = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    qv.convert(model, name)
    kinds = list(qv.convert_report(model).converted.values())
    assert kinds.count("linear") == 2 * 4
    assert kinds.count("norm") == (0 if recipe.get(name).activation is None else 2 * 2)
    gained = ("_history", "_master_scale")
    assert [key for key in model.state_dict() if not key.endswith(gained)] == keys
    optimizer = qv.AdamW(model.parameters(), lr=3e-3, recipe=name)
    losses = [step(model, optimizer, TOKENS) for _ in range(4)]
    assert losses[0] == pytest.approx(before, rel=0.02) and losses[-1] < 0.9 * losses[0]
    qv.restore(model)
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == keys


def test_what_stays_of_other_families_is_named():
    left = {}
    for family in ("Mixtral", "Falcon"):
        model = qv.convert(plain(family), "fp8lm-o2", allow_empty=family == "Falcon")
        left |= qv.convert_report(model).left
    assert (
        "it is a stack of experts, whose weights and gradients stay plain"
        in left["model.layers.0.mlp.experts"]
    )
    assert "MixtralTopKRouter, no linear layer" in left["model.layers.0.mlp.gate"]
    assert (
        "FalconLinear, a linear layer of another kind" in left["transformer.h.1.mlp.dense_4h_to_h"]
    )


def test_under_coat_every_parameter_and_gradient_is_a_plain_tensor():
    model, optimizer = make("coat")
    for _ in range(2):
        step(model, optimizer, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    parameters = list(model.parameters())
    for p in parameters:
        assert type(p) is nn.Parameter and type(p.data) is torch.Tensor
        assert type(p.grad) is torch.Tensor and p.grad.dtype == p.dtype
    addresses = {p.data_ptr() for p in parameters}
    assert 0 not in addresses and len(addresses) == len(parameters)
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())


def test_the_last_norm_and_what_is_no_linear_layer_are_left():
    report = qv.convert_report(qv.convert(plain("Gemma2", head_dim=16), "coat"))
    assert "its readers are unknown" in report.left["model.norm"]
    left = report.left["model.layers.0.post_attention_layernorm"]  # added to the residual stream
    assert left == "add reads it, which is no linear layer"
    assert "model.layers.0.pre_feedforward_layernorm" in report.converted


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_librarys_own_gradient_checkpointing(use_reentrant):
    found = []
    for checkpointing in (False, True):
        model, optimizer = make("coat")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        found.append([step(model, optimizer, TOKENS) for _ in range(3)])
    assert found[0] == found[1]


def test_generation():
    model = qv.convert(plain(), "coat").eval()
    out = model.generate(TOKENS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 8) and torch.equal(out[:, :4], TOKENS[:, :4])


def test_a_block_saves_half_of_what_bf16_does():
    """Of either baseline: the residual stream in f32 under autocast, or a model in bf16."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def measure(name, dtype):
        model = plain(hidden_size=128, intermediate_size=344, max_position_embeddings=128)
        layer, x = model.model.layers[0].to(dtype), torch.randn(1, 128, 128, dtype=dtype)
        position = LlamaRotaryEmbedding(model.config)(x, torch.arange(128)[None])
        qv.convert(layer, name)
        with (
            qv.saved_activations(layer) as saved,
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32),
        ):
            y = layer(x.requires_grad_(), position_embeddings=position)
        y.float().sum().backward()
        return saved.bytes

    assert measure("coat", torch.float32) <= 0.5 * measure("bf16", torch.float32)
    assert measure("coat", torch.bfloat16) <= 0.5 * measure("bf16", torch.bfloat16)
