"""A checkpoint restores every bit, and a file that does not fit changes nothing."""

import copy
import json
import os
import random
import struct

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quaver as qv
from quaver import checkpoint, files, models, recipe, tensor_file

SMALL = models.Config(vocab=64, dim=32, layers=1, heads=2, kv_heads=1, ffn=48, context=16)


def bits(value):
    """Nested plain values and bytes, so that == compares every bit (NaN included)."""
    if isinstance(value, qv.ScaledTensor):
        return [bits(value.qdata), bits(value.scale), bits(value.amax)]
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), list(value.shape), plain.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


def everything(model, optimizer=None):
    state = bits(dict(model.state_dict(keep_vars=True)))
    if optimizer is None:
        return state
    states = [bits(optimizer.state.get(p)) for g in optimizer.param_groups for p in g["params"]]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return state, states, bits(groups)


def make(name="f32", seed=0, config=SMALL):
    torch.manual_seed(seed)
    model = qv.convert(models.build(config), recipe=name)
    return model, qv.AdamW(model.parameters(), lr=1e-2, recipe=name)


def step(model, optimizer, seed):
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    qv.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("name", recipe.names())
def test_a_resumed_run_has_the_same_bits(name, path):
    model, optimizer = make(name)
    for i in range(3):
        step(model, optimizer, i)
    optimizer.param_groups[0]["lr"] = 3e-3
    qv.save(path, model, optimizer, step=3, extra={"note": [1, 2]})
    expected = [step(model, optimizer, i) for i in range(3, 20)]  # past the amax history

    again, optimizer2 = make(name, seed=1)
    assert qv.load(path, again, optimizer2) == {"step": 3, "extra": {"note": [1, 2]}}
    assert [step(again, optimizer2, i) for i in range(3, 20)] == expected
    assert everything(again, optimizer2) == everything(model, optimizer)


@pytest.mark.parametrize("name", recipe.names())
def test_load_over_a_model_that_has_trained(name, path):
    """Caches of the old weights must not survive, and the tensors stay the objects they were."""
    model, optimizer = make(name)
    step(model, optimizer, 0)
    qv.save(path, model, optimizer, step=1)
    before = everything(model, optimizer)
    expected = step(model, optimizer, 1)
    identities = [id(p) for p in model.parameters()]
    for i in range(2, 5):
        step(model, optimizer, i)
    qv.load(path, model, optimizer)
    assert everything(model, optimizer) == before
    assert [id(p) for p in model.parameters()] == identities
    assert step(model, optimizer, 1) == expected


def scaled(seed=0, shape=(3, 5)):
    torch.manual_seed(seed)
    qdata = torch.randn(shape).to(torch.float8_e4m3fn)
    return qv.ScaledTensor(qdata, torch.rand(()), torch.rand(()), torch.bfloat16)


class Holder(nn.Module):
    """A module of the tensors it is given; those that are no parameters become buffers."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def test_fp8_stays_fp8(path):
    qv.save(path, Holder(w=nn.Parameter(scaled())))
    tensors, _ = tensor_file.read_tensors(path, checkpoint.FORMAT, checkpoint.VERSION)
    stored = {name: t.dtype for name, t in tensors.items() if name.startswith("model.")}
    assert stored == {
        "model.w.qdata": torch.float8_e4m3fn,
        "model.w.scale": torch.float32,
        "model.w.amax": torch.float32,
    }


@pytest.mark.parametrize("amax", [True, False])
def test_amax_is_restored_present_or_absent(path, amax):
    saved, target = scaled(0), nn.Parameter(scaled(1))
    if not amax:
        saved.amax = None
    qv.save(path, Holder(w=nn.Parameter(saved)))
    version = target._version
    qv.load(path, Holder(w=target))
    assert bits(target) == bits(saved)
    assert target._version > version


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3)])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.int64, torch.bool],
)
def test_every_shape_and_type(path, shape, dtype):
    value = torch.arange(6)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    target = Holder(x=torch.zeros(shape, dtype=dtype))
    qv.save(path, Holder(x=value))
    qv.load(path, target)
    assert bits(target.x) == bits(value)


def test_non_finite_and_strided_values_keep_their_bits(path):
    value = torch.tensor([[float("nan"), float("inf")], [-0.0, 1e-45]]).t()
    target = Holder(x=torch.zeros(2, 2))
    qv.save(path, Holder(x=value))
    qv.load(path, target)
    assert bits(target.x) == bits(value)


def test_tied_weights_are_stored_once(path):
    config = SMALL.replace(tie_embeddings=True)
    model, optimizer = make(config=config)
    step(model, optimizer, 0)
    qv.save(path, model, optimizer)
    tensors, document = tensor_file.read_tensors(path, checkpoint.FORMAT, checkpoint.VERSION)
    assert document["aliases"] == {"model.lm_head.weight": "model.embed.weight"}
    assert "model.lm_head.weight" not in tensors
    again, optimizer2 = make(seed=1, config=config)
    qv.load(path, again, optimizer2)
    assert again.lm_head.weight is again.embed.weight
    assert everything(again, optimizer2) == everything(model, optimizer)


def test_untied_file_is_refused_by_a_tied_model(path):
    qv.save(path, make()[0])
    with pytest.raises(
        qv.CheckpointError, match=r"model\.embed\.weight and model\.lm_head\.weight"
    ):
        qv.load(path, make(config=SMALL.replace(tie_embeddings=True))[0])


def test_torch_optimizers_schedulers_and_groups(path):
    def build():
        model = nn.Linear(4, 3)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    model, optimizer, scheduler = build()
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    scheduler.step()
    qv.save(path, model, optimizer)
    again, optimizer2, _ = build()
    qv.load(path, again, optimizer2)
    assert everything(again, optimizer2) == everything(model, optimizer)
    assert [group["lr"] for group in optimizer2.param_groups] == [0.05, 0.25]


def test_random_generators_continue(path):
    model, optimizer = make()
    qv.save(path, model, optimizer)
    expected = torch.rand(3), random.random(), numpy.random.rand()
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    qv.load(path, model)  # weights alone leave the generators as they are
    torch.manual_seed(5)
    other = torch.rand(3)
    qv.load(path, model, optimizer)
    found = torch.rand(3), random.random(), numpy.random.rand()
    assert bits(found) == bits(expected)
    assert not torch.equal(other, expected[0])


def test_weights_alone(path):
    model, optimizer = make()
    qv.save(path, model, optimizer, step=4)
    again, _ = make(seed=1)
    assert qv.load(path, again)["step"] == 4
    assert everything(again) == everything(model)


# Refusals: each must name the key and leave model and optimizer as they were


def refuse(path, model, optimizer, message):
    before = everything(model, optimizer)
    generators = bits([torch.get_rng_state(), random.getstate()])
    with pytest.raises(qv.CheckpointError) as error:
        qv.load(path, model, optimizer)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert everything(model, optimizer) == before
    assert bits([torch.get_rng_state(), random.getstate()]) == generators


@pytest.fixture
def saved(path):
    model, optimizer = make()
    step(model, optimizer, 0)
    qv.save(path, model, optimizer, step=1)
    step(model, optimizer, 1)
    return path, model, optimizer


def test_missing_file(saved, tmp_path):
    refuse(tmp_path / "none", *saved[1:], "no such file")
    refuse(tmp_path, *saved[1:], "not a regular file")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_file(saved, keep):
    path = saved[0]
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refuse(*saved, "truncated, damaged or no safetensors file")


def test_every_kind_of_flipped_byte(saved):
    path, model, optimizer = saved
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    draw = random.Random(0)
    places = [draw.randrange(header) for _ in range(100)]
    places += [draw.randrange(header, len(data)) for _ in range(100)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        refuse(path, model, optimizer, "")
    path.write_bytes(data)
    qv.load(path, model, optimizer)


def test_foreign_files(saved):
    path = saved[0]
    path.write_text("not a checkpoint")
    refuse(*saved, "no safetensors file")
    save_file({"x": torch.zeros(2)}, path)
    refuse(*saved, "a safetensors file, but not a quaver checkpoint")
    tensor_file.write_tensors(path, {}, {"format": "quaver something", "version": 1})
    refuse(*saved, "a quaver something, not a quaver checkpoint")
    tensor_file.write_tensors(path, {}, {"format": "quaver checkpoint", "version": 7})
    refuse(
        *saved, f"quaver checkpoint of version 7, this quaver reads version {checkpoint.VERSION}"
    )


def test_other_shapes_types_and_keys(saved):
    path = saved[0]
    for config, message in (
        (
            SMALL.replace(ffn=64),
            "model.blocks.0.mlp.gate_up.weight is float32 [128, 32] here, float",
        ),
        (SMALL.replace(layers=2), "the file lacks model.blocks.1.attention.out.weight and 5 more"),
    ):
        model, optimizer = make(config=config)
        refuse(path, model, optimizer, message)
    model, optimizer = make()
    model.extra = nn.Linear(2, 2)
    qv.save(path, model, optimizer)
    refuse(*saved, "the file has unexpected model.extra.bias and 1 more")
    model, optimizer = make()
    qv.save(path, model.to(torch.float64), optimizer)
    refuse(*saved, "is float32 [64, 32] here, float64 [64, 32] in the file")


def test_scaled_and_plain_do_not_mix(path):
    qv.save(path, Holder(w=nn.Parameter(scaled())))
    plain = Holder(w=nn.Parameter(torch.zeros(3, 5)))
    refuse(
        path, plain, None, "model.w is float32 [3, 5] here, ScaledTensor(qdata float8_e4m3fn [3, 5]"
    )
    qv.save(path, plain)
    refuse(path, Holder(w=nn.Parameter(scaled())), None, "float32 [3, 5] in the file")


def test_other_optimizers(saved):
    path, model, optimizer = saved
    refuse(path, model, torch.optim.SGD(model.parameters()), "class is SGD here, AdamW in the file")
    half = [list(model.parameters())[:2], list(model.parameters())[2:]]
    groups = qv.AdamW([{"params": p} for p in half], recipe="f32")
    refuse(path, model, groups, "optimizer groups differ: blocks.0.")
    qv.save(path, model)
    refuse(path, model, optimizer, "the file holds no optimizer")


def test_another_recipe_of_the_optimizer(path):
    model, optimizer = make("fp8lm-o2")
    step(model, optimizer, 0)
    qv.save(path, model, optimizer)
    model, optimizer = make("fp8lm-o1")  # the same weights, other moments
    refuse(path, model, optimizer, "recipe is fp8lm-o1 (exp_avg f32, exp_avg_sq f32) here, fp8")
    refuse(path, *make("bf16"), "is float32 [64, 32] here, ScaledTensor(qdata float16 [64, 32]")


def test_what_cannot_be_stored_is_named(path):
    model, optimizer = make()
    with pytest.raises(qv.CheckpointError, match="extra must hold JSON values"):
        qv.save(path, model, extra={"x": object()})
    optimizer.param_groups[0]["callback"] = print
    with pytest.raises(qv.CheckpointError, match="an optimizer's options must hold JSON values"):
        qv.save(path, model, optimizer)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_save_keeps_the_earlier_file(saved, monkeypatch, where):
    path, model, optimizer = saved
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, where, fail)
    with pytest.raises(OSError, match=f"No space left.*{path.name}"):
        qv.save(path, model, optimizer, step=2)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_saving_changes_nothing(path):
    model, optimizer = make()
    step(model, optimizer, 0)
    before = copy.deepcopy(everything(model, optimizer))
    qv.save(path, model, optimizer)
    assert everything(model, optimizer) == before
    json.dumps(tensor_file.read_tensors(path, checkpoint.FORMAT, checkpoint.VERSION)[1])


def test_a_scaled_state_of_any_granularity_is_built_anew(path):
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    blocks = qv.quantize(torch.randn(4, 8), granularity="block", block=4)
    optimizer.state[model.weight] = {"exp_avg": blocks, "step": 3, "nothing": None}
    qv.save(path, model, optimizer)
    again = torch.optim.SGD(model.parameters(), lr=0.1)
    qv.load(path, model, again)
    found = again.state[model.weight]
    assert bits(found["exp_avg"]) == bits(blocks)
    assert torch.equal(found["exp_avg"].dequantize(), blocks.dequantize())
    assert (found["step"], found["nothing"]) == (3, None)
