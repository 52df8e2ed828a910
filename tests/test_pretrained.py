"""Folders of transformers in bf16 and FP8 as a start, and `quaver export` of runs and folders."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from exported import RECIPES, TOKENS, decoded, load, plain, stored, trained, weights
from helpers import assert_same
from test_cli import flags, paths, run  # noqa: F401

import quaver as qv
from quaver.hf.formats import FORMATS
from quaver.schedule import parameter_groups

HAS_READER = importlib.util.find_spec("compressed_tensors") is not None  # needs Python 3.11
FORMATS = [name for name in FORMATS if HAS_READER or name != "compressed-tensors"]
FP8 = [name for name in FORMATS if name != "bf16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{format: a folder of one trained model}."""
    root, model = tmp_path_factory.mktemp("folders"), trained("coat")
    for form in FORMATS:
        qv.export(model, root / form, form, max_shard_size="300KB")
    return {form: root / form for form in FORMATS}


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of the fp8-block folder."""
    return shutil.copytree(folders["fp8-block"], tmp_path / "damaged")


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_plain_and_those_of_the_folder(folders, form):
    model, tensors = qv.load_pretrained(folders[form]), stored(folders[form])
    assert not model.training
    for name, p in model.named_parameters():
        assert type(p.data) is torch.Tensor and p.dtype == torch.bfloat16
        assert_same(p.detach().float(), decoded(tensors, name))
    for name, p in qv.load_pretrained(folders[form], dtype=torch.float32).named_parameters():
        assert p.dtype == torch.float32
        assert_same(p.detach(), decoded(tensors, name))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_is_a_start(folders, form, recipe, tmp_path):
    model = qv.load_pretrained(folders[form], dtype=torch.float32)
    if recipe is not None:
        qv.convert(model, recipe)
    optimizer = qv.AdamW(model.parameters(), lr=1e-3, recipe=recipe or "bf16")
    losses = []
    for _ in range(4):
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    qv.export(model, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    if recipe is None:
        model.eval().save_pretrained(tmp_path / "theirs")  # plain, as from a plain folder
        for name, value in weights(load(tmp_path / "theirs", "bf16")).items():
            assert_same(value, weights(model)[name])


@pytest.mark.parametrize("form", FP8)
def test_values_survive_a_round_trip(folders, form, tmp_path):
    """Scales are powers of two, so decoding is exact, and encoding again changes nothing."""
    qv.export(qv.load_pretrained(folders[form]), tmp_path / "again", form)
    a, b = stored(folders[form]), stored(tmp_path / "again")
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert decoded(a, name).equal(decoded(b, name)), name
        assert value.dtype == b[name].dtype


def test_layers_that_transformers_keeps_in_fp8_name_the_remedy(folders):
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    config = FineGrainedFP8Config()
    model = replace_with_fp8_linear(plain(), ["lm_head"], config, True)
    with pytest.raises(TypeError, match=r"q_proj is a FP8Linear .*; load .* by quaver\.load_pretr"):
        qv.convert(model, "tensorwise")
    assert not any(isinstance(m, qv.nn.Linear) for m in model.modules())


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _shard(folder):
    return sorted(folder.glob("*.safetensors"))[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text('{"a": 1}'), "has no model_type"),
        (lambda f: _edit(f / "config.json", model_type="lama"), "cannot be loaded: .*lama"),
        (
            lambda f: _edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
            "quantised by 'gptq'; wanted one of fp8, compressed-tensors, or plain",
        ),
        (lambda f: _edit(f / "config.json", quantization_config=3), "quantised by None"),
        (lambda f: _edit(f / "config.json", num_hidden_layers=3), "weights are missing, such as"),
        (lambda f: _edit(f / "config.json", num_hidden_layers=1), "weights are unexpected, such"),
        (lambda f: _edit(f / "config.json", vocab_size=250), "weights are mismatched|cannot be lo"),
        (lambda f: _shard(f).unlink(), "model-00002-of-.* is missing: download it again"),
        (lambda f: _shard(f).write_bytes(b"version https://git-lfs"), "cut short or damaged"),
        (lambda f: _shard(f).write_bytes(_shard(f).read_bytes()[:-9]), "cut short or damaged"),
        (lambda f: [p.unlink() for p in f.glob("model*")], "no model.safetensors and no"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
            "index.json is damaged",
        ),
    ],
)
def test_a_folder_that_is_none_is_one_line(damaged, damage, message, tmp_path, capsys):
    damage(damaged)
    with pytest.raises(ValueError, match=message) as caught:
        qv.load_pretrained(damaged)
    assert "\n" not in str(caught.value)
    status, _, err = run(["export", damaged, "--out", tmp_path / "out"], capsys)
    assert status == 2 and err.count("\n") == 1 and err.startswith("quaver export: error: ")
    assert not (tmp_path / "out").exists()


def test_blocks_that_transformers_divides_differently_are_refused(tmp_path):
    from safetensors.torch import save_file

    from quaver.hf.formats import encode_blocks

    out = tmp_path / "out"
    qv.export(plain(intermediate_size=192), out, "fp8-block")
    tensors = stored(out)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = encode_blocks(tensors[name])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has \[1, 2\] scales for \[128, 192\]; wanted sides"):
        qv.load_pretrained(out)


# The command


def test_export_of_a_run(paths, capsys, tmp_path):  # noqa: F811
    recipes = "bf16,fp8lm-o2"
    sizes = {"dim": 128, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 128, "context": 64}
    (paths / "model.json").write_text(json.dumps(sizes))
    assert run(flags(paths, recipe=recipes), capsys)[0] == 0
    out = paths / "hf"
    status, _, err = run(["export", paths / "out", "--out", out], capsys)
    assert status == 2 and "holds bf16, fp8lm-o2: choose one by --recipe" in err
    assert not out.exists()
    command = ["export", paths / "out", "--format", "fp8-block", "--out", out]
    status, _, err = run([*command, "--recipe", "coat"], capsys)
    assert status == 2 and "--recipe coat: " in err
    status, shown, _ = run([*command, "--recipe", "fp8lm-o2"], capsys)
    assert status == 0 and "7 layers in FP8" in shown
    model = qv.convert(qv.models.build(qv.models.Config(**sizes)), "fp8lm-o2")
    qv.load(paths / "out/fp8lm-o2/checkpoint/state.safetensors", model)
    tokens = TOKENS[:, :16]
    with torch.no_grad():
        wanted, got = model.eval()(tokens), qv.load_pretrained(out)(tokens).logits.float()
    assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_export_of_a_run_whose_masters_zero_spread(paths, capsys):  # noqa: F811
    """Its checkpoint has the weights as codes, and each master with its owner's states."""
    sizes = {"dim": 128, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 128, "context": 64}
    (paths / "model.json").write_text(json.dumps(sizes))
    assert run(flags(paths, recipe="fp8lm-o3"), capsys)[0] == 0
    torch.manual_seed(3)
    model = qv.convert(qv.models.build(qv.models.Config(**sizes)), "fp8lm-o3")
    masters = {name: p.detach().dequantize() for name, p in model.named_parameters()
               if isinstance(p, qv.ScaledTensor)}  # fmt: skip
    optimizer = qv.distributed.ZeroAdamW(parameter_groups(model), recipe="fp8lm-o3")
    path = paths / "out/fp8lm-o3/checkpoint/state.safetensors"
    qv.distributed.save(path, model, optimizer)
    for form in ("bf16", "fp8-tensor"):
        out = paths / form
        assert run(["export", paths / "out", "--format", form, "--out", out], capsys)[0] == 0
        found = decoded(stored(out), "model.layers.0.mlp.down_proj.weight")
        wanted = masters["blocks.0.mlp.down.weight"].bfloat16().float()
        if form == "fp8-tensor":
            wanted = model.blocks[0].mlp.down.weight.detach().dequantize()
        assert_same(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_parallel": 2}, "holds parts of a model that tensor parallelism split"),
        ({"methods": ["full"]}, "is a run of `quaver tune`: export its .*full/tuned"),
        ({"model": {"dim": -1}}, "config.json is damaged"),
    ],
)
def test_runs_that_hold_no_whole_model_are_refused(paths, capsys, change, message):  # noqa: F811
    assert run(flags(paths, recipe="bf16"), capsys)[0] == 0
    _edit(paths / "out/config.json", **change)
    status, _, err = run(["export", paths / "out", "--out", paths / "hf"], capsys)
    assert status == 2 and re.search(message, err) and err.count("\n") == 1
    shutil.rmtree(paths / "out/bf16")
    status, _, err = run(["export", paths / "out", "--out", paths / "hf"], capsys)
    assert status == 2 and err.count("\n") == 1
    assert not (paths / "hf").exists()


def test_export_of_a_folder_copies_its_tokenizer(folders, capsys, tmp_path):
    folder = shutil.copytree(folders["bf16"], tmp_path / "in")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    for form in ("fp8-tensor", "bf16"):
        out = tmp_path / form
        status, shown, _ = run(["export", folder, "--format", form, "--out", out], capsys)
        assert status == 0 and str(out) in shown
        assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'
    a, b = (stored(path) for path in (folder, tmp_path / "bf16"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "int4"], "format must be one of bf16"),
        (["--recipe", "coat"], "--recipe is for a run's folder"),
        (["--max-shard-size", "big"], "max_shard_size must be bytes"),
    ],
)
def test_mistakes_of_the_command_are_one_line(folders, more, message, capsys, tmp_path):
    status, _, err = run(["export", folders["bf16"], "--out", tmp_path / "out", *more], capsys)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
