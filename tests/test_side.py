"""Side tuning of our own models: the start, gradients, what is saved, files, bad arguments."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quaver as qv
from quaver.errors import CheckpointError, FileError
from quaver.models import Config, build

LLAMA = Config(vocab=64, dim=64, layers=3, heads=4, kv_heads=2, ffn=96, context=32)
CONFIGS = [LLAMA, LLAMA.replace(family="gpt", kv_heads=4)]


def base(config=LLAMA, seed=0):
    torch.manual_seed(seed)
    return build(config)


def side(config=LLAMA, mixed=True, seed=0, **options):
    """A side-tuned model; `mixed` takes it away from its start."""
    model = qv.side_tune(base(config, seed), **{"reduction": 2, "adapter": 4} | options)
    if mixed:
        torch.manual_seed(7)
        with torch.no_grad():
            model.side_network.alpha.uniform_(0.2, 0.8)
            model.side_network.gamma.normal_()
            for p in model.side_network.parameters():
                if p.dim() > 1:
                    p.mul_(4)
    return model


def tokens(batch=2, length=12, seed=0):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    logits = model(x[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.family)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [True, False])
def test_it_starts_at_the_models_own_output(config, dtype, stream):
    plain = base(config).to(dtype)
    wanted = plain(tokens())
    model = qv.side_tune(plain, reduction=2, adapter=4, backbone="keep", stream=stream)
    assert model is plain and torch.equal(model(tokens()), wanted)
    other = qv.side_tune(
        base(config).to(dtype), reduction=2, adapter=4, backbone="keep", init="reference"
    )
    assert not torch.equal(other(tokens()), wanted)


def rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def layer_norm(x, weight, bias, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def oracle_block(x, p, heads, kv_heads):
    """A Llama block written out, of parameters {name: tensor}."""
    batch, length, width = x.shape
    d = width // heads
    a = rms_norm(x, p["norm1.weight"], 1e-5)
    q, k, v = (a @ p["attention.qkv.weight"].t()).split((width, kv_heads * d, kv_heads * d), -1)
    q, k, v = (t.view(batch, length, -1, d).transpose(1, 2) for t in (q, k, v))
    angle = torch.outer(
        torch.arange(length, dtype=torch.float32),
        10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float32) / d),
    )
    cos, sin = torch.cat([angle.cos()] * 2, -1).to(x), torch.cat([angle.sin()] * 2, -1).to(x)
    turn = lambda t: t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin  # noqa: E731
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (turn(k), v))
    scores = turn(q) @ k.transpose(2, 3) / math.sqrt(d)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
    y = (scores @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + y @ p["attention.out.weight"].t()
    a = rms_norm(x, p["norm2.weight"], 1e-5)
    gate, up = (a @ p["mlp.gate_up.weight"].t()).chunk(2, -1)
    return x + (gate * gate.sigmoid() * up) @ p["mlp.down.weight"].t()


def oracle_loss(p, x, config, reduction):
    """The loss of a side-tuned Llama, of {name: f64 tensor}; see nn/side.py for the formula."""
    part = lambda prefix: {k[len(prefix) :]: v for k, v in p.items() if k.startswith(prefix)}  # noqa: E731

    def down(i, f):
        q = part(f"side_network.down.{i}.")
        a = f @ q["0.weight"].t()
        return layer_norm(a * a.sigmoid() @ q["2.weight"].t(), q["3.weight"], q["3.bias"])

    f = p["embed.weight"][x[:, :-1]]
    h = down(0, f)
    for i in range(config.layers):
        f = oracle_block(f, part(f"blocks.{i}."), config.heads, config.kv_heads)
        beta = p["side_network.gamma"][i].sigmoid()
        mixed = (1 - beta) * down(i, f) + beta * h
        h = oracle_block(
            mixed, part(f"side_network.blocks.{i}."), config.heads // reduction,
            max(1, config.kv_heads // reduction),
        )  # fmt: skip
    h = rms_norm(h, p["side_network.norm.weight"], 1e-6)
    up = h @ p["side_network.up.weight"].t() + p["side_network.up.bias"]
    alpha = p["side_network.alpha"]
    out = alpha * rms_norm(f, p["norm.weight"], 1e-5) + (1 - alpha) * up
    logits = out @ p["lm_head.weight"].t()
    return -logits.log_softmax(-1).gather(2, x[:, 1:, None]).mean()


@pytest.mark.parametrize("stream", [True, False])
def test_gradients_are_those_of_the_formula(stream):
    model = side(backbone="keep", stream=stream)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    p = {n: t.detach().double() for n, t in model.named_parameters()}
    for name in names:
        p[name].requires_grad_()
    wanted = oracle_loss(p, tokens(), LLAMA, 2)
    wanted.backward()
    worst = {}
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model.to(dtype).zero_grad()
        if dtype == torch.float64:  # the model keeps angles in f32, as the oracle does
            model.cos, model.sin = model.cos.float(), model.sin.float()
        loss_of(model, tokens()).backward()
        worst[dtype] = max(
            ((q.grad.double() - p[n].grad).norm() / p[n].grad.norm()).item()
            for n, q in model.named_parameters() if q.requires_grad
        )  # fmt: skip
        assert worst[dtype] < most
    print(f"largest relative error of a gradient: {worst}")


@pytest.mark.parametrize("backbone", ["nf4", "fp8", "keep"])
def test_nothing_of_the_model_trains_or_is_saved(backbone):
    model, inside, saved = side(backbone=backbone), [False], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True), prepend=False)
        block.register_forward_hook(lambda *_: inside.__setitem__(0, False), prepend=True)

    def pack(t):
        saved.append(inside[0])
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, tokens())
    loss.backward()
    assert saved and not any(saved)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(n.startswith("side_network.") for n in trains)
    assert len(model.side_parameters()) == len(trains)
    assert all((p.grad is not None) == (n in trains) for n, p in model.named_parameters())


def alive_outputs(model):
    """The largest number of blocks' outputs that are alive behind any block."""
    outputs, alive = [], []

    def count(module, arguments, output):
        outputs.append(weakref.ref(output))
        del output
        alive.append(sum(r() is not None for r in outputs))

    for block in model.blocks:
        block.register_forward_hook(count)
    with torch.no_grad():
        model(tokens())
    return max(alive)


def test_streamed_outputs_are_freed_behind_their_side_block():
    assert alive_outputs(side(stream=True)) <= 2
    assert alive_outputs(side(stream=False)) == LLAMA.layers


@pytest.mark.parametrize("options", [
    {"backbone": "nf4"}, {"backbone": "fp8"}, {"backbone": "keep", "init": "reference"},
    {"recipe": "tensorwise"}, {"recipe": "fp8lm-o2"}, {"recipe": "coat"}, {"stream": False},
], ids=str)  # fmt: skip
def test_it_learns(options):
    model = side(mixed=False, **options)
    recipe = options.get("recipe", "bf16")
    optimizer = qv.AdamW(model.side_parameters(), lr=0.02, recipe=recipe)
    losses = []
    for _ in range(20):
        loss = loss_of(model, tokens(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def test_groups_hold_every_parameter_once_and_the_mix_at_ten_times_the_rate():
    model = side()
    rest, mix = model.side_parameter_groups(0.01)
    assert {*rest["params"], *mix["params"]} == {*model.side_parameters()}
    assert len(rest["params"]) == len(model.side_parameters()) - 1
    assert mix["params"] == [model.side_network.alpha]
    assert (rest["lr"], mix["lr"]) == (0.01, 0.1)
    optimizer = qv.AdamW([rest, mix], lr=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]


def test_a_copy_is_another_model():
    model = side()
    twin, wanted = copy.deepcopy(model), model(tokens())
    with torch.no_grad():
        for p in model.side_parameters():
            p.zero_()
    assert torch.equal(twin(tokens()), wanted) and not torch.equal(model(tokens()), wanted)


def test_files_hold_the_side_network_alone(tmp_path):
    model = side(LLAMA.replace(dim=256, ffn=512, vocab=64), adapter=16)
    model.save_pretrained(tmp_path / "new" / "side")
    (path,) = (tmp_path / "new" / "side").iterdir()
    size = sum(p.nbytes for p in model.side_parameters())
    print(f"{path.stat().st_size / size:.4f} of the side parameters' bytes")
    assert path.stat().st_size <= 1.02 * size
    twin = side(LLAMA.replace(dim=256, ffn=512, vocab=64), mixed=False, adapter=16)
    twin.load(path.parent)
    assert torch.equal(twin(tokens()), model(tokens()))
    for a, b in zip(model.side_parameters(), twin.side_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["tensorwise", "fp8lm-o2", "coat"])
def test_files_of_a_side_network_in_fp8(recipe, tmp_path):
    model = side(mixed=False, recipe=recipe)
    optimizer = qv.AdamW(model.side_parameters(), lr=0.02, recipe=recipe)
    for _ in range(3):
        loss_of(model, tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    twin = side(mixed=False, recipe=recipe)
    twin.load(tmp_path)
    assert torch.equal(twin.eval()(tokens()), model.eval()(tokens()))


def test_training_goes_on_to_the_same_bits_behind_a_file(tmp_path):
    def steps(model, optimizer, first, last):
        for i in range(first, last):
            loss_of(model, tokens(seed=i)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = side(mixed=False)
    optimizer = qv.AdamW(model.side_parameters(), lr=0.02)
    steps(model, optimizer, 0, 3)
    model.save_pretrained(tmp_path)
    states = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, 3, 6)
    twin = side(mixed=False)
    twin.load(tmp_path)
    other = qv.AdamW(twin.side_parameters(), lr=0.02)
    other.load_state_dict(states)
    steps(twin, other, 3, 6)
    for a, b in zip(model.side_parameters(), twin.side_parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    model = side()
    model.save_pretrained(tmp_path)

    def refused(other, reason, error=CheckpointError):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(error, match=reason):
            other.load(tmp_path)
        after = other.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())

    refused(side(seed=1, mixed=False), "it belongs to another base model")
    refused(side(adapter=8), "tuned with adapter 4, this model with 8")
    refused(side(backbone="fp8"), "tuned with backbone 'nf4', this model with 'fp8'")
    path = tmp_path / "side.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(side(mixed=False), "side.safetensors", FileError)
    path.unlink()
    refused(side(mixed=False), "side.safetensors", FileError)


def test_a_pickled_model_is_the_same(tmp_path):
    model = side()
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(twin(tokens()), model(tokens()))
    twin.side_network.alpha.data.zero_()
    assert not torch.equal(twin(tokens()), model(tokens()))


class MyLinear(nn.Linear):
    pass


def test_matrices_that_cannot_be_encoded_are_named():
    model = base()
    model.blocks[1].mlp.down = MyLinear(96, 64, bias=False)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.down is a MyLinear .* backbone=\"keep\""):
        qv.side_tune(model, reduction=2)
    assert torch.isfinite(qv.side_tune(model, reduction=2, backbone="keep")(tokens())).all()
    model = base()
    model.blocks[1].to("meta")
    with pytest.raises(ValueError, match=r"on several devices \(cpu, meta\)"):
        qv.side_tune(model, reduction=2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = LLAMA
        self.first, self.second = (nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))


def test_wrong_arguments_are_named():
    for options, reason in (
        ({"reduction": 3}, "reduction 3 does not divide the 64 values .* take one of 2, 4"),
        ({"reduction": 8}, "reduction 8 does not divide the 4 attention heads; take one of 2, 4"),
        ({"reduction": 0}, "reduction must be a positive whole number, got 0"),
        ({"adapter": True}, "adapter must be a positive whole number, got True"),
        ({"backbone": "int8"}, "backbone must be one of nf4, fp8, keep, got 'int8'"),
        ({"init": "zero"}, "init must be one of paper, reference, got 'zero'"),
        ({"recipe": "fp7"}, "unknown recipe 'fp7'"),
    ):
        model = base()
        with pytest.raises(ValueError, match=reason):
            qv.side_tune(model, **options)
        assert all(p.requires_grad for p in model.parameters()) and type(model) is type(base())
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        qv.side_tune(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Twice has several lists of blocks \(first, second\)"):
        qv.side_tune(Twice())
    with pytest.raises(ValueError, match="the model is side-tuned already"):
        qv.side_tune(side())
    with pytest.raises(ValueError, match=r"the model was converted to FP8; restore it first"):
        qv.side_tune(qv.convert(base(), "tensorwise"))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        qv.side_tune("model")
