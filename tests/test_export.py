"""Exported folders: transformers reads from them what the model multiplies by."""

import dataclasses
import json

import pytest
import torch
from exported import (
    RECIPES,
    TOKENS,
    by_blocks,
    config_of,
    decoded,
    load,
    plain,
    stored,
    trained,
    weights,
)
from helpers import assert_same, randn

import quaver as qv
from quaver.hf.formats import FORMATS, encode_blocks
from quaver.nn.weight import cast_weight

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


E4M3 = torch.float8_e4m3fn


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
    # Of the format: to nearest, in e4m3 within 2^-4 of a value or 2^-10 of a scale, in bf16 2^-8.
    for name, value in weights(model).items():
        if name.removesuffix(".weight") not in report.fp8:
            assert ((loaded[name] - value).abs() <= 2.0**-8 * value.abs()).all()
            assert_same(loaded[name], value.bfloat16().float())
            continue
        assert tensors[name].dtype == E4M3
        scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale"))
        assert scale.dtype == torch.float32 and (own or (torch.frexp(scale)[0] == 0.5).all())
        step = by_blocks(scale, value.shape) if scale.dim() == 2 else scale
        error = torch.maximum(value.abs() / 16, step / 1024) + loaded[name].abs() / 256 * own
        assert ((loaded[name] - value).abs() <= error).all()
    # The logits are those of the plain model with these weights; the loss is the model's own within
    # the rounding of activations, which FP8 products have and the loaded model has not.
    twin = plain(seed=1)
    twin.load_state_dict(loaded)
    with torch.no_grad():
        assert_same(again.float()(TOKENS).logits, twin(TOKENS).logits)
        ours, theirs = (m(TOKENS, labels=TOKENS).loss.item() for m in (model, again))
    assert theirs == pytest.approx(ours, rel=0.01)


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
