"""Exported folders: names of tensors by architecture, ties, shards, and the files beside them."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from exported import RECIPES, TOKENS, config_of, load, plain, stored, trained, weights
from helpers import assert_same
from torch import nn

import quaver as qv
from quaver import exporting, models
from quaver.errors import UsageError
from quaver.hf.formats import FORMATS
from quaver.nn.weight import cast_weight

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


E4M3 = torch.float8_e4m3fn
FP8 = [name for name in FORMATS if name != "bf16"]


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
