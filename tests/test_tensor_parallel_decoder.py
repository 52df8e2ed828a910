"""Tensor parallelism of a decoder: values, bytes on the wire, recomputation, skips and clipping."""

import math

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same
from rank_pool import run
from tensor_parallels import CONFIG, TOKENS, decoder, loss_of, plain, whole_gradients
from torch.utils.checkpoint import checkpoint

import quaver as qv
from quaver import models
from quaver.distributed import Transport
from quaver.distributed import tensor_parallel as tp
from quaver.placement import shard_of


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
