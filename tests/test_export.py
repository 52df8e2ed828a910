"""Exported folders: transformers reads from them what the model multiplies by."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_same, randn
from safetensors import safe_open
from torch import nn

import quaver as qv
from quaver import exporting, models
from quaver.errors import UsageError
from quaver.hf.formats import FORMATS, encode_blocks
from quaver.nn.weight import cast_weight

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

E4M3 = torch.float8_e4m3fn
FP8 = [name for name in FORMATS if name != "bf16"]
RECIPES = (None, "tensorwise", "blockwise", "fp8lm-o2", "coat")
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def plain(family="Llama", seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def trained(recipe, steps=4, **changes):
    """A model whose blocks and tensors have scales of many sizes, after some steps."""
    model = plain(**changes)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() == 2:
                p.mul_(torch.logspace(-1, 1, p.shape[0])[:, None] * 2.0 ** (i % 3 - 1))
    if recipe is not None:
        qv.convert(model, recipe)
    optimizer = qv.AdamW(model.parameters(), lr=1e-3, recipe=recipe or "bf16")
    for _ in range(steps):
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def stored(folder):
    """All tensors of a folder's safetensors, by their names."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def weights(model):
    """The plain f32 values of every parameter."""
    return {n: torch.empty(p.shape).copy_(p.detach()) for n, p in model.named_parameters()}


def by_blocks(scale, shape):
    """Block scales, repeated over the 128 x 128 that each decodes."""
    rows, columns = scale.repeat_interleave(128, 0), scale.repeat_interleave(128, 1)
    return rows[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]] + 0 * columns[0, 0]


def decoded(tensors, name):
    """What a folder's weight means: the oracle of every reader here."""
    q = tensors[name].float()
    for suffix in ("_scale_inv", "_scale"):
        scale = tensors.get(name + suffix)
        if scale is not None:
            return q * (by_blocks(scale, q.shape) if scale.dim() == 2 else scale)
    return q


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_loads_what_the_model_multiplies_by(recipe, form, tmp_path):
    model = trained(recipe)
    report = qv.export(model, tmp_path / "out", form)
    tensors, config = (
        stored(tmp_path / "out"),
        json.loads((tmp_path / "out/config.json").read_text()),
    )
    again = load(tmp_path / "out", form)
    assert ("quantization_config" in config) == (form != "bf16")
    assert len(report.fp8) == (0 if form == "bf16" else 2 * 7)
    assert report.nbytes == sum(t.nbytes for t in tensors.values())

    # Of the loader: bit for bit what the codes mean. A power of two times e4m3 is exact in bf16;
    # the scales of blockwise training are none.
    own = recipe == "blockwise" and form == "fp8-block"
    loaded = weights(again)
    for name, value in loaded.items():
        meant = decoded(tensors, name)
        assert_same(value, meant.bfloat16().float() if own else meant)
        assert_same(value, value.bfloat16().float())
    # Of the format: to nearest, in e4m3 within 2^-4 of a value or 2^-10 of a scale, in bf16 2^-9.
    for name, value in weights(model).items():
        if name.removesuffix(".weight") not in report.fp8:
            assert ((loaded[name] - value).abs() <= 2.0**-8 * value.abs()).all()
            assert_same(loaded[name], value.bfloat16().float())
            continue
        assert tensors[name].dtype == E4M3
        scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale"))
        assert scale.dtype == torch.float32 and (own or (torch.frexp(scale)[0] == 0.5).all())
        step = by_blocks(scale, value.shape) if scale.dim() == 2 else scale
        error = torch.maximum(value.abs() / 16, step / 1024) + loaded[name].abs() / 512 * own
        assert ((loaded[name] - value).abs() <= error).all()
    # The logits are those of the plain model with these weights; the loss is the model's own within
    # the rounding of activations, which FP8 products have and the loaded model has not.
    twin = plain(seed=1)
    twin.load_state_dict(loaded)
    with torch.no_grad():
        assert_same(again.float()(TOKENS).logits, twin(TOKENS).logits)
        ours, theirs = (m(TOKENS, labels=TOKENS).loss.item() for m in (model, again))
    assert theirs == pytest.approx(ours, rel=0.01)


def load(folder, form, **options):
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("form", ["fp8-tensor", "compressed-tensors"])
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r is not None])
def test_one_scale_exports_the_codes_of_training(recipe, form, tmp_path):
    model = trained(recipe)
    report = qv.export(model, tmp_path / "out", form)
    tensors = stored(tmp_path / "out")
    for name in report.fp8:
        layer = model.get_submodule(name)
        q, scale, _, _ = cast_weight(layer.weight, E4M3, both=False)  # what its products read
        n, k = layer.weight.shape
        found = tensors[f"{name}.weight"]
        assert_same(found.view(torch.uint8), q[:n, :k].view(torch.uint8))
        (key,) = (k for k in tensors if k.startswith(f"{name}.weight_scale"))
        assert tensors[key].item() == scale.item()


def test_blocks_differ_from_the_codes_of_training_where_those_underflow_alone(tmp_path):
    """A power of two does not change the mantissa of an e4m3 that both hold as a normal number."""
    model = trained("fp8lm-o2")
    report = qv.export(model, tmp_path / "out", "fp8-block")
    tensors, finer = stored(tmp_path / "out"), 0
    for name in report.fp8:
        q, scale, _, _ = cast_weight(model.get_submodule(name).weight, E4M3, both=False)
        blocks = tensors[f"{name}.weight_scale_inv"]
        assert (blocks <= scale).all()
        finer += (blocks < scale).sum().item()
        normal = q.float().abs() > 2.0**-6  # that itself may be rounded up to
        value = decoded(tensors, f"{name}.weight")
        assert_same(value[normal], (q.float() * scale)[normal])
    assert finer > 0


@pytest.mark.parametrize(
    "shape", [(128, 256), (1, 1), (96, 130), (300, 64), (129, 127), (256, 513)]
)
def test_blocks_are_those_of_a_loop(shape):
    x = randn(*shape) * torch.logspace(-6, 3, shape[1])
    x[: shape[0] // 2, : shape[1] // 2] = 0
    q, scale = encode_blocks(x)
    assert q.shape == shape and scale.shape == tuple(-(-n // 128) for n in shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            wanted = qv.quantize(x[part].contiguous())
            assert scale[i, j].item() == wanted.scale.item()
            assert_same(q.view(torch.uint8)[part], wanted.qdata.view(torch.uint8))


def test_a_folder_has_the_tensors_that_transformers_gpu_layers_hold(tmp_path):
    """FP8Linear runs on a GPU alone; its parameters exist anywhere."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    for form in ("fp8-block", "fp8-tensor"):
        for family, tied in (("Llama", True), ("Qwen2", False), ("Mixtral", False)):
            out, sizes = tmp_path / form / family, {"hidden_size": 256, "intermediate_size": 96}
            sizes["tie_word_embeddings"] = tied
            qv.export(plain(family, **sizes), out, form)
            described = config_of(out)["quantization_config"]
            config = transformers.FineGrainedFP8Config(**described)
            with torch.device("meta"):
                model = plain(family, **sizes)
            replace_with_fp8_linear(model, config.modules_to_not_convert, config, True)
            wanted = {
                name: (p.shape, p.dtype if p.element_size() == 1 or "scale" in name else None)
                for name, p in model.state_dict().items()
            }
            tensors = stored(out)
            assert any(name.endswith("weight_scale_inv") for name in tensors)
            if family == "Mixtral":  # whose experts a folder has one by one
                wanted = {name: kind for name, kind in wanted.items() if ".mlp." not in name}
                assert "model.layers.0.block_sparse_moe.experts.1.w1.weight" in tensors
                tensors = {n: t for n, t in tensors.items() if ".block_sparse_moe." not in n}
            if tied:
                assert "lm_head.weight_scale_inv" not in wanted
                wanted.pop("lm_head.weight")
            assert tensors.keys() == wanted.keys()
            for name, (shape, dtype) in wanted.items():
                assert tensors[name].shape == shape
                assert tensors[name].dtype == (dtype or torch.bfloat16)


OTHERS = {
    "GPTNeoXForCausalLM": {},
    "DeepseekV3ForCausalLM": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "BertForSequenceClassification": {},
    "NomicBertModel": {},  # whose q, k and v a folder has joined
    "T5ForConditionalGeneration": {"d_model": 64, "d_ff": 128, "num_layers": 1, "d_kv": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_have_the_names_that_transformers_saves(name, tmp_path):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = kind(kind.config_class(**sizes | OTHERS[name]))
    qv.export(model, tmp_path / "out")
    report = qv.export(model, tmp_path / "fp8", "fp8-tensor")
    assert report.fp8
    for folder in ("out", "fp8"):
        _, found = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(found.values())
    model.bfloat16().save_pretrained(tmp_path / "theirs")
    a, b = (stored(tmp_path / folder) for folder in ("out", "theirs"))
    assert a.keys() == b.keys() and all(a[key].bfloat16().equal(b[key].bfloat16()) for key in a)


def test_weights_that_a_folder_has_joined_stay_bf16(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    model = transformers.NomicBertModel(
        transformers.NomicBertConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    )
    report = qv.export(model, tmp_path / "out", "fp8-tensor")
    left = {name for name, why in report.left.items() if "in another form" in why}
    assert {name.rpartition(".")[2] for name in left} == {"q_proj", "k_proj", "v_proj"}
    (joined,) = (t for name, t in stored(tmp_path / "out").items() if name.endswith("Wqkv.weight"))
    layer = model.get_submodule(min(left).rpartition(".")[0])
    wanted = [getattr(layer, f"{part}_proj").weight for part in "qkv"]
    assert_same(joined, torch.cat(wanted).detach().bfloat16())


def test_a_tensor_of_the_model_itself(tmp_path):
    part = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 128}  # fmt: skip
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=part, vision_config=part))
    report = qv.export(model, tmp_path / "out", "fp8-tensor")
    assert len(report.fp8) == 2 * 7 and stored(tmp_path / "out")["logit_scale"].shape == ()
    _, found = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())


def test_sides_that_readers_divide_differently_stay_bf16(tmp_path):
    model = plain(intermediate_size=192)
    report = qv.export(model, tmp_path / "out", "fp8-block")
    assert len(report.fp8) == 2 * 4
    assert report.left["model.layers.0.mlp.down_proj"] == "a side of 192 is no multiple of 128"
    assert "a side of 192" in str(report)
    for name, value in weights(load(tmp_path / "out", "fp8-block")).items():
        assert_same(value, decoded(stored(tmp_path / "out"), name))
    report = qv.export(model, tmp_path / "tensor", "fp8-tensor")
    assert len(report.fp8) == 2 * 7


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_ours_is_a_llama_of_transformers(recipe, tied, tmp_path):
    torch.manual_seed(0)
    sizes = {"dim": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 256, "context": 32}
    model = models.build(models.Config(**sizes, tie_embeddings=tied)).eval()
    if recipe is not None:
        qv.convert(model, recipe)
    for form in FORMATS:
        report = qv.export(model, tmp_path / form, form)
        assert len(report.fp8) == (0 if form == "bf16" else 2 * 7)
        again = load(tmp_path / form, form, dtype=torch.float32)
        assert ("lm_head.weight" in stored(tmp_path / form)) != tied
        with torch.no_grad():
            wanted, got = model(TOKENS), again(TOKENS).logits
        # Two roundings to e4m3 of each product, each of relative variance below 4^-4 / 3.
        assert (got - wanted).norm() < 0.1 * wanted.norm()
        if form == "bf16" and recipe is None:
            assert (got - wanted).norm() < 0.01 * wanted.norm()
    q, scale = (
        stored(tmp_path / "fp8-tensor")[f"model.layers.0.self_attn.k_proj.{n}"]
        for n in ("weight", "weight_scale_inv")
    )
    whole, used, _, _ = cast_weight(model.blocks[0].attention.qkv.weight, E4M3, both=False)
    assert_same(q.view(torch.uint8), whole[128:192].view(torch.uint8))
    assert scale.item() == used.item()


def test_tied_weights_are_stored_once(tmp_path):
    model = trained("coat", tie_word_embeddings=True)
    qv.export(model, tmp_path / "out")
    assert "lm_head.weight" not in stored(tmp_path / "out")
    again = load(tmp_path / "out", "bf16")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"ties lm_head.weight .* set model\.config\.tie"):
        qv.export(model, tmp_path / "untied")
    model.config.tie_word_embeddings = False
    model.tie_weights()


@pytest.mark.parametrize("recipe", RECIPES)
def test_conv1d_is_written_as_it_lies(recipe, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    )
    if recipe is not None:
        qv.convert(model, recipe)
    qv.export(model, tmp_path / "out")
    again = load(tmp_path / "out", "bf16")
    wanted = weights(model)
    for name, value in weights(again).items():
        assert_same(value, wanted[name].bfloat16().float())
    for form in FP8:
        with pytest.raises(ValueError, match=f"{form} holds none .* use "):
            qv.export(model, tmp_path / form, form)
        assert not (tmp_path / form).exists()


def test_heads_gates_and_skipped_layers_are_listed(tmp_path):
    model = plain("Qwen2Moe", moe_intermediate_size=64, shared_expert_intermediate_size=64,
                  num_experts=4, num_experts_per_tok=2)  # fmt: skip
    report = qv.export(model, tmp_path / "moe", "fp8-tensor")
    listed = config_of(tmp_path / "moe")["quantization_config"]["modules_to_not_convert"]
    for name in ("lm_head", "model.embed_tokens", "model.norm", "model.layers.0.mlp.gate",
                 "model.layers.1.mlp.shared_expert_gate",
                 "model.layers.0.mlp.experts"):  # fmt: skip
        assert name in listed and name not in report.fp8
    assert "model.layers.0.mlp.shared_expert.up_proj" in report.fp8
    with torch.no_grad():
        wanted, got = (m(TOKENS).logits for m in (model, load(tmp_path / "moe", "fp8-tensor")))
    assert (got.float() - wanted).norm() < 0.15 * wanted.norm()
    skipped = qv.convert(plain(), "tensorwise", skip=("lm_head", "o_proj"))
    report = qv.export(skipped, tmp_path / "skip", "fp8-tensor")
    assert report.left["model.layers.0.self_attn.o_proj"] == "it does not multiply in FP8"
    assert len(report.fp8) == 2 * 6


def test_shards_have_an_index_and_load(tmp_path):
    model = trained("fp8lm-o2")
    whole = qv.export(model, tmp_path / "whole", "fp8-tensor")
    qv.export(model, tmp_path / "parts", "fp8-tensor", max_shard_size="100KB")
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.nbytes
    assert len(set(index["weight_map"].values())) > 3
    for name in set(index["weight_map"].values()):
        assert (tmp_path / "parts" / name).stat().st_size < 110_000
    a, b = (stored(tmp_path / name) for name in ("whole", "parts"))
    assert a.keys() == b.keys() == index["weight_map"].keys()
    a, b = (weights(load(tmp_path / name, "fp8-tensor")) for name in ("whole", "parts"))
    for name, value in a.items():
        assert_same(value, b[name])


class _Tokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_beside_the_weights(tmp_path):
    model = torch.compile(plain())
    before = model.config.to_dict()
    qv.export(model, tmp_path / "deep/er", tokenizer=_Tokenizer())
    assert sorted(p.name for p in (tmp_path / "deep/er").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert model.config.to_dict() == before
    assert config_of(tmp_path / "deep/er")["dtype"] == "bfloat16"


CUSTOM = """
import transformers
class OursForCausalLM(transformers.LlamaForCausalLM):
    pass
OursForCausalLM.register_for_auto_class("AutoModelForCausalLM")
"""


def test_a_model_of_other_code_takes_its_code_along(tmp_path, monkeypatch):
    (tmp_path / "quaver_test_ours.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("quaver_test_ours").OursForCausalLM
    qv.export(kind(plain(num_hidden_layers=1).config), tmp_path / "out")
    assert (tmp_path / "out/quaver_test_ours.py").read_text() == CUSTOM
    found = config_of(tmp_path / "out")
    assert found["auto_map"] == {"AutoModelForCausalLM": "quaver_test_ours.OursForCausalLM"}
    assert found["architectures"] == ["OursForCausalLM"]


def test_frozen_layers_of_other_codes_are_refused(tmp_path):
    model = qv.side_tune(plain(), reduction=4)
    with pytest.raises(ValueError, match=r"q_proj is a FrozenLinear, which keeps codes of another"):
        qv.export(model, tmp_path / "out")


# Bad input: named, and nothing written


def _bad(spoil):
    model = plain()
    with torch.no_grad():
        spoil(model.model.layers[1].mlp.up_proj.weight)
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (plain, {"format": "fp8"}, ValueError, "format must be one of bf16, fp8-block"),
        (plain, {"max_shard_size": "5 apples"}, ValueError, "max_shard_size .* got '5 apples'"),
        (plain, {"max_shard_size": 0}, ValueError, "max_shard_size"),
        (plain, {"max_shard_size": True}, ValueError, "max_shard_size"),
        (plain, {"tokenizer": "gpt2"}, TypeError, "tokenizer must have save_pretrained, got str"),
        (lambda: nn.Linear(4, 4), {}, TypeError, "one of transformers or a quaver.*got Linear"),
        (
            lambda: models.build(models.Config(family="gpt", dim=32, layers=1, heads=2)),
            {},
            ValueError,
            "quaver.models.GPT is no architecture",
        ),
        (lambda: plain().to("meta"), {}, ValueError, "is on the meta device"),
        *(
            (lambda: _bad(lambda w: w[3, 5].fill_(float("nan"))), {"format": form}, ValueError,
             "model.layers.1.mlp.up_proj.weight has values that are not finite")
            for form in FORMATS
        ),
        *(
            (lambda recipe=recipe: qv.convert(_bad(lambda w: w[3, 5].fill_(float("inf"))), recipe),
             {"format": form}, ValueError, "not finite")
            for form in FORMATS for recipe in ("fp8lm-o2", "coat")
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        qv.export(make(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(tmp_path):
    model = plain(num_hidden_layers=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name, why in (("link", "a symbolic link"), ("file", "no folder"), (".", "not empty")):
        with pytest.raises(ValueError, match=f"new or an empty folder, .* is {why}"):
            qv.export(model, tmp_path / name)
    qv.export(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="is not empty"):
        qv.export(model, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "link"]


def test_a_shard_of_a_model_is_refused(tmp_path):
    from torch.distributed.tensor import DTensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = plain()
        layer, mesh = model.model.layers[0].mlp.up_proj, init_device_mesh("cpu", (2,))
        layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"up_proj.weight is sharded over ranks; save by"):
            qv.export(model, tmp_path / "out")
    finally:
        torch.distributed.destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has adapters; export model.merge_and_unload\(\)"):
        qv.export(model, tmp_path / "out")
    qv.export(model.merge_and_unload(), tmp_path / "out")


KILLED = """
import sys, time
from pathlib import Path
from quaver.files import new_folder
with new_folder(Path(sys.argv[1]), "test") as inside:
    (inside / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_for_long(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        qv.export(plain(num_hidden_layers=1), tmp_path / "out2")
        assert len(list(tmp_path.glob(".out.*"))) == 1  # held by a living process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.1)
    qv.export(plain(num_hidden_layers=1), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out2"]


# Memory

PEAK = """
import ctypes, gc, sys, quaver as qv
from quaver import models
def build(recipe, layers):
    sizes = dict(vocab=256, dim=512, heads=8, kv_heads=8, ffn=1408, layers=layers)
    return qv.convert(models.build(models.Config(**sizes)), recipe)
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
for case in sys.argv[2:]:
    recipe, form = case.split(",")
    qv.export(build(recipe, 1), f"{sys.argv[1]}/{case}-small", form)  # imports what it needs
    model = build(recipe, 10)
    held = sum(p.numel() * (2 if isinstance(p, qv.ScaledTensor) else p.element_size())
               for p in model.parameters())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is no part of the model
    open("/proc/self/clear_refs", "w").write("5")  # the peak is that from here on
    before = status("VmRSS")
    qv.export(model, f"{sys.argv[1]}/{case}", form)
    print(case, (status("VmHWM") - before) / held)
    model = None
"""


@pytest.mark.slow
def test_peak_memory_above_the_models_own(tmp_path):
    """The bar is 0.35 of the bytes of the parameters; one weight is a few per cent of 10 blocks."""
    cases = ["bf16,bf16", "bf16,fp8-block", "fp8lm-o2,fp8-block", "coat,fp8-tensor"]
    command = [sys.executable, "-c", PEAK, str(tmp_path), *cases]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found = dict(line.split() for line in run.stdout.splitlines())
    assert found.keys() == set(cases)
    assert all(float(share) <= 0.35 for share in found.values()), found


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_are_those_of_training(tmp_path, power_of_two, frozen):
    """Codes and scales that a blockwise layer multiplies by, bit for bit."""
    base = qv.recipe.get("blockwise")
    linear = dataclasses.replace(base.linear, power_of_two=power_of_two)
    model = plain()
    if frozen:
        model.requires_grad_(False)
    qv.convert(
        model, dataclasses.replace(base, linear=linear), **({"frozen": "fp8"} if frozen else {})
    )
    report = qv.export(model, tmp_path / "out", "fp8-block")
    tensors = stored(tmp_path / "out")
    layers = dict(model.named_modules())
    assert report.fp8
    for name in report.fp8:
        layer = layers[name]
        x = torch.zeros(1, layer.in_features)
        q, scale, _, _ = (
            cast_weight(layer.weight, E4M3, both=False)
            if frozen
            else torch.ops.quaver.cast_layouts(
                layer.weight.detach(), E4M3, "tile", True, False, power_of_two
            )
        )
        assert layer(x).shape[-1] == layer.out_features
        n, k = layer.weight.shape
        assert_same(tensors[f"{name}.weight"], q[:n, :k].contiguous())
        assert_same(tensors[f"{name}.weight_scale_inv"], scale)


def test_a_llama_of_ours_ends_where_its_tokenizer_does(tmp_path):
    model = models.build(models.load("tiny"))
    coder = end_tokenizer(7)
    qv.export(model, tmp_path / "out", tokenizer=coder)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.config.eos_token_id == made.generation_config.eos_token_id == 7
    qv.export(model, tmp_path / "plain")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "plain").eos_token_id is None
    with pytest.raises(UsageError, match="end token is 300 and the model has 256 tokens"):
        qv.export(model, tmp_path / "other", tokenizer=end_tokenizer(300))
    assert not (tmp_path / "other").exists()


def end_tokenizer(index):
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"<{i}>": i for i in range(index + 1)}, unk_token="<0>")
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=f"<{index}>")


def test_the_command_reads_the_end_of_a_runs_tokenizer(tmp_path):
    end_tokenizer(7).save_pretrained(tmp_path)
    assert exporting._Files(tmp_path).eos_token_id == 7
    assert exporting._Files(tmp_path / "none").eos_token_id is None
