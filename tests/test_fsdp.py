"""FSDP2 on converted models: what each world size shows in one start of its processes."""

import pytest
import ranks
import torch
import torch.distributed as dist
from helpers import assert_same
from sharded import (
    CURRENT,
    Model,
    adamw,
    assert_same_state,
    batch,
    build,
    here,
    join,
    loss_of,
    train,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import quaver as qv
from quaver.placement import like
from quaver.tensor import local

WORLDS = (2, 3, 4)


# Several: all that one world size has to show comes from one start of its processes


def _units(model):
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def _gathered():
    """Codes and scale of every gathered weight, and what is left of the memory afterwards."""
    model = qv.distributed.fully_shard(build())
    for unit in _units(model):
        unit.unshard()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, qv.nn.Linear):
            row, scale, col, *_ = module.operands()
            assert col is None and module.fp8_weight is None
            found[name] = row.clone(), scale.clone()
    gathered = [m.weight.qdata for m in model.modules() if isinstance(m, qv.nn.Linear)]
    for unit in _units(model):
        unit.reshard()
    assert all(codes.untyped_storage().nbytes() == 0 for codes in gathered)
    return found


def _gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        yield p, torch.randn(p.shape, generator=generator) * 10.0 ** (step - 2)


def _optimized(rank, size):
    """AdamW on shards with given gradients; a NaN on the last rank in the second step."""
    model = qv.distributed.fully_shard(build())
    optimizer = adamw(model)
    norms = []
    for step in range(4):
        for p, grad in _gradients(model, step):
            part = list(grad.chunk(size)) + [grad[:0]] * size
            p.grad = like(p, part[rank])
        if step == 1 and rank == size - 1:
            next(model.parameters()).grad._local_tensor[0, 0] = torch.nan
        norms += [qv.clip_grad_norm_(model.parameters(), 1e9, kind) for kind in (2.0, torch.inf)]
        optimizer.step()
        optimizer.zero_grad()
    return here(model, optimizer), norms, optimizer.skipped


STEPS = 12


def _trained(rank, size, **options):
    model = qv.distributed.fully_shard(build(), average=False, **options)
    optimizer = adamw(model)
    traffic = qv.distributed.transport_of(model).traffic
    before = dict(traffic)
    losses = train(model, optimizer, range(STEPS), rank, size)
    sent = {kind: n - before[kind] for kind, n in traffic.items()}
    return losses, qv.memory_report(model, optimizer), sent, here(model, optimizer)


def _by_hand(rank, size):
    """torch's own fully_shard, in units of one's own, with a mean of losses; and a forward of
    another initialisation, made one again by sync_scales."""
    model = build()
    mesh = init_device_mesh("cpu", (size,))
    for block in model.llama.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step).chunk(size)[rank])
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item() / size)
    weight = model.llama.blocks[0].mlp.down.weight
    with torch.no_grad():
        local(weight).copy_(torch.full(local(weight).shape, 3.0 + 300 * rank))
    qv.distributed.sync_scales(model)
    return losses, local(weight).scale.clone(), local(weight).dequantize(), local(weight).amax


def _refusal(function, *args, **kwargs):
    with pytest.raises((ValueError, qv.CheckpointError)) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def _refusals(rank, size, folder):
    """The errors of every rank for calls that it must refuse. None of them may hang."""
    shard = qv.distributed.fully_shard
    found = {
        "plain": _refusal(shard, Model()),
        "gradient": _refusal(shard, build(), gradient="int8"),
        "mesh": _refusal(shard, build(), init_device_mesh("cpu", (size, 1))),
        "shape": _refusal(shard, qv.convert(nn.Sequential(nn.Linear(8, 8 + (rank == 1))), skip=())),
        "recipe": _refusal(shard, build("fp8lm-o2" if rank != 1 else CURRENT)),
    }
    torch.manual_seed(rank)
    found["seed"] = _refusal(shard, qv.convert(nn.Sequential(nn.Linear(8, 8)), skip=()))
    model = shard(build())
    optimizer = adamw(model)
    found["again"] = _refusal(shard, model)
    found["dtypes"] = _refusal(shard, build("coat"))
    found["groups"] = _refusal(qv.AdamW, model.parameters(), recipe="coat")
    found["late"] = _refusal(qv.convert, shard(Model(), gradient="f32"))
    found["save"] = _refusal(qv.save, folder / "file", model)
    found["load"] = _refusal(qv.distributed.load, folder / "nothing", model)
    train(model, optimizer, [0], rank, size)
    before = here(model, optimizer)
    qv.distributed.save(folder / "good", model, optimizer, step=1)
    found["key"] = _refusal(
        qv.distributed.save, folder / "good", model, optimizer, extra=object() if rank else None
    )
    assert qv.distributed.load(folder / "good", model)["step"] == 1
    if rank == 0:
        victim = sorted((folder / "good" / "a").iterdir())[size - 1]
        raw = bytearray(victim.read_bytes())
        raw[-1] ^= 1
        victim.write_bytes(raw)
    dist.barrier()
    found["damage"] = _refusal(qv.distributed.load, folder / "good", model, optimizer)
    if rank == 0:
        victim.unlink()
    dist.barrier()
    found["missing"] = _refusal(qv.distributed.load, folder / "good", model, optimizer)
    qv.distributed.save(folder / "good", model, optimizer)
    with torch.no_grad():
        local(model.extra.bias).zero_()
    other = shard(qv.convert(nn.Sequential(nn.Linear(8, 8)), skip=()), gradient="f32")
    found["other"] = _refusal(qv.distributed.load, folder / "good", other)
    qv.distributed.load(folder / "good", model, optimizer)
    assert_same_state(here(model, optimizer), before)
    return found


def _everything(rank, size, folder):
    return {
        "gathered": _gathered(),
        "optimized": _optimized(rank, size),
        "trained": _trained(rank, size),
        "trained in f32": _trained(rank, size, gradient="f32"),
        "by hand": _by_hand(rank, size),
        "refusals": _refusals(rank, size, folder),
    }


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    """The findings of the ranks: a list, one entry a rank."""
    folder = tmp_path_factory.mktemp("fsdp")
    return ranks.run(request.param, _everything, request.param, folder, timeout=120)


def test_gathered_codes_are_those_of_one_process(world):
    model = build()
    for found in world:
        for name, module in model.named_modules():
            if isinstance(module, qv.nn.Linear):
                copies = module.refresh()
                row, scale = found["gathered"][name]
                assert_same(row, copies.q, name)
                assert_same(scale, copies.scale, name)


def test_the_optimizer_on_shards_has_the_bits_of_one_process(world):
    model = build()
    optimizer = adamw(model)
    found = [one["optimized"] for one in world]
    for step in range(4):
        for p, grad in _gradients(model, step):
            p.grad = grad
        two, largest = found[0][1][2 * step : 2 * step + 2]
        if step == 1:  # it leaves no trace
            assert two.isnan() and not largest.isfinite()
            continue
        # Sums of squares in f64, of parts whose norms were rounded to f32.
        ours = qv.clip_grad_norm_(model.parameters(), 1e9)
        torch.testing.assert_close(two, ours, rtol=2**-23, atol=0)
        assert_same(largest, qv.clip_grad_norm_(model.parameters(), 1e9, torch.inf))
        optimizer.step()
    for _, norms, skipped in found:
        assert skipped == 1
        for a, b in zip(norms, found[0][1], strict=True):
            assert_same(a, b)
    assert_same_state(join([parts for parts, _, _ in found]), here(model, optimizer))


@pytest.mark.parametrize("kind", ["trained", "trained in f32"])
def test_trains_as_one_process_does(world, kind):
    """The same losses within what FP8 rounding leaves; the bar for 200 steps is 0.5 %."""
    model = build()
    losses = train(model, adamw(model), range(STEPS))
    assert losses[-1] < losses[0] - 0.1
    for found in world:
        assert found[kind][0] == world[0][kind][0]
        got = torch.tensor(found[kind][0])
        torch.testing.assert_close(got, torch.tensor(losses), rtol=5e-3, atol=0)
    join([found[kind][-1] for found in world])  # scales and amaxes agree


def test_bytes_are_those_of_the_formulas(world):
    size = len(world)
    converted = other = weight_bytes = gradient_bytes = 0
    model = build()
    for unit in (*model.llama.blocks, None):
        inner = unit is not None
        mine = unit.parameters() if inner else [
            p for n, p in model.named_parameters() if not n.startswith("llama.blocks")
        ]  # fmt: skip
        shards = [(-(-len(p) // size) * (p.numel() // len(p)), p) for p in mine]
        low = sum(n for n, p in shards if isinstance(p, qv.ScaledTensor))
        rest = sum(n for n, p in shards if not isinstance(p, qv.ScaledTensor))
        # Backward gathers blocks again; what is outside them stays from forward on.
        weight_bytes += (low + 4 * rest) * (2 if inner else 1)
        gradient_bytes += low + -(-low // 128) + 2 * rest
        converted, other = converted + low, other + rest
    for found in world:
        sent = found["trained"][2]
        assert sent["weight"] == STEPS * (size - 1) * weight_bytes
        assert sent["gradient"] == STEPS * (size - 1) * gradient_bytes
        assert found["trained in f32"][2]["gradient"] == STEPS * (size - 1) * 4 * (
            converted + other
        )
    # Converted weights alone, against bf16 on both ways.
    assert (converted + converted / 128 + len(model.llama.blocks) + 1) / (2 * converted) < 0.52
    # 6 bytes a weight in one process (master 2, moments 1 + 2, e4m3 gradient 1); here the gradient
    # is f32, and all is spread: 9 / size.
    weights = sum(p.numel() for p in model.parameters() if isinstance(p, qv.ScaledTensor))
    for kind, bytes_each in (("master", 2), ("exp_avg", 1), ("exp_avg_sq", 2), ("grad", 4)):
        total = sum(found["trained"][1]["bytes_per_param"][kind] for found in world)
        scales = 0 if kind == "grad" else 8 * 9 * size / weights  # scale and amax of 9 weights
        assert total == pytest.approx(bytes_each + scales, abs=1e-9)
    assert all(found["trained"][1]["weight_fp8"] == 0 for found in world)


def test_torchs_own_fully_shard_takes_a_converted_model(world):
    model = build()
    first = loss_of(model, batch(0)).item()
    for found in world:
        losses, scale, _, amax = found["by hand"]
        assert losses[0] == pytest.approx(first, rel=1e-5)
        assert losses[1] < losses[0]
        assert_same(scale, world[0]["by hand"][1])
        assert amax == 3 + 300 * (len(world) - 1)
    for rank, found in enumerate(world):
        values = found["by hand"][2]
        torch.testing.assert_close(
            values, torch.full_like(values, 3.0 + 300 * rank), rtol=2**-11, atol=0
        )


def test_refusals_name_what_is_wrong_on_every_rank(world):
    size = len(world)
    wanted = {
        "plain": "no FP8 layer; call quaver.convert first",
        "gradient": "gradient must be one of ('e4m3', 'bf16', 'f32'), got 'int8'",
        "mesh": "mesh must have one axis, got 2",
        "shape": "tensor 0 is 0.weight [8, 8] float16",
        "recipe": "tensor 3 is llama.blocks.0.attention.qkv.weight [80, 40] float16",
        "seed": "checksum of 0.weight (were all ranks seeded alike?)",
        "again": "llama.embed.weight is sharded already",
        "dtypes": "parameters of one dtype in a Block, got norm1.weight torch.float32 and",
        "groups": "recipe coat keeps exp_avg in groups of flat elements, which FSDP2's shards",
        "late": "is sharded over ranks; convert before sharding",
        "save": "is sharded over ranks: use quaver.distributed.save",
        "load": "no checkpoint.json",
        "key": "extra must hold JSON values",
        "damage": "is damaged: its checksum does not match",
        "missing": "is missing",
        "other": "the file",
    }
    for found in world:
        assert found["refusals"].keys() == wanted.keys()
        for key, text in wanted.items():
            assert text in found["refusals"][key], key
    for key in ("shape", "recipe", "seed"):
        assert world[0]["refusals"][key] == world[-1]["refusals"][key]
        assert "rank 1" in world[0]["refusals"][key]
    assert f"rank {size - 1}: " in world[0]["refusals"]["damage"]
