"""Spread models in a run: state, mistakes, training, resuming."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same
from rank_pool import run
from tensor_parallels import CONFIG, E4M3, PLAN, TOKENS, Mlp, X, decoder, loss_of, mlp, plain
from torch import nn

import quaver as qv
from quaver import ScaledTensor, data, models, train
from quaver import job as job_module
from quaver.checkpoint import step_of
from quaver.distributed import tensor_parallel as tp
from quaver.distributed.tensor_parallel import gather_state, scatter_state
from quaver.errors import UsageError
from quaver.job import Job, Run
from quaver.parallel import Parallel
from quaver.rundir import RunDir


def state_on_a_rank(rank, state):
    name, group = "fp8lm-o2", dist.group.WORLD
    model = decoder("llama", name)
    alone = {n: plain(v).clone() for n, v in model.state_dict(keep_vars=True).items()}
    tp.parallelize(model, group)
    for key, value in gather_state(model).items():  # codes were cut, not encoded again
        assert_same(value, alone[key.removeprefix("model.")].detach(), key)
    optimizer = qv.AdamW(model.parameters(), lr=1e-3, recipe=name)
    if state is not None:
        scatter_state(model, state, optimizer)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, name)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, gather_state(model, optimizer)


def check_same_state(got, wanted, original):
    """Within half an ulp of what each state is stored in, or half its smallest step: the parts
    were encoded anew."""
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        stored = original.get(key)
        if not isinstance(stored, ScaledTensor):
            assert_same(got[key], value, key)
            continue
        digits, lowest = (4, -9) if stored.qdata.dtype == E4M3 else (11, -24)
        scale = qv.quantize(value, stored.qdata.dtype).scale
        limit = value.abs() * 2.0**-digits + scale * 2.0 ** (lowest - 1)
        assert ((got[key] - value).abs() <= limit).all(), key


def test_the_whole_state_moves_to_another_number_of_ranks():
    losses, state = run(2, state_on_a_rank, None)[0]
    model = decoder("llama", "fp8lm-o2", seed=5)
    optimizer = qv.AdamW(model.parameters(), lr=1e-3, recipe="fp8lm-o2")
    scatter_state(model, state, optimizer)
    original = {f"model.{n}": p for n, p in model.state_dict(keep_vars=True).items()}
    for n, p in model.named_parameters():
        original |= {f"optimizer.{n}.{key}": t for key, t in optimizer.state[p].items()}
    check_same_state(gather_state(model, optimizer), state, original)
    alone = loss_of(model, "fp8lm-o2")[0].item()
    assert alone < losses[-1] < losses[0]
    other, _ = run(4, state_on_a_rank, state)[0]
    assert other[0] == pytest.approx(alone, rel=1e-3)
    with pytest.raises(KeyError, match=r"lacks model\.embed\.weight"):
        scatter_state(model, {})
    with pytest.raises(ValueError, match=r"model\.embed\.weight is \[256, 64\] here, \[3\]"):
        scatter_state(model, {**state, "model.embed.weight": torch.zeros(3)})


def refusal(function):
    try:
        function()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals_on_a_rank(rank):
    """Every mistake is an error on all ranks, and the group works on."""
    group = dist.group.WORLD

    def build(plan=None, name="fp8lm-o2", **changes):
        return refusal(
            lambda: tp.parallelize(
                qv.convert(models.build(CONFIG.replace(**changes)), recipe=name), group, plan
            )
        )

    odd = rank == 1
    found = {
        "heads": build(heads=4, kv_heads=1, dim=64),
        "ffn": build(ffn=97),
        "pattern": build({"blocks.*.nothing": tp.RowParallel()}),
        "layer": build({"blocks.*.norm1": tp.RowParallel()}),
        "unknown": refusal(lambda: tp.parallelize(Mlp(), group)),
        "recipe differs": build(name="tensorwise" if odd else "fp8lm-o2"),
        "shape differs": build(ffn=128 if odd else 96),
        "plan differs": build({"blocks.0.mlp.down": tp.RowParallel()} if odd else None),
        "fails on one": build(kv_heads=1 if odd else 4),
        "tied": refusal(lambda: tp.parallelize(tied(), group, PLAN | {"other": tp.RowParallel()})),
    }
    model = tp.parallelize(decoder("llama", "fp8lm-o2"), group)
    found["sequence"] = refusal(lambda: model(TOKENS[:, :31]))
    found["batches differ"] = refusal(lambda: model(TOKENS[: 1 if odd else 2]))
    found["values differ"] = refusal(lambda: model(TOKENS.flip(1) if odd else TOKENS))
    one = tp.parallelize(mlp("fp8lm-o2"), group, PLAN)
    found["width"] = refusal(lambda: one(X[..., :32]))
    found["dtype"] = refusal(lambda: one(X.double()))
    found["not gathered"] = refusal(lambda: model.blocks[0].mlp.gate_up(X))
    loss_of(model, "fp8lm-o2")[0].backward()
    return found


def tied():
    model = Mlp()
    model.other = nn.Linear(96, 48)
    model.other.weight = model.down.weight
    return model


def test_mistakes_are_named_on_every_rank():
    first, second = run(2, refusals_on_a_rank)
    for key, text in {
        "heads": "blocks.0.attention has 1 kv_heads, which 2 ranks must divide",
        "ffn": "blocks.0.mlp.gate_up has output features [97, 97] (of 194), which 2 ranks",
        "pattern": "no module matches 'blocks.*.nothing'",
        "layer": "blocks.0.norm1 must be a Linear, got RMSNorm",
        "unknown": "Mlp is no known decoder; give a plan",
        "recipe differs": "qkv.weight [128, 64] float16",
        "shape differs": "style 13 is blocks.0.mlp.gate_up: ColumnParallel(parts=(96, 96)",
        "plan differs": "style 0 is",
        "fails on one": "blocks.0.attention has 1 kv_heads",
        "tied": "down shares a parameter: down.weight, other.weight",
        "sequence": "must be divisible by the 2 ranks",
        "batches differ": "rank 1 of the group got an input [1, 32, 64], rank 0 [2, 32, 64]",
        "values differ": "ranks 0 and 1 of the group got different values",
        "width": "wanted an input [..., sequence, 64], got [3, 16, 32]",
        "dtype": "input must be float32, float16 or bfloat16, got torch.float64",
        "not gathered": "the input is not what GatherInput gathered",
    }.items():
        assert text in str(first[key]), key
        assert text in str(second[key]), key


class Stop:
    """Asks a run to stop after some steps."""

    def __init__(self, steps=math.inf):
        self.steps = steps

    def is_set(self):
        self.steps -= 1
        return self.steps < 0


def train_on_a_rank(rank, out, name):
    """Losses of a whole run, of one that stopped and went on, and the bytes that were sent."""
    text = data.load([str(Path(qv.__file__).parent / "models")], 32)
    world = qv.distributed.World("cpu", tensor=2)
    found = []
    for folder, stops in (("whole", []), ("stopped", [Stop(2)])):
        folder = RunDir(Path(out) / folder)
        for resume in range(len(stops) + 1):
            settings = train.Settings(
                recipe=(name,), steps=4, batch=4, seq=32, resume=resume > 0, parallel="dp=2,tp=2"
            )
            folder.metrics_path(name).parent.mkdir(parents=True, exist_ok=True)
            job = Job(Run(settings, CONFIG, text, world, folder), name)
            try:
                result, steps = job.train(stops.pop() if stops else Stop())
            except train.Interrupted:
                dist.barrier()
        losses = [line["loss"] for line in steps]
        found.append((result["communication"], losses, result["val_loss"]))
    return found


@pytest.mark.parametrize("name", ["bf16", "fp8lm-o2", "fp8lm-o3"])
def test_training_on_two_by_two_ranks_resumes_to_the_same_bits(tmp_path, name):
    results = run(4, train_on_a_rank, str(tmp_path), name)
    (sent, losses, validation), (sent_again, again, validation_again) = results[0]
    assert losses == again
    assert validation == validation_again
    assert losses[-1] < losses[0]
    # Of two sequences of 32 tokens a rank sends half: see test_bytes_on_the_wire.
    of_a_half = {"bf16": 2 * 5, "fp8lm-o2": 2 + 2 * 2, "fp8lm-o3": 2 + 2}[name]
    wanted = 4 * (2 * 32 * 64 // 2) * (2 * CONFIG.layers * of_a_half + 2 * 2)
    assert sent["activation"] == sent_again["activation"] == wanted
    assert (sent["weight"] > 0) == (name == "fp8lm-o3")
    for other in results[1:]:
        assert other[0][1] == losses


class Killed(BaseException):
    """kill -9, as far as files can tell."""


def killed_while_saving(rank, out, where):
    """Losses of a whole run, and of one in which the second of two saves was cut short, "writing"
    before rank 1 had a part, "renaming" when only rank 0's was in its place; then resumed."""
    text = data.load([str(Path(qv.__file__).parent / "models")], 32)
    world = qv.distributed.World("cpu", tensor=2)
    found, save, replace = [], job_module.distributed.save, os.replace

    def cut_writing(path, *args, step, **options):
        if step < 4 or rank == 0:
            save(path, *args, step=step, **options)
        if step == 4:
            raise Killed

    def cut_renaming(source, target):
        if ".next." in str(source) and step_of(source) == 4:
            if rank == 0:
                replace(source, target)
            raise Killed
        replace(source, target)

    for folder, cuts in (("whole", 0), ("cut", 1)):
        folder = RunDir(Path(out) / folder)
        for resume in range(cuts + 1):
            settings = train.Settings(recipe=("coat",), steps=6, batch=4, seq=32, save_every=2,
                                      resume=resume > 0, parallel="tp=2")  # fmt: skip
            folder.metrics_path("coat").parent.mkdir(parents=True, exist_ok=True)
            job = Job(Run(settings, CONFIG, text, world, folder), "coat")
            if cuts and not resume:
                if where == "writing":
                    job_module.distributed.save = cut_writing
                else:
                    os.replace = cut_renaming
            try:
                found.append([line["loss"] for line in job.train(Stop())[1]])
            except Killed:
                dist.barrier()
            finally:
                job_module.distributed.save, os.replace = save, replace
    return found


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_ranks_killed_between_the_parts_of_a_checkpoint_resume(tmp_path, where):
    for whole, cut in run(2, killed_while_saving, str(tmp_path), where):
        assert whole == cut and len(whole) == 6


def test_the_flag_names_kinds_and_ranks():
    assert Parallel.parse("dp=2,tp=2") == Parallel("dp", 2, 2)
    assert Parallel.parse("tp=4") == Parallel("dp", 1, 4)
    assert Parallel.parse("zero=2,tp=2") == Parallel("zero", 2, 2)
    for text in ("dp=2,tp=2", "tp=4", "zero=2,tp=2", "zero=1", "fsdp=3", "dp=1"):
        assert str(Parallel.parse(text)) == text
    for text in ("tp", "tp=0", "tp=2,tp=2", "dp=2,zero=2", "pp=2", "tp=2;dp=2"):
        with pytest.raises(UsageError, match="--parallel"):
            Parallel.parse(text)
    with pytest.raises(UsageError, match="--seq 30 does not divide among tp=4"):
        train.Settings(parallel="tp=4", seq=30)
    with pytest.raises(UsageError, match="--batch 3 does not divide among 2 ranks"):
        train.Settings(parallel="dp=2,tp=2", batch=3)
