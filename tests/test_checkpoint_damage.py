"""Checkpoints whose checksums hold and whose description lies: refused by name, nothing changed."""

import copy
import random

import numpy
import pytest
import torch
from test_checkpoint import bits, everything, make, step

import quaver as qv
from quaver import checkpoint
from quaver.tensor_file import TensorFile, read_tensors, write_tensors


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A checkpoint with scaled states, and what it was made of."""
    path = tmp_path_factory.mktemp("origin") / "state.safetensors"
    model, optimizer = make("fp8lm-o2")
    step(model, optimizer, 0)
    qv.save(path, model, optimizer, step=1, extra={"note": [1]})
    return path, model, optimizer


def generators():
    _, keys, *rest = numpy.random.get_state()
    return bits([torch.get_rng_state(), random.getstate(), keys.tolist(), rest])


@pytest.fixture
def forged(origin, tmp_path):
    """Writes the checkpoint again, with an edit; loading it must change nothing."""
    path, model, optimizer = origin
    tensors, document = read_tensors(path, checkpoint.FORMAT, checkpoint.VERSION)

    def forge(edit, optimizer=optimizer):
        changed, parts = copy.deepcopy(document), dict(tensors)
        del changed["crc32"]
        edit(changed, parts)
        write_tensors(tmp_path / "forged", parts, changed)
        before, drawn = everything(model, optimizer), generators()
        with pytest.raises(qv.CheckpointError) as error:
            qv.load(tmp_path / "forged", model, optimizer)
        assert str(error.value).startswith(f"{tmp_path}/forged: ")
        assert str(error.value).count("\n") == 0
        assert everything(model, optimizer) == before
        assert generators() == drawn
        return str(error.value)

    return forge


def paths_of(value, prefix=()):
    """The places of a document's values; of long lists and objects the first few."""
    items = {dict: lambda: value.items(), list: lambda: enumerate(value)}.get(type(value), list)
    for key, inner in list(items())[: 2 if len(prefix) > 1 else 9]:
        yield (*prefix, key)
        yield from paths_of(inner, (*prefix, key))


def at(document, path):
    for key in path:
        document = document[key]
    return document


def put(document, path, value):
    at(document, path[:-1])[path[-1]] = value


def is_kind(old, value):
    """Whether a reader cannot tell `value` from what stood there."""
    number = (float, int)
    return type(old) is type(value) or (isinstance(old, float) and isinstance(value, number))


# The extra is the caller's; format and version are tested above all others.
FREE = ("extra", "version", "format")


def test_every_field_of_another_type(origin, forged):
    _, document = read_tensors(origin[0], checkpoint.FORMAT, checkpoint.VERSION)
    del document["crc32"]
    fields = [path for path in paths_of(document) if path[0] not in FREE]
    assert len(fields) > 60
    for path in fields:
        old = at(document, path)
        for value in (None, [], {}, "x", -1.5, True):
            if not is_kind(old, value):
                assert forged(lambda d, t, p=path, v=value: put(d, p, v)), (path, value)


def test_every_field_that_is_missing(origin, forged):
    _, document = read_tensors(origin[0], checkpoint.FORMAT, checkpoint.VERSION)
    del document["crc32"]
    for path in paths_of(document):
        # An option that the file lacks stays as it is, and so does NumPy's generator.
        if path[0] != "extra" and path[:2] not in (("optimizer", "options"), ("random", "numpy")):
            assert forged(lambda d, t, p=path: at(d, p[:-1]).pop(p[-1])), path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d, t: d.update(step=-1), "step must be 0 or more"),
        (lambda d, t: d["aliases"].update(a="nothing"), "a cannot stand for nothing"),
        (
            lambda d, t: d["scaled"].update(nothing=next(iter(d["scaled"].values()))),
            "nothing.qdata",
        ),
        (lambda d, t: d["optimizer"]["options"].pop(), "one set of options for each group"),
        (lambda d, t: d["optimizer"]["options"][0].update(params=[]), "params"),
        (lambda d, t: d["optimizer"]["options"][0].update(betas=[0.9]), "betas"),
        (lambda d, t: d["optimizer"]["options"][0].update(lr="fast"), "lr is"),
        (lambda d, t: t.pop("rng.torch"), "torch's is missing"),
        (
            lambda d, t: t.update({"rng.torch": torch.zeros(9, dtype=torch.uint8)}),
            "generator torch",
        ),
        (lambda d, t: t.update({"rng.torch": torch.zeros(5056)}), "wanted bytes"),
        (lambda d, t: d.pop("random"), "random must be an object"),
        (lambda d, t: d["random"].pop("python"), "random lacks python"),
        (lambda d, t: d["random"]["python"].pop(), "random.python has 2 values"),
        (lambda d, t: d["random"]["python"][1].pop(), "624 words"),
        (lambda d, t: d["random"]["python"][1].__setitem__(-1, 625), "position 625"),
        (lambda d, t: d["random"]["python"][1].__setitem__(-1, -1), "position -1"),
        (lambda d, t: d["random"]["python"][1].__setitem__(0, 2**32), "words of 32 bits"),
        (lambda d, t: d["random"]["python"].__setitem__(0, 7), "generator python"),
        (lambda d, t: d["random"]["python"].__setitem__(2, "x"), "random.python[2]"),
        (lambda d, t: d["random"]["numpy"].__setitem__(2, 10**6), "position 1000000"),
        (lambda d, t: d["random"]["numpy"].__setitem__(2, -1), "position -1"),
        (lambda d, t: d["random"]["numpy"].__setitem__(0, "PCG64"), "PCG64"),
        (lambda d, t: d["random"]["numpy"].__setitem__(1, 5), "random.numpy[1] must be a list"),
    ],
)
def test_values_out_of_range(forged, edit, message):
    assert message in forged(edit)


@pytest.mark.parametrize(("left", "word"), [(625, 0), (600, 100), (2, 625), (0, 0), (5, -1)])
def test_a_state_of_torchs_generator_that_reads_outside(forged, left, word):
    def edit(document, tensors):
        state = tensors["rng.torch"].clone()
        state[8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
        state[16:24] = torch.tensor([word], dtype=torch.int64).view(torch.uint8)
        tensors["rng.torch"] = state

    assert "random generator torch" in forged(edit)


@pytest.mark.parametrize("draws", [0, 1, 300, 623, 624, 625])
def test_every_state_that_generators_have_is_accepted(tmp_path, draws):
    model, optimizer = make()
    for _ in range(draws):
        torch.rand(1), random.random(), numpy.random.rand()
    random.gauss(0, 1), numpy.random.randn()
    qv.save(tmp_path / "state", model, optimizer)
    expected = torch.rand(3), random.gauss(0, 1), numpy.random.randn()
    qv.load(tmp_path / "state", model, optimizer)
    assert bits((torch.rand(3), random.gauss(0, 1), numpy.random.randn())) == bits(expected)


@pytest.mark.parametrize("value", [-1.0, -60.0, 32.0, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 3])
def test_a_history_that_no_cast_can_leave(forged, place, value):
    """A negative count made casts write before the buffer."""
    if place == 3 and value > 0 and value != float("inf"):
        return

    def edit(document, tensors):
        name = next(n for n in tensors if n.endswith("input_history"))
        tensors[name] = tensors[name].clone()
        tensors[name][place] = value

    assert "input_history" in forged(edit)


def test_another_layout_of_the_same_shapes(forged):
    def edit(document, tensors):
        name = next(n for n in document["scaled"] if n.endswith("exp_avg"))
        document["scaled"][name]["dtype"] = "bfloat16"

    assert "dtype is float32 here, bfloat16 in the file" in forged(edit)


def test_a_description_that_no_tensor_has(origin, forged):
    """Without a state in memory its layout comes from the file."""
    model = origin[1]
    fresh = qv.AdamW(model.parameters(), lr=1e-2, recipe="fp8lm-o2")

    def edit(change):
        def apply(document, tensors):
            name = next(n for n in document["scaled"] if n.endswith("exp_avg"))
            document["scaled"][name].update(change)

        return apply

    changes = [{"format": "e9m9"}, {"format": "f16"}, {"grain": "row"}, {"dtype": "int8"}]
    changes += [{"block": 0, "grain": "block"}, {"expand": True}, {"extra": 1}]
    for change in changes:
        assert forged(edit(change), fresh)


def test_what_does_not_fit_is_refused_before_the_tensors_are_read(origin, monkeypatch):
    def refuse(self):
        raise AssertionError("the tensors were read")

    monkeypatch.setattr(TensorFile, "read", refuse)
    for name in ("bf16", "fp8lm-o1"):
        with pytest.raises(qv.CheckpointError, match="in the file"):
            qv.load(origin[0], *make(name))


def test_scalars_of_other_libraries_are_numbers(tmp_path):
    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = numpy.float32(0.5)
    extra = {"loss": numpy.float32(2), "best": torch.tensor(3), "epoch": numpy.int64(4)}
    qv.save(tmp_path / "state", model, optimizer, step=numpy.int64(3), extra=extra)
    found = qv.load(tmp_path / "state", model, optimizer)
    assert found == {"step": 3, "extra": {"loss": 2.0, "best": 3, "epoch": 4}}
    for wrong in (1.5, "3", -1, None):
        with pytest.raises(qv.CheckpointError, match="step must be"):
            qv.save(tmp_path / "state", model, step=wrong)


def test_home_and_path_like(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, _ = make()
    qv.save("~/a/state", model, step=2)
    assert qv.load(tmp_path / "a" / "state", model) == qv.load("~/a/state", model)
    with pytest.raises(qv.CheckpointError, match=f"{tmp_path}/b: no such file"):
        qv.load("~/b", model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda notes: notes.pop("random"),
        lambda notes: notes.update(random={}),
        lambda notes: notes.update(parallel={"mu": {"x": "y"}}),
        lambda notes: notes["random"][0].pop("plain"),
        lambda notes: notes["random"][0]["tensors"].update(torch="not base64!"),
        lambda notes: notes["random"][0]["tensors"].update(torch="AAAA"),
        lambda notes: notes["random"][0]["plain"]["numpy"].__setitem__(2, 10**6),
    ],
)
def test_what_ranks_add_to_a_checkpoint_is_checked_too(tmp_path, damage):
    path = tmp_path / "state"
    model, optimizer = make("fp8lm-o2")
    qv.distributed.save(path, model, optimizer, extra="x")
    assert qv.distributed.load(path, model, optimizer)["extra"] == "x"
    tensors, document = read_tensors(path, checkpoint.FORMAT, checkpoint.VERSION)
    damage(document["extra"]["quaver ranks"])
    write_tensors(path, tensors, {k: v for k, v in document.items() if k != "crc32"})
    step(model, optimizer, 1)
    before, drawn = everything(model, optimizer), generators()
    with pytest.raises(qv.CheckpointError, match=str(path)):
        qv.distributed.load(path, model, optimizer)
    assert everything(model, optimizer) == before
    assert generators() == drawn


def test_a_recipe_that_differs_is_named_with_its_remedy(origin):
    with pytest.raises(qv.CheckpointError, match="convert the model by the recipe that saved it"):
        qv.load(origin[0], *make("bf16"))
    with pytest.raises(qv.CheckpointError, match="build it as it was, or load the model alone"):
        qv.load(origin[0], *make("fp8lm-o1"))
