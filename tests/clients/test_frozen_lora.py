"""PEFT's LoRA over a base whose weights are FP8 codes, 1 byte each, and nothing else."""

import peft
import pytest
import torch
import transformers
from rank_pool import run
from small import RECIPES, Text, distance, llama, plain
from test_trainer import losses as losses_of
from test_trainer import trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import quaver as qv

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = Text(4).tokens
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def adapted(recipe=None, adapters_first=False, seed=0):
    """LoRA over a bf16 base, or over a frozen FP8 one, with the same adapters."""
    base = llama(seed=seed).bfloat16()
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS)
    if recipe is not None and not adapters_first:
        base.requires_grad_(False)
        qv.convert(base, recipe, frozen="fp8")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    if recipe is not None and adapters_first:
        qv.convert(model, recipe, frozen="fp8")
    return model


def train(model, steps=10):
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float().clone()


def codes(model):
    """{name: codes} of the weights that are nothing else."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p
        for name, p in model.named_parameters()
        if isinstance(p, qv.ScaledTensor)
    }


@pytest.mark.parametrize("adapters_first", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_byte_a_weight_and_the_losses_of_a_bf16_base(recipe, adapters_first):
    wanted = train(adapted())
    model = adapted(recipe, adapters_first)
    frozen = codes(model)
    assert len(frozen) == 2 * 7
    before = {name: p.qdata.clone() for name, p in frozen.items()}
    stored = sum(part.nbytes for p in frozen.values() for part in p.parts().values())
    assert stored <= 1.02 * sum(p.numel() for p in frozen.values())
    losses = train(model)
    report = qv.memory_report(model)
    assert report["weight_fp8"] == 0 and report["bytes_per_param"]["weight"] <= 1.02
    assert losses == pytest.approx(wanted, rel=0.01) and losses[-1] < losses[0] - 0.3
    for name, p in codes(model).items():
        assert p.grad is None and p.qdata.dtype == E4M3
        assert torch.equal(p.qdata.view(torch.uint8), before[name].view(torch.uint8))
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 2 * 3
    assert all(type(p.data) is torch.Tensor and p.requires_grad for p in adapters)


def test_forward_and_backward_multiply_by_the_same_codes():
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).requires_grad_(False)
    qv.convert(layer, "tensorwise", frozen="fp8")
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 48)
    y = layer(x)
    y.backward(dy)
    w = qv.quantize(torch.empty(48, 64).copy_(layer.weight)).dequantize()
    assert torch.equal(w, plain(layer.weight))
    # Sums of 64 and 48 products in f32, in free order.
    wanted = qv.quantize(x.detach(), E4M3).dequantize() @ w.t() + layer.bias
    torch.testing.assert_close(y, wanted, rtol=0, atol=64 * 2.0**-24 * 30)
    wanted = qv.quantize(dy, E5M2).dequantize() @ w
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=48 * 2.0**-24 * 30)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_codes_is_refused_and_changes_nothing(safe):
    model = adapted("tensorwise")
    wanted = logits(model)
    with pytest.raises(RuntimeError, match=r"3 bits of mantissa.*call quaver.restore\(model\)"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(model), wanted)


def test_restore_makes_merging_exact_to_bf16():
    """Merged into FP8 codes an adapter would be rounded to 3 bits of mantissa."""
    model = adapted("tensorwise")
    train(model)
    wanted = logits(model)
    qv.restore(model)
    assert not codes(model)
    merged = model.merge_and_unload()
    assert all(p.dtype == torch.bfloat16 for p in merged.parameters())
    assert distance(logits(merged), wanted) < 0.06  # activations are bf16 now, not e4m3


@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_and_bases_are_saved_and_read_back(recipe, tmp_path):
    model = adapted(recipe)
    train(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = llama().bfloat16().requires_grad_(False)
    qv.convert(base, recipe, frozen="fp8")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert distance(logits(again), wanted) < 0.02
    qv.save(tmp_path / "state", model)
    other = adapted(recipe, seed=5)
    qv.load(tmp_path / "state", other)
    assert torch.equal(logits(other), wanted)
    other = adapted(recipe, seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_trainer_resumes_to_the_same_losses(recipe, tmp_path):
    whole = trainer(adapted(recipe), tmp_path, max_steps=8, save_steps=4)
    whole.train()
    expected = losses_of(whole)
    assert expected[-1] < expected[0]
    assert not list(tmp_path.glob("checkpoint-4/model*"))  # the adapter alone
    again = trainer(adapted(recipe), tmp_path / "again", max_steps=8, save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses_of(again) == expected
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(plain(a), plain(b)), name


def _sharded(rank):
    from torch.distributed.fsdp import fully_shard

    model = adapted("tensorwise").float()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return train(model, steps=4)


@pytest.mark.slow
def test_fsdp2_gathers_the_codes():
    wanted = train(adapted("tensorwise").float(), steps=4)
    assert run(2, _sharded) == [wanted, wanted]


def test_an_fp8_folder_gives_its_own_codes(tmp_path):
    base = llama().requires_grad_(False)
    qv.convert(base, "tensorwise", frozen="fp8")
    qv.export(base, tmp_path / "out", "fp8-tensor")
    again = qv.load_pretrained(tmp_path / "out").requires_grad_(False)
    qv.convert(again, "tensorwise", frozen="fp8")
    a, b = codes(base), codes(again)
    assert a.keys() == b.keys() and len(a) == 2 * 7
    for name, p in a.items():
        assert torch.equal(p.detach().dequantize(torch.float32),
                           b[name].detach().dequantize(torch.float32))  # fmt: skip


def test_gpt2_of_conv1d():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel(config).requires_grad_(False)
    twin = logits(base)
    qv.convert(base, "tensorwise", frozen="fp8")
    assert len(codes(base)) == 4 and distance(logits(base), twin) < 0.15
    x = torch.randn(2, 8, 64, requires_grad=True)
    base.transformer.h[0].mlp(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"every linear layer trains; call model\.requires_grad_"):
        qv.convert(llama(), "tensorwise", frozen="fp8")
    for wrong in ("nf4", True, "FP8"):
        with pytest.raises(ValueError, match='frozen must be "fp8" or None'):
            qv.convert(llama().requires_grad_(False), "tensorwise", frozen=wrong)
    with pytest.raises(ValueError, match=r"recipe 'bf16' has no FP8 linear layers"):
        qv.convert(llama().requires_grad_(False), "bf16", frozen="fp8")
    model = qv.convert(llama().requires_grad_(False), "tensorwise", frozen="fp8")
    assert qv.convert(model, "tensorwise", frozen="fp8") is model
    with pytest.raises(ValueError, match="converted by another recipe; restore it first"):
        qv.convert(model, "coat")
    half = llama()
    half.model.layers[0].requires_grad_(False)
    qv.convert(half, "tensorwise", frozen="fp8")
    report = qv.convert_report(half)
    assert len(report.converted) == 7
    assert report.left["model.layers.1.mlp.up_proj"] == "it trains"
