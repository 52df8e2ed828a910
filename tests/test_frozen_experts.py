"""Stacks of experts that do not train, as FP8 codes alone."""

import copy
import itertools

import pytest
import ranks
import torch
from helpers import assert_same, bits, randn
from test_experts import TOKENS, causal, grouped
from torch.distributed.fsdp import fully_shard

import quaver as qv
from quaver import recipe
from quaver.nn.experts import Experts
from quaver.nn.weight import freeze_weight
from quaver.tensor import ScaledTensor

RECIPES = ("tensorwise", "rowwise", "blockwise", "fp8lm-o2", "coat")
NAME = "model.layers.0.mlp.experts"


def frozen(family="Qwen3Moe", name="tensorwise", seed=0, **sizes):
    model = causal(family, seed, **sizes).requires_grad_(False)
    return qv.convert(model, name, frozen="fp8")


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("ends", [[5, 5, 21, 40], [0, 0, 0, 40]])
def test_the_product_is_that_of_a_frozen_layer_for_each_expert(ends, input_major, name):
    x = randn(40, 144).requires_grad_()
    weights = randn(4, 136, 144, seed=1)
    stored = weights.transpose(1, 2).contiguous() if input_major else weights
    stack = freeze_weight(torch.nn.Parameter(stored, False), recipe.get(name).linear)
    assert isinstance(stack, ScaledTensor) and not stack.requires_grad
    dy = randn(40, 136, seed=2)
    y = grouped(x, stack, ends, input_major, name)
    y.backward(dy)
    decoded = stack.dequantize()
    for expert, (begin, end) in enumerate(itertools.pairwise((0, *ends))):
        if begin == end:
            continue
        w = decoded[expert].t() if input_major else decoded[expert]
        assert ((w - weights[expert]).norm() / weights[expert].norm()).item() < 2.0**-5
        # x and dy err by their own codes, and the transpose of codes with scales of rows is cast
        # again: by at most 2^-4 of each value (dy of tensorwise, e5m2: 2^-3), root mean square a
        # third of the square.
        wanted = x.detach()[begin:end] @ w.t(), dy[begin:end] @ w
        for mine, true in zip((y[begin:end].detach(), x.grad[begin:end]), wanted, strict=True):
            assert ((mine - true).norm() / true.norm()).item() < 2.0**-3 / 3**0.5


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3", "GptOss"])
def test_a_byte_a_weight_and_the_loss_of_the_decoded_model(family, name):
    plain = causal(family).requires_grad_(False)
    model = qv.convert(copy.deepcopy(plain), name, frozen="fp8")
    report = qv.convert_report(model)
    assert report.share >= 0.85 and "experts" in report.converted.values()
    for module in model.modules():
        if isinstance(module, Experts):
            for stack in (module.gate_up_proj, module.down_proj):
                assert isinstance(stack, ScaledTensor) and stack.qdata.element_size() == 1
    with torch.no_grad():
        wanted = plain(input_ids=TOKENS, labels=TOKENS).loss.item()
        found = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    assert found == pytest.approx(wanted, rel=0.01)
    embeddings = model.get_input_embeddings().requires_grad_()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert embeddings.weight.grad.isfinite().all() and embeddings.weight.grad.any()


@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
def test_bytes_of_a_stack_of_real_width(name):
    stack = freeze_weight(torch.nn.Parameter(randn(4, 256, 768), False), recipe.get(name).linear)
    assert sum(part.nbytes for part in stack.parts().values()) <= 1.02 * stack.numel()


@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_state_dicts_copies_and_files_keep_the_codes(family, name, tmp_path):
    model, other = frozen(family, name), frozen(family, name, seed=1)
    other.load_state_dict(model.state_dict())
    again = copy.deepcopy(model)
    third = frozen(family, name, seed=2)
    qv.save(tmp_path / "model.qv", model)
    qv.load(tmp_path / "model.qv", third)
    for found in (other, again, third):
        pairs = zip(model.named_parameters(), found.named_parameters(), strict=True)
        for (key, mine), (_, theirs) in pairs:
            if isinstance(mine, ScaledTensor):
                assert_same(bits(mine.qdata), bits(theirs.qdata), key)
                assert_same(mine.scale, theirs.scale, key)
    values = model.state_dict()[f"{NAME}.down_proj"]
    plain = causal(family, seed=3)
    plain.get_submodule(NAME).load_state_dict({
        key.removeprefix(f"{NAME}."): value for key, value in model.state_dict().items()
        if key.startswith(NAME) and not key.endswith("_master_scale")
    })  # fmt: skip
    assert torch.equal(plain.get_submodule(NAME).down_proj, values)


def test_restore_and_casts_of_the_model():
    model = frozen().bfloat16()
    stack = model.get_submodule(NAME).down_proj
    assert isinstance(stack, ScaledTensor) and stack.dtype == torch.bfloat16
    assert model(input_ids=TOKENS).logits.isfinite().all()
    decoded = stack.dequantize()
    qv.restore(model)
    stack = model.get_submodule(NAME).down_proj
    assert type(stack.data) is torch.Tensor and torch.equal(stack, decoded)


def test_writes_are_refused_and_a_second_conversion_is_none():
    model = frozen()
    stack = model.get_submodule(NAME).down_proj
    with pytest.raises(RuntimeError, match="frozen"), torch.no_grad():
        stack.add_(1.0)
    assert qv.convert(model, "tensorwise", frozen="fp8") is model
    with pytest.raises(ValueError, match="converted by another recipe"):
        qv.convert(model, "blockwise", frozen="fp8")


def test_watch_measures_codes():
    model = frozen()
    model.get_input_embeddings().requires_grad_()
    watch = qv.watch(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found = watch.step()[NAME]
    stack = model.get_submodule(NAME).down_proj
    assert found["down_proj.weight"]["amax"] == stack.dequantize().abs().max().item()
    model.get_submodule(NAME).plain = True
    assert model(input_ids=TOKENS).logits.isfinite().all()


def _sharded(rank, shard):
    refused = []
    for name, skip in (("tensorwise", ()), ("blockwise", ("*.experts", "lm_head"))):
        model = causal("Qwen3Moe").requires_grad_(False)
        qv.convert(model, name, frozen="fp8", **({"skip": skip} if skip else {}))
        model.get_input_embeddings().requires_grad_()
        try:
            shard(model)
        except ValueError as error:
            refused.append(str(error))
    return refused


def _quavers(model):
    return qv.distributed.fully_shard(model, gradient="f32")


@pytest.mark.parametrize("shard", [_quavers, fully_shard])
def test_fsdp2_refuses_to_cut_codes_with_several_scales(shard):
    """It would decode them, to four times the bytes."""
    for refused in ranks.run(2, _sharded, shard):
        assert len(refused) == 2
        assert "gate_up_proj of a " in refused[0] and "weight of a Linear" in refused[1]
        assert all("frozen codes with several scales" in text for text in refused)
