"""Tensor and sequence parallelism over real processes, against the model in one process."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FP8, assert_same, randn
from rank_pool import run
from torch import nn
from torch.utils.checkpoint import checkpoint

import quaver as qv
from quaver import ScaledTensor, models, recipe
from quaver.distributed import Transport
from quaver.distributed import tensor_parallel as tp
from quaver.distributed.tensor_parallel import sequence
from quaver.distributed.tensor_parallel.state import join
from quaver.nn.weight import cast_weight
from quaver.placement import shard_of

E4M3, E5M2 = FP8
CONFIG = models.Config(dim=64, layers=2, heads=8, kv_heads=4, ffn=96, context=64)
TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
F32 = 2.0**-24


def plain(t):
    return t.dequantize() if isinstance(t, ScaledTensor) else t


def variant(**changes):
    base = recipe.get("fp8lm-o2")
    return dataclasses.replace(base, linear=dataclasses.replace(base.linear, **changes))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 48)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def mlp(name, seed=0):
    torch.manual_seed(seed)
    return qv.convert(Mlp(), recipe=name)


PLAN = {"up": tp.ColumnParallel(), "down": tp.RowParallel()}
X, DY = randn(3, 16, 64, seed=1), randn(3, 16, 48, seed=2)


def whole_gradients(model):
    """Decoded and whole, of every parameter."""
    found = {}
    for name, p in model.named_parameters():
        shard = shard_of(p)
        found[name] = plain(p.grad).clone() if shard is None else join(p.grad, shard)
    return found


def mlp_on_a_rank(rank, name, fp8_sum, regather):
    transport = Transport()
    model = tp.parallelize(mlp(name), transport, PLAN, fp8_sum=fp8_sum, regather=regather)
    x = sequence.own(X, transport).requires_grad_()
    y = model(x)
    y.backward(sequence.own(DY, transport))
    whole = sequence.gather(y.detach(), transport), sequence.gather(x.grad, transport)
    return *whole, whole_gradients(model)


def mlp_alone(name):
    model = mlp(name)
    x = X.clone().requires_grad_()
    y = model(x)
    y.backward(DY)
    return y.detach(), x.grad, {n: plain(p.grad) for n, p in model.named_parameters()}


def parts_of_products(name, ranks):
    """f64 [ranks, rows, columns]: what the ranks sum, forward and backward, and the tensors that
    are multiplied, from the model in one process."""
    model = mlp(name)
    x = X.clone().requires_grad_()
    hidden = model.up(x)
    hidden.retain_grad()
    act = F.gelu(hidden)
    model.down(act).backward(DY)

    def product(a, weight, scale, dtype):
        a = qv.quantize(a.reshape(-1, a.shape[-1]), dtype)
        a, w = a.dequantize().double(), weight.double() * scale.double()
        runs = zip(a.chunk(ranks, 1), w.chunk(ranks, 1), strict=True)
        return torch.stack([p @ q.t() for p, q in runs]), a.abs() @ w.abs().t(), w

    down, down_scale = cast_weight(model.down.weight, E4M3, both=False)[:2]
    up, up_scale = cast_weight(model.up.weight, E4M3, both=False)[:2]
    forward = product(act.detach(), down, down_scale, E4M3)
    backward = product(hidden.grad, up.t(), up_scale, E5M2)
    return (*forward, act.detach()), (*backward, hidden.grad)


def step_of(x, dtype):
    """The smallest step of x's FP8 codes."""
    return qv.quantize(x, dtype).scale * (2.0**-9 if dtype == E4M3 else 2.0**-16)


def bound(parts, magnitude, weight, operand, dtype, wire):
    """Of a sum over ranks against one product. In f32: the order of summation. A rank's own scale
    keeps values below the whole tensor's normal range better: by at most half the smallest step,
    against which one process errs by as much. In FP8: each part by half an ulp, or half a step."""
    k = weight.shape[1]
    total = 4 * k * F32 * magnitude + step_of(operand, dtype) * weight.abs().sum(1)
    if wire is not None:
        half, step = (2.0**-4, 2.0**-9) if wire == E4M3 else (2.0**-3, 2.0**-16)
        largest = parts.abs().max() + total.max()
        total = total * (1 + half) + (parts.abs() * half).sum(0)
        total = total + len(parts) * step / 2 * 2 * largest / torch.finfo(wire).max
    return total


# Current scaling and f32 gradients show the arithmetic; O2 is what is trained with.
@pytest.mark.parametrize("name", ["tensorwise", "fp8lm-o2"])
@pytest.mark.parametrize(
    ("ranks", "fp8_sum", "regather"),
    [(2, False, None), (2, True, True), (4, False, False), (4, True, None)],
)
def test_column_then_row(name, ranks, fp8_sum, regather):
    results = run(ranks, mlp_on_a_rank, name, fp8_sum, regather)
    y, dx, gradients = results[0]
    wanted_y, wanted_dx, wanted = mlp_alone(name)
    forward, backward = parts_of_products(name, ranks)
    limit = bound(*forward, E4M3, E4M3 if fp8_sum else None)
    assert ((y - wanted_y).reshape(limit.shape).abs() <= limit).all()
    limit = bound(*backward, E5M2, E5M2 if fp8_sum else None)
    assert ((dx - wanted_dx).reshape(limit.shape).abs() <= limit).all()
    # The products are those of one process, except for a rank's own scale, as in `bound`. e4m3
    # gradients may err by half an ulp each, or half a step, besides.
    act, hidden_grad = forward[-1], backward[-1]
    own_scale = {
        "up.weight": step_of(hidden_grad, E5M2) * X.abs().sum((0, 1)),
        "down.weight": step_of(act, E4M3) * DY.abs().sum((0, 1))[:, None],
    }
    for key, gradient in gradients.items():
        w = wanted[key]
        limit = own_scale.get(key, 0) + 100 * F32 * w.abs().max()
        if name == "fp8lm-o2" and key.endswith("weight"):
            limit = limit * (1 + 2.0**-3) + 2.0**-3 * w.abs() + step_of(w, E4M3)
        assert ((gradient - w).abs() <= limit).all(), key
    for other_y, other_dx, other in results[1:]:
        assert_same(other_y, y)
        assert_same(other_dx, dx)
        assert_same(other["down.bias"], gradients["down.bias"])  # replicated


class NormMlp(Mlp):
    """A norm that hands FP8 to the layer behind it, under coat."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)

    def forward(self, x):
        return super().forward(self.norm(x))


def norm_mlp():
    torch.manual_seed(0)
    return qv.convert(NormMlp(), recipe="coat")


def norm_mlp_on_a_rank(rank):
    transport = Transport()
    model = tp.parallelize(norm_mlp(), transport, PLAN | {"norm": tp.SequenceParallel()})
    assert isinstance(model.norm, qv.nn.norm.Norm)  # it does hand over FP8
    x = sequence.own(X, transport).requires_grad_()
    y = model(x)
    y.backward(sequence.own(DY, transport))
    whole = sequence.gather(y.detach(), transport), sequence.gather(x.grad, transport)
    return *whole, whole_gradients(model)


def test_a_norm_that_hands_over_fp8_before_a_gather():
    """coat's norm has a scale of its own on each rank, and the gather casts again with that of all.
    Both are powers of two: only values below the smallest normal change, and a gradient in bf16 by
    one rounding."""
    model = norm_mlp()
    x = X.clone().requires_grad_()
    y = model(x)
    y.backward(DY)
    wanted = [y.detach(), x.grad, *(plain(p.grad) for _, p in sorted(model.named_parameters()))]
    for got in run(2, norm_mlp_on_a_rank):
        found = [*got[:2], *(g for _, g in sorted(got[2].items()))]
        for mine, alone in zip(found, wanted, strict=True):
            off = (mine.float() - alone.float()).norm() / alone.float().norm()
            assert off < 2.0**-9, off


def decoder(kind, name, seed=0):
    torch.manual_seed(seed)
    if kind == "huggingface":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        model = models.build(CONFIG.replace(family=kind))
    return qv.convert(model, recipe=name)


def loss_of(model, name, tokens=TOKENS):
    dtype = recipe.get(name).autocast
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()), logits


def decoder_on_a_rank(rank, kind, name, options):
    model = decoder(kind, name, seed=rank)  # rank 0's values are what all start from
    tp.parallelize(model, dist.group.WORLD, **options)
    return trained(model, name)


def trained(model, name):
    """Loss, norm, logits and gradients of a step, and what is replicated after it."""
    optimizer = qv.AdamW(model.parameters(), lr=1e-3, recipe=name)
    loss, logits = loss_of(model, name)
    loss.backward()
    gradients = whole_gradients(model)
    norm = qv.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    replicated = {n: p.detach() for n, p in model.named_parameters() if not shard_of(p)}
    return loss.item(), norm.item(), logits.detach(), gradients, replicated


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("kind", ["llama", "gpt", "huggingface"])
@pytest.mark.parametrize(
    ("ranks", "name", "options"),
    [
        (2, "f32", {}),
        (4, "bf16", {}),
        (2, "fp8lm-o2", {"fp8_sum": True}),
        (4, "fp8lm-o2", {}),
        (2, "coat", {}),
        (2, "blockwise", {"regather": True}),
        (4, "rowwise", {}),
        (2, "blockwise", {"fp8_sum": True}),
    ],
)
def test_a_decoder_gives_what_it_gives_in_one_process(kind, ranks, name, options):
    alone = trained(decoder(kind, name), name)
    results = run(ranks, decoder_on_a_rank, kind, name, options)
    loss, norm, logits, gradients, replicated = results[0]
    # f32: sums in another order. bf16: an ulp where a sum was rounded once more. FP8: a value that
    # came out otherwise, or was sent in FP8, moves by half an ulp of its code, in every layer.
    limit, gradient_limit = {"f32": (1e-5, 1e-5), "bf16": (2.0**-7, 2.0**-6)}.get(
        name, (CONFIG.layers * 2.0**-5, CONFIG.layers * 2.0**-3)
    )
    assert relative(logits, alone[2]) <= limit
    assert loss == pytest.approx(alone[0], rel=limit**2 + 1e-6)
    assert norm == pytest.approx(alone[1], rel=limit)
    for key, gradient in gradients.items():
        assert relative(gradient, alone[3][key]) <= gradient_limit, key
    for other in results[1:]:
        assert other[:2] == (loss, norm)
        assert_same(other[2], logits)
        for key, value in replicated.items():
            assert_same(other[4][key], value, key)


def one_rank_each(rank):
    group = [dist.new_group([other]) for other in range(2)][rank]
    return trained(tp.parallelize(decoder("llama", "fp8lm-o2"), group), "fp8lm-o2")


def test_one_rank_is_no_parallelism():
    """A group of one changes no bit, except that the embedding's gradient is sent in bf16."""
    _, _, wanted, alone, _ = trained(decoder("llama", "fp8lm-o2"), "fp8lm-o2")
    for _, _, logits, gradients, _ in run(2, one_rank_each):
        assert_same(logits, wanted)
        for key in gradients.keys() - {"embed.weight"}:
            assert_same(gradients[key], alone[key], key)
        assert relative(gradients["embed.weight"], alone["embed.weight"]) <= 2.0**-8


LAYERS = 6


def bytes_on_a_rank(rank, runs):
    found = []
    for name, options in runs:
        model = models.build(CONFIG.replace(layers=LAYERS))
        transport = Transport()
        tp.parallelize(qv.convert(model, recipe=name), transport, **options)
        loss_of(model, name)[0].backward()
        found.append(transport.traffic)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_on_the_wire(ranks):
    """By the formula, and under the bars."""
    unit = TOKENS.numel() * 64 * (ranks - 1) // ranks  # values of a hidden state that a rank sends
    halves, edges = 2 * LAYERS, 2 * 2  # attention and MLP; embedding and head, in bf16
    wanted = [
        ({"regather": True}, 3 + 2 * 2, None),  # gathers of a byte, sums of two
        ({"regather": False}, 2 + 2 * 2, 0.67),
        ({"regather": True, "fp8_sum": True}, 3 + 2, 0.52),
        ({"regather": False, "fp8_sum": True}, 2 + 2, 0.52),
        ({}, 3 + 2 * 2 if ranks > 2 else 2 + 2 * 2, 0.67 if ranks == 2 else None),
    ]
    runs = [("bf16", {}), *(("fp8lm-o2", options) for options, _, _ in wanted)]
    results = run(ranks, bytes_on_a_rank, runs)
    assert all(result == results[0] for result in results)
    bf16, *fp8 = results[0]
    assert bf16["activation"] == unit * (halves * 2 * (3 + 2) + edges)
    for found, (options, of_a_half, bar) in zip(fp8, wanted, strict=True):
        assert found["activation"] == unit * (halves * of_a_half + edges)
        # An amax, 4 bytes, goes around in every shared cast: input, output gradient, and sums.
        casts = halves * (4 if "fp8_sum" in options else 2)
        assert found["scale"] == casts * (2 * 4 * (ranks - 1) // ranks)
        sent = found["activation"] + found["scale"]
        assert bar is None or sent / bf16["activation"] <= bar


def ways_on_a_rank(rank):
    """Losses, norms and FP8 gradients must not depend on how a step is run."""
    found = []
    for way in ("plain", "checkpoint", "no regather"):
        options = {"regather": way != "no regather"}
        model = tp.parallelize(decoder("llama", "fp8lm-o2"), dist.group.WORLD, **options)
        if way == "checkpoint":
            for block in model.blocks:
                block.forward = lambda *a, inner=block.forward: checkpoint(
                    inner, *a, use_reentrant=False
                )
        for _ in range(2):  # micro-batches
            loss_of(model, "fp8lm-o2")[0].backward()
        with torch.no_grad():
            evaluated = loss_of(model.eval(), "fp8lm-o2")[0]
        histories = [b for n, b in model.named_buffers() if n.endswith("_history")]
        found.append((evaluated, whole_gradients(model), histories))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_checkpointing_and_keeping_the_sequence_change_nothing(ranks):
    for plain_way, *others in run(ranks, ways_on_a_rank):
        for other in others:
            assert_same(other[0], plain_way[0])
            for key, gradient in plain_way[1].items():
                assert_same(other[1][key], gradient, key)
            for a, b in zip(other[2], plain_way[2], strict=True):
                assert_same(a, b)


def skip_on_a_rank(rank, name):
    model = tp.parallelize(decoder("llama", name), dist.group.WORLD)
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=name)
    loss_of(model, name)[0].backward()
    optimizer.step()
    before = [plain(p).detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss_of(model, name)[0].backward()
    if rank == 1:  # where no other rank can see it
        gradient = model.blocks[1].mlp.down.weight.grad
        for part in (gradient.scale, gradient.amax) if name == "fp8lm-o2" else (gradient,):
            part.fill_(float("nan"))
    norm = qv.clip_grad_norm_(model.parameters(), 1.0)
    largest = qv.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf"))
    optimizer.step()
    same = all(torch.equal(a, plain(p)) for a, p in zip(before, model.parameters(), strict=True))
    skipped = optimizer.skipped
    optimizer.zero_grad()
    loss_of(model, name)[0].backward()
    optimizer.step()
    moved = not torch.equal(before[-1], plain(list(model.parameters())[-1]))
    return norm.item(), largest.item(), same, skipped, moved, optimizer.skipped


@pytest.mark.parametrize("name", ["bf16", "fp8lm-o2"])
def test_a_nan_on_one_rank_makes_all_skip_and_go_on(name):
    for norm, largest, same, skipped, moved, skipped_after in run(2, skip_on_a_rank, name):
        assert math.isnan(norm)
        assert not math.isfinite(largest)
        assert same
        assert skipped == skipped_after == 1
        assert moved


def infinity_on_a_rank(rank):
    """An input that is not finite on one rank alone is seen by all, saturation or not."""
    model = tp.parallelize(mlp("fp8lm-o2"), dist.group.WORLD, PLAN)
    x = sequence.own(X, Transport())
    if rank == 1:
        x[0, 0, 0] = float("inf")
    return model(x).isnan().all().item()


def test_an_infinity_on_one_rank_reaches_all():
    assert all(run(2, infinity_on_a_rank))


def norms_on_a_rank(rank):
    model = tp.parallelize(decoder("llama", "f32"), dist.group.WORLD)
    loss_of(model, "f32")[0].backward()
    two = qv.clip_grad_norm_(model.parameters(), 1e9)
    largest = qv.clip_grad_norm_(model.parameters(), 1e9, norm_type=float("inf"))
    clipped = qv.clip_grad_norm_(model.parameters(), 0.5)
    return two.item(), largest.item(), clipped.item(), whole_gradients(model)


def test_clipping_takes_the_norm_of_the_whole_model():
    model = decoder("llama", "f32")
    loss_of(model, "f32")[0].backward()
    gradients = [p.grad.double() for p in model.parameters()]
    for two, largest, clipped, whole in run(4, norms_on_a_rank):
        wanted = torch.cat([g.flatten() for g in gradients])
        assert two == clipped == pytest.approx(wanted.norm().item(), rel=1e-6)
        assert largest == pytest.approx(wanted.abs().max().item(), rel=1e-5)
        after = torch.cat([g.flatten() for g in whole.values()]).double().norm().item()
        assert after == pytest.approx(0.5, rel=1e-5)
