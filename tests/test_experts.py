"""Stacks of experts with FP8 products, of transformers' mixtures."""

import copy

import pytest
import torch
import transformers
from helpers import assert_same, bits, randn
from torch import nn

import quaver as qv
from quaver import recipe
from quaver.nn.experts import Experts, is_experts
from quaver.nn.grouped import multiply_groups

RECIPES = ("tensorwise", "rowwise", "blockwise", "coat")
TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48,
                 "shared_expert_intermediate_size": 96},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 48, "head_dim": 16},
    "DeepseekV3": {"n_routed_experts": 8, "moe_intermediate_size": 48, "n_group": 2,
                   "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
                   "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
                   "num_key_value_heads": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},  # biases, [E, K, N], a gate of its own
}  # fmt: skip


def causal(family, seed=0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | changes))
    return transformers.AutoModelForCausalLM.from_config(config)


def grouped(x, weight, ends, input_major=False, name="tensorwise", out=torch.float32):
    learns = weight.requires_grad
    rule = recipe.get(name).linear
    return multiply_groups(x, weight, torch.tensor(ends), rule, out, input_major, learns)


@pytest.mark.parametrize("name", RECIPES[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("ends", [[5, 5, 21, 40], [0, 0, 0, 40], [40, 40, 40, 40], [3, 17, 18, 40]])
def test_the_product_is_that_of_one_layer_for_each_expert(ends, input_major, dtype, name):
    x = randn(40, 48, dtype=dtype).requires_grad_()
    weights = randn(4, 24, 48, seed=1, dtype=dtype)
    stored = weights.transpose(1, 2).contiguous() if input_major else weights.clone()
    stored.requires_grad_()
    dy = randn(40, 24, seed=2, dtype=dtype)
    out = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    y = grouped(x, stored, ends, input_major, name, out)
    y.backward(dy)
    dw = stored.grad.transpose(1, 2) if input_major else stored.grad
    for expert, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        if begin == end:
            assert not stored.grad[expert].any()
            continue
        layer = qv.nn.Linear(48, 24, bias=False, dtype=dtype, recipe=name)
        with torch.no_grad():
            layer.weight.copy_(weights[expert])
        own = x.detach()[begin:end].requires_grad_()
        wanted = layer(own)
        wanted.backward(dy[begin:end])
        assert_same(y[begin:end].detach(), wanted.detach())
        assert_same(x.grad[begin:end], own.grad)
        assert_same(dw[expert].contiguous(), layer.weight.grad)


def test_rows_of_no_expert_are_zero():
    x, weights = randn(10, 16).requires_grad_(), randn(2, 16, 16, seed=1)
    y = grouped(x, weights, [4, 7])
    y.sum().backward()
    assert not y[7:].any() and not x.grad[7:].any()
    assert y[:7].any(1).all()
    assert grouped(x[:0], weights, [0, 0]).shape == (0, 16)


@pytest.mark.parametrize("name", RECIPES[:3])
def test_a_nan_stays_with_its_expert(name):
    x = randn(12, 16)
    x[3, 5] = torch.inf
    y = grouped(x, randn(3, 16, 16, seed=1), [2, 8, 12], name=name)
    reached = y[2:8] if name == "tensorwise" else y[3:4]
    assert reached.isnan().all()
    assert y[:2].isfinite().all() and y[8:].isfinite().all()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_converts_and_trains(family, name):
    model, twin = causal(family), causal(family)
    keys = list(model.state_dict())
    qv.convert(model, name)
    report = qv.convert_report(model)
    assert "experts" in report.converted.values()
    assert report.share >= 0.85
    assert list(model.state_dict()) == keys
    losses = [[], []]
    for found, m in zip(losses, (model, twin), strict=True):
        options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
        if m is model:
            optimizer = qv.AdamW(m.parameters(), recipe=name, **options)
        else:
            optimizer = torch.optim.AdamW(m.parameters(), **options)
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16):
                loss = m(input_ids=TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[1][-1] < 0.6 * losses[1][0]
    mean = [sum(found[-10:]) / 10 for found in losses]
    assert mean[0] == pytest.approx(mean[1], rel=0.03 if name == "coat" else 0.01)
    qv.restore(model)
    assert not any(isinstance(m, Experts) for m in model.modules())
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in twin.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_transformers_but_for_fp8(family):
    """Inputs and weights that FP8 has exactly; the rest is cast, by at most 2^-4 and 2^-3 of each
    value in e4m3 and e5m2."""
    model = causal(family)
    name, plain = next((n, m) for n, m in model.named_modules() if is_experts(m))
    quarters = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=quarters) / 4)
    ours = qv.convert(copy.deepcopy(model), "tensorwise").get_submodule(name)
    values = torch.randint(-2, 3, (12, 64), generator=quarters) / 2.0
    chosen = torch.tensor([1, 2]).expand(12, 2)  # the others get no token
    weights = randn(12, 2, seed=2).abs()
    found = []
    for module in (plain, ours):
        x = values.clone().requires_grad_()
        y = module(x, chosen, weights)
        y.sum().backward()
        found.append((y.detach(), x.grad, module.down_proj.grad))
    for wanted, got in zip(*found, strict=True):
        error = (got - wanted).abs() / wanted.abs().max()
        assert error.max() <= 2**-3
        assert error.square().mean().sqrt() <= 2**-5


def test_experts_of_other_ranks_give_zeros():
    """transformers' expert parallelism numbers them from num_experts on."""
    model = qv.convert(causal("Mixtral"), "tensorwise")
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    x, weights = randn(6, 64), torch.rand(6, 2)
    chosen = torch.tensor([[0, 4], [4, 4], [1, 2], [3, 4], [4, 0], [2, 3]])
    experts._is_expert_parallel = True
    y = experts(x, chosen, torch.where(chosen < 4, weights, 0.0))
    assert not y[1].any()
    assert y.isfinite().all() and y[[0, 2, 3, 4, 5]].any(1).all()


@pytest.mark.parametrize("name", RECIPES[:3])
def test_no_token_at_all_gives_zero_gradients(name):
    experts = qv.convert(causal("Mixtral"), recipe=name).model.layers[0].mlp.experts
    x = torch.zeros(0, 64, requires_grad=True)
    y = experts(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    assert experts.gate_up_proj.grad.abs().sum() == 0 == experts.down_proj.grad.abs().sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    found = []
    for checkpointing in (False, True):
        model = qv.convert(causal("Qwen3Moe"), "tensorwise").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert torch.equal(bits(grad), bits(found[1][name])), name


def test_a_compiled_model_gives_the_same_loss():
    model = qv.convert(causal("Mixtral"), "tensorwise")
    wanted = model(input_ids=TOKENS, labels=TOKENS).loss
    compiled = torch.compile(model, backend="aot_eager")
    got = compiled(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)
    got.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_saved_and_loaded_bit_for_bit(tmp_path):
    runs = []
    for seed in (0, 1):
        model = qv.convert(causal("Mixtral", seed), "coat")
        runs.append((model, qv.AdamW(model.parameters(), lr=1e-3, recipe="coat")))

    def step(model, optimizer):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(*runs[0])
    qv.save(tmp_path / "run.qv", *runs[0])
    qv.load(tmp_path / "run.qv", *runs[1])
    for run in runs:
        step(*run)
    for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_experts_that_stay_are_named():
    left = {}
    for name in ("fp8lm-o2", "tensorwise"):
        skip = ["lm_head", "*.experts"] if name == "tensorwise" else ("lm_head",)
        model = qv.convert(causal("Mixtral"), name, skip=skip)
        left[name] = qv.convert_report(model).left["model.layers.0.mlp.experts"]
    assert left["tensorwise"] == "it is skipped"
    served = "tensorwise, rowwise, blockwise, coat and coat-blockwise multiply it in FP8"
    assert f"stay plain: {served}" in left["fp8lm-o2"]
    model = causal("Mixtral").requires_grad_(False)
    model.model.layers[0].mlp.experts.down_proj.requires_grad_()
    qv.convert(model, "tensorwise", frozen="fp8")
    assert qv.convert_report(model).left["model.layers.0.mlp.experts"] == "it trains"


def test_another_recipe_is_refused_and_the_same_is_none():
    model = qv.convert(causal("Mixtral"), "tensorwise")
    qv.convert(model, "tensorwise")
    for module in model.modules():
        if isinstance(module, qv.nn.Linear):
            module.__class__ = nn.Linear
    with pytest.raises(ValueError, match="experts was converted by another recipe"):
        qv.convert(model, "coat")


def test_wrong_input_is_refused():
    experts = next(m for m in qv.convert(causal("Mixtral"), "coat").modules()
                   if isinstance(m, Experts))  # fmt: skip
    with pytest.raises(TypeError, match="hidden_states must be float32, float16 or bfloat16"):
        experts(torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 2).long(), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="the input is on meta"):
        experts(torch.zeros(2, 64, device="meta"), torch.zeros(2, 2).long(), torch.ones(2, 2))
