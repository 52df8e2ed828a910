"""Interfaces beside ops work on a ScaledTensor or are refused by name: never an address of nothing,
never a crash."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import assert_same, randn
from kinds import KINDS
from torch import nn

import quaver as qv
from quaver import ScaledTensor


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_gets_the_decoded_values(kind):
    t = KINDS[kind]().detach()
    wanted = t.dequantize()
    assert_same(torch.from_numpy(np.array(t)), wanted)
    assert_same(torch.from_numpy(t.numpy().copy()), wanted)
    assert_same(torch.from_dlpack(t, copy=True), wanted)
    assert_same(torch.from_numpy(np.from_dlpack(t, copy=True)), wanted)
    assert_same(torch.tensor(t.tolist()), wanted)
    assert_same(torch.zeros(6, 8).set_(t), wanted)
    with pytest.raises(ValueError, match="read-only"):
        t.numpy()[0] = 1
    if kind == "weight":
        with pytest.raises(RuntimeError, match="requires grad; use detach"):
            KINDS[kind]().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda t: t.data_ptr(), "data_ptr: a ScaledTensor .* use t.qdata.data_ptr"),
        (lambda t: t.storage(), "storage: a ScaledTensor"),
        (lambda t: t.untyped_storage().data_ptr(), r"untyped_storage\(\).data_ptr: a Scaled.* use"),
        (lambda t: t.untyped_storage()[0], "a ScaledTensor .* t.qdata, t.dequantize"),
        (lambda t: t.untyped_storage().fill_(0), "a ScaledTensor .* t.qdata, t.dequantize"),
        (lambda t: t.untyped_storage().resize_(0), "a ScaledTensor .* t.qdata, t.dequantize"),
        (lambda t: copy.deepcopy(t.untyped_storage()), "a ScaledTensor .* t.qdata, t.dequantize"),
        (lambda t: torch.Tensor.data_ptr(t), "Cannot access data pointer"),
        (lambda t: torch.utils.dlpack.to_dlpack(t), "Cannot access data pointer"),
        (lambda t: safetensors.torch.save({"t": t}), "ScaledTensor .* or the state_dict"),
        (lambda t: t.apply_(lambda x: x), "apply_: a ScaledTensor"),
        (lambda t: t.map_(torch.zeros(6, 8), lambda a, b: b), "map_: a ScaledTensor"),
    ],
)
def test_what_wants_an_address_is_refused_by_name(kind, ask, message):
    t = KINDS[kind]().detach()
    with pytest.raises(RuntimeError, match=message):
        ask(t)


@pytest.mark.parametrize("kind", [*KINDS, "value"])
@pytest.mark.parametrize("take", [torch.from_dlpack, np.from_dlpack])
def test_dlpack_hands_out_copies_only_where_they_are_asked_for(kind, take):
    """A write to a copy that nobody asked for would be lost."""
    if kind == "value":
        t = qv.nn.Linear(8, 6, recipe="fp8lm-o2").state_dict()["weight"]
    else:
        t = KINDS[kind]().detach()
    for asked in ({}, {"copy": False}):
        with pytest.raises(BufferError, match=r"__dlpack__: .*ScaledTensor.*copy=True"):
            take(t, **asked)
    take(t, copy=True)[0] = 1.0


def test_safetensors_refuses_before_a_byte_is_written(tmp_path):
    with pytest.raises(RuntimeError, match="ScaledTensor"):
        safetensors.torch.save_file({"a": torch.ones(3), "t": KINDS["f16"]()}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_storage_has_a_size_and_an_identity():
    t, other = KINDS["weight"](), KINDS["weight"]()
    assert t.untyped_storage().nbytes() == 6 * 8 * 4
    assert t.untyped_storage()._cdata == t.untyped_storage()._cdata
    assert t.untyped_storage()._cdata != other.untyped_storage()._cdata


def saved(t, **options):
    file = io.BytesIO()
    torch.save(t, file, **options)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location=lambda storage, location: storage)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "way",
    [
        lambda t: pickle.loads(pickle.dumps(t)), saved, copy.deepcopy, copy.copy,
        lambda t: saved(t, _use_new_zipfile_serialization=False),
    ],
)  # fmt: skip
def test_copies_and_pickles_are_scaled_tensors(kind, way):
    t = KINDS[kind]()
    t.remark = {"of": "ours"}
    other = way(t)
    assert isinstance(other, ScaledTensor) and type(other) is type(t)
    assert (other.qlayout, other.dtype, other.requires_grad) == (
        t.qlayout,
        t.dtype,
        t.requires_grad,
    )
    assert isinstance(other, nn.Parameter) == (kind == "weight") and other.remark == t.remark
    for name, part in t.parts().items():
        assert_same(other.parts()[name], part)
    with torch.no_grad():
        other.zero_()
    shared = way is copy.copy
    assert (t.detach().dequantize().abs().max() == 0) == shared


def test_a_copy_of_a_copied_weight_keeps_its_gemm_copies_up_to_date():
    layer = qv.nn.Linear(32, 32, recipe="fp8lm-o2")
    x = randn(4, 32)
    layer(x)
    for write in (
        copy.copy,
        torch.Tensor.detach,
        lambda w: w[:4],
        lambda w: w.t(),
        lambda w: w.data,
    ):
        with torch.no_grad():
            write(layer.weight).mul_(0.5)
            fresh = qv.nn.Linear(32, 32, recipe="fp8lm-o2")
            fresh.weight.data = layer.weight.data.clone()
            fresh.bias.copy_(layer.bias)
            assert_same(layer.eval()(x), fresh.eval()(x))


def test_deepcopy_takes_the_gradient_too():
    p = nn.Parameter(KINDS["f16"]())
    p.grad = KINDS["e4m3"]()
    other = copy.deepcopy(p)
    assert_same(other.grad.qdata, p.grad.qdata)
    other.grad.zero_()
    assert p.grad.dequantize().any()
    with pytest.raises(RuntimeError, match="only leaf tensors"):
        copy.deepcopy(p[1:])


def _fill(t, value):
    with torch.no_grad():
        t.fill_(value)


def test_processes_share_it():
    for kind in ("e4m3", "weight"):
        t = KINDS[kind]()
        assert not t.is_shared()
        assert t.share_memory_() is t and t.is_shared()
        process = multiprocessing.get_context("fork").Process(target=_fill, args=(t, 3.0))
        process.start()
        process.join()
        assert_same(t.detach().dequantize(), torch.full((6, 8), 3.0))
