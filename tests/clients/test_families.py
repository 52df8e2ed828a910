"""Families of transformers beside Llama: what is converted trains, what is not is named."""

import pytest
import torch
import transformers
from small import RECIPES, distance, llama, plain
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quaver as qv

pytestmark = pytest.mark.slow

TOKENS = torch.arange(48).reshape(2, 24)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
EXPERTS = {"intermediate_size": 96, "moe_intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES = {
    "GPT2": GPT2,
    "Falcon": SIZES,
    "Mixtral": SIZES | EXPERTS | {"num_local_experts": 4},
    "Qwen2Moe": SIZES | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 96},
    "Qwen3Moe": SIZES | EXPERTS | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "OPT": SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    "Bloom": SIZES | {"n_layer": 2, "n_head": 4},
    "Phi": SIZES | {"intermediate_size": 96},
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
    "GPTNeo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128,
               "attention_types": [[["global"], 2]]},
}  # fmt: skip


def causal(family, seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    for name in ("hidden_dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
                 "dropout", "activation_dropout", "embed_dropout", "resid_dropout"):  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(
        config
    )


def matrices(model):
    """Parameters that are multiplied with activations, by any module: all of two or more axes but
    embeddings' and convolutions'."""
    skipped = (nn.Embedding, nn.Conv1d)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not isinstance(module, skipped) and key != "A_log":
                yield name, key, parameter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_family_trains_and_the_report_names_what_is_left(recipe, family):
    twin, model = causal(family), causal(family)
    if family == "Falcon":  # its linear layers are of a class of its own
        with pytest.raises(ValueError, match="FalconLinear, a linear layer of another kind"):
            qv.convert(model, recipe)
    qv.convert(model, recipe, allow_empty=family == "Falcon")
    report = qv.convert_report(model)
    for name, key, _ in matrices(model):
        converted = report.converted.get(name) in ("linear", "experts")
        named = [n for n in report.left if n in (name, f"{name}.{key}")]
        assert converted != bool(named), f"{name}.{key} is multiplied in {model.dtype}, unnamed"
        if named:
            assert report.left[named[0]]
            assert named[0] in str(report) or "more" in str(report)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert distance(model(TOKENS).logits, twin(TOKENS).logits) < 0.2
    optimizers = [qv.AdamW(model.parameters(), lr=3e-3, recipe=recipe),
                  torch.optim.AdamW(twin.parameters(), lr=3e-3, betas=(0.9, 0.95))]  # fmt: skip
    found = [[], []]
    for losses, m, optimizer in zip(found, (model, twin), optimizers, strict=True):
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                loss = m(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert found[0] == pytest.approx(found[1], abs=0.25)


@pytest.mark.parametrize("recipe", RECIPES)
def test_conv1d_is_a_linear_layer(recipe):
    """GPT-2 keeps its weights transposed: they become FP8 nevertheless, and go back."""
    twin, model = causal("GPT2"), causal("GPT2")
    keys = list(model.state_dict())
    qv.convert(model, recipe)
    kinds = qv.convert_report(model).converted
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert kinds[f"transformer.h.0.{part}"] == "linear"
    state = model.state_dict()
    assert [key for key in keys if key not in state] == []
    for key, value in twin.state_dict().items():
        assert torch.allclose(plain(state[key]), value, rtol=2**-8, atol=1e-6), key
    model.load_state_dict(causal("GPT2", seed=1).state_dict(), strict=False)
    with torch.no_grad():
        wanted = causal("GPT2", seed=1)(TOKENS).logits
        assert distance(model(TOKENS).logits, wanted) < 0.2
    qv.restore(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_flops_are_counted(recipe):
    """FlopCounterMode counts an FP8 product as the plain product of the same shape."""
    counts = []
    for chosen in (None, recipe):
        model = llama(chosen)
        with FlopCounterMode(display=False) as counter:
            model(TOKENS, labels=TOKENS).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_optimizer_of_parameters_that_convert_replaced_warns(recipe):
    """Built before convert, it holds parameters that are no longer the model's."""
    model = llama()
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=recipe)
    old = list(model.parameters())
    qv.convert(model, recipe)
    replaced = any(a is not b for a, b in zip(old, model.parameters(), strict=True))
    model(TOKENS, labels=TOKENS).loss.backward()
    if replaced:
        with pytest.warns(UserWarning, match="convert"):
            optimizer.step()
    else:
        before = plain(model.model.layers[0].mlp.up_proj.weight)
        optimizer.step()
        assert not torch.equal(plain(model.model.layers[0].mlp.up_proj.weight), before)


@pytest.mark.parametrize("recipe", RECIPES)
def test_generation_by_sampling_and_caches(recipe):
    model = llama(recipe).eval()
    one = model.generate(TOKENS[:, :4], max_new_tokens=6, do_sample=False, use_cache=True)
    two = model.generate(TOKENS[:, :4], max_new_tokens=6, do_sample=False, use_cache=False)
    assert one.shape == two.shape == (2, 10)
    assert torch.equal(one[:, :4], TOKENS[:, :4])
