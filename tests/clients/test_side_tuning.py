"""Side tuning of transformers' models: the start, generation, classifiers, the Trainer, sizes."""

import pytest
import small
import torch
import transformers

import quaver as qv

SIZES = {"vocab_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
POSITIONS = {"max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 96}
MODELS = {
    "Llama": WIDE | {"num_key_value_heads": 2},
    "Mistral": WIDE | {"num_key_value_heads": 2, "sliding_window": 8},
    "Qwen2": WIDE | {"num_key_value_heads": 2},
    "GPT2": {"n_embd": 64, "n_positions": 64},
    "OPT": {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "Phi": WIDE,
    "Gemma": WIDE | {"num_key_value_heads": 1, "head_dim": 32},
}


def build(family, kind="CausalLM", **changes):
    torch.manual_seed(0)
    positions = {} if family == "GPT2" else POSITIONS
    config = getattr(transformers, f"{family}Config")(
        **SIZES | TOKENS | positions | MODELS[family] | changes
    )
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return auto.from_config(config).eval()


def tokens(length=12, seed=0):
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(seed))


def mixed(model):
    """Takes a side-tuned model away from its start."""
    torch.manual_seed(7)
    with torch.no_grad():
        model.side_network.alpha.uniform_(0.2, 0.6)
        for p in model.side_network.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_every_family_starts_at_its_own_output_and_learns(family):
    plain = build(family)
    wanted = plain(tokens()).logits
    model = qv.side_tune(plain, reduction=2, adapter=4, backbone="keep")
    assert torch.equal(model(tokens()).logits, wanted)
    model = qv.side_tune(build(family), reduction=2, adapter=4)
    optimizer = torch.optim.AdamW(model.side_parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("family", MODELS)
def test_generation_with_and_without_a_cache(family):
    model = mixed(qv.side_tune(build(family), reduction=2, adapter=4))
    assert not torch.equal(model(tokens()).logits, build(family)(tokens()).logits)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    for options in ({}, {"num_beams": 3}, {"attention_mask": mask}):
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None} | options
        with_cache, without = (
            model.generate(tokens(), use_cache=use, **options) for use in (True, False)
        )
        assert torch.equal(with_cache, without) and with_cache.shape == (2, 28)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT2"])
def test_masks_of_eager_attention_fit_the_side_blocks(family):
    model = mixed(qv.side_tune(build(family).bfloat16(), reduction=2, adapter=4))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    wanted = model(tokens(), attention_mask=mask).logits
    model.set_attn_implementation("eager")
    got = model(tokens(), attention_mask=mask).logits
    assert model.side_network.config._attn_implementation == "eager"
    torch.testing.assert_close(got[1], wanted[1], atol=0.1, rtol=0.1)
    torch.testing.assert_close(got[0, 3:], wanted[0, 3:], atol=0.1, rtol=0.1)


def test_a_gradient_of_the_embedding_is_cut():
    model = mixed(qv.side_tune(build("Llama"), reduction=2, adapter=4))
    x = torch.randn(1, 5, 64, requires_grad=True)
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is None


def test_a_cache_of_fixed_size_is_refused():
    model = qv.side_tune(build("Llama"), reduction=2, adapter=4)
    with pytest.raises(ValueError, match=r"a StaticCache has no room .* pass a DynamicCache"):
        model.generate(tokens(), max_new_tokens=4, cache_implementation="static")


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "GPT2", "OPT", "Phi", "Gemma"])
def test_classifiers_train_and_save_their_head(family, tmp_path):
    plain = build(family, "SequenceClassification", num_labels=3)
    wanted = plain(tokens()).logits
    model = qv.side_tune(plain, reduction=2, adapter=4, backbone="keep")
    assert torch.equal(model(tokens()).logits, wanted)
    optimizer = torch.optim.AdamW(model.side_parameters(), lr=0.02)
    for _ in range(5):
        loss = model(tokens(), labels=torch.tensor([0, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    twin = build(family, "SequenceClassification", num_labels=3)
    with torch.no_grad():
        twin.score.weight.normal_()
    twin = qv.side_tune(twin, reduction=2, adapter=4, backbone="keep")
    twin.load(tmp_path)
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    assert not torch.equal(model(tokens()).logits, wanted)


def test_the_trainer_tunes_and_saves(tmp_path):
    model = qv.side_tune(small.llama(), reduction=2, adapter=4)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=0.01,
        save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = transformers.Trainer(model, arguments, train_dataset=small.Text())
    trainer.train()
    twin = qv.side_tune(small.llama(), reduction=2, adapter=4)
    twin.load(tmp_path / "checkpoint-8")
    x = small.Text()[0]["input_ids"][None]
    assert torch.equal(twin(x).logits, model(x).logits)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())


def test_checkpointing_of_the_blocks_is_refused():
    model = qv.side_tune(build("Llama"), reduction=2, adapter=4).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call model.gradient_checkpointing_disable"):
        model(tokens())


@pytest.mark.parametrize(("family", "heads", "reduction", "reason"), [
    ("Llama", {}, 8, "does not divide the 4 attention heads; take one of 2, 4"),
    ("GPT2", {"n_head": 2}, 4, "does not divide the 2 attention heads; take one of 2"),
])  # fmt: skip
def test_heads_that_are_not_divided_are_named(family, heads, reduction, reason):
    heads = {"num_attention_heads": heads["n_head"]} if heads else {}
    with pytest.raises(ValueError, match=reason):
        qv.side_tune(build(family, **heads), reduction=reduction)


def test_models_of_other_kinds_are_named():
    config = transformers.BertConfig(**SIZES | WIDE)
    with pytest.raises(ValueError, match="BertForMaskedLM has 0 norms beside its blocks"):
        qv.side_tune(transformers.BertForMaskedLM(config), reduction=2)
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, vocab_size=64, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has several lists"):
        qv.side_tune(transformers.T5ForConditionalGeneration(config), reduction=2)


def test_parameters_and_bytes_of_llama_2_7b():
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, torch_dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    linear = sum(m.weight.numel() for m in model.model.layers.modules()
                 if isinstance(m, torch.nn.Linear))  # fmt: skip
    model = qv.side_tune(model)
    ours = sum(p.numel() for p in model.side_parameters())
    layers = [m for m in model.modules() if isinstance(m, qv.nn.FrozenLinear)]
    frozen = sum(layer.nbytes for layer in layers) / linear
    print(f"{ours:,} side parameters, {frozen:.5f} bytes a frozen weight")
    # 32 downsamplers of two matrices without bias and a LayerNorm, gates as vectors, 32 blocks, a
    # norm, an upsampler with bias and a mix as a vector.
    block = 4 * 256**2 + 3 * 256 * 688 + 2 * 256
    down = 16 * (4096 + 256) + 2 * 256
    assert 32 * (block + down + 256) + 256 + 257 * 4096 + 4096 == 28_623_104
    assert ours == 28_623_104 and len(layers) == 7 * 32 and frozen <= 0.5163
