"""`qv.plan` on fake tensors against the same steps taken for real: equal to the byte."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from test_cli import run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import quaver as qv
from quaver import models, optimizers, recipe
from quaver.distributed import World
from quaver.errors import UsageError
from quaver.parallel import Parallel
from quaver.planning.fit import tries
from quaver.planning.job import Job
from quaver.planning.search import largest
from quaver.planning.sources import source
from quaver.planning.step import measure

GB = 10**9
SMALL = {"dim": 64, "layers": 1, "heads": 2, "kv_heads": 2, "ffn": 96}
NAMES = [None, *optimizers.names()]
PAIRS = [(r, o) for r in recipe.names() for o in NAMES]
QUICK = {("bf16", o) for o in ("subset-norm", "snsm", "adamw-4bit", "microadam")}
QUICK |= {(r, None) for r in recipe.names() if r != "fp8lm-o1"} | {("coat", "grass")}


def real(model, recipe_name, optimizer, dtype, batch, seq, release=False, recompute=False):
    """(memory report, Peak) of the steps that a plan simulates."""
    config, chosen = models.load(model), recipe.get(recipe_name)
    found = source(config, dtype)
    torch.manual_seed(0)
    built = models.build(config)
    for p in built.parameters():
        p.data = p.data.to(dtype)
    built = qv.convert(built, chosen)
    job = Job(found, chosen, optimizer, Parallel(), World(), release, recompute)
    return measure(job.training(built), batch, seq)


def assert_equal(plan, report, peak):
    assert {key: plan[key] for key in report} == report
    assert (plan["peak"], plan["peak_by_kind"], plan["peak_at"]) == (
        peak.bytes,
        peak.by_kind,
        peak.place,
    )
    assert sum(plan["peak_by_kind"].values()) == plan["peak"] >= plan["total"] - plan["activation"]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [p if p in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS],
)
def test_every_recipe_and_optimizer_is_planned_to_the_byte(name, optimizer):
    dtype = torch.float32 if optimizer is None else torch.bfloat16
    options = {"batch": 1, "seq": 32, "dtype": dtype}
    try:
        plan = qv.plan("tiny", name, optimizer, **options)
    except UsageError:  # of the optimizer, which refuses the real model too
        with pytest.raises(UsageError):
            real("tiny", name, optimizer, **options)
        return
    assert_equal(plan, *real("tiny", name, optimizer, **options))


@pytest.mark.parametrize("name", ["bf16", "coat"])
def test_released_and_recomputed_steps_are_planned_to_the_byte(name):
    options = {"batch": 2, "seq": 32, "dtype": torch.bfloat16, "release": True, "recompute": True}
    plan = qv.plan("tiny", name, "adamw-4bit", **options)
    assert plan["grad"] == 0
    assert_equal(plan, *real("tiny", name, "adamw-4bit", **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimizer"), [("bf16", None), ("fp8lm-o2", None), ("coat", "microadam")]
)
def test_125m_is_planned_to_the_byte(name, optimizer):
    options = {"batch": 1, "seq": 64, "dtype": torch.float32}
    assert_equal(
        qv.plan("125m", name, optimizer, **options), *real("125m", name, optimizer, **options)
    )


def test_the_peak_by_hand():
    """One layer of n weights in f32: at the end of backward there are weights, gradients and two
    moments of 4 bytes each, and the step adds no more than its scalars."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(512, 512), nn.Linear(512, 512, bias=False)

        def forward(self, tokens):
            return self.out(self.embed(tokens))

    n = 2 * 512 * 512
    plan = qv.plan(Head(), "f32", seq=4)
    by_kind = plan["peak_by_kind"]
    assert plan["parameters"] == n
    assert by_kind["weights"] == by_kind["gradients"] == 4 * n
    assert 8 * n <= by_kind["states"] <= 8 * n + 64
    assert 16 * n <= plan["peak"] <= 16 * n + 64 * 2**10
    # Of 4 tokens: the layer's input and the softmax, the tokens, and the loss's total weight.
    assert plan["activation"] == 2 * 4 * 4 * 512 + 4 * 8 + 4


def test_torchs_mem_tracker_finds_the_same_peak():
    config = models.load("tiny")
    with FakeTensorMode():
        model = qv.convert(models.build(config), "bf16")
        found = source(config, torch.float32)
        job = Job(found, recipe.get("bf16"), None, Parallel(), World(), False, False)
        training = job.training(model)
        optimizer = training.optimizer
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                training.loss(torch.zeros((2, 64), dtype=torch.int64)).backward()
                training.clip()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    plan = qv.plan("tiny", "bf16", batch=2, seq=64, dtype=torch.float32)
    assert peak == plan["peak"]


def test_a_module_is_planned_without_a_change_to_it():
    model = qv.convert(models.build(models.load("tiny")), "fp8lm-o2")
    before = dict(model.named_parameters())
    plan = qv.plan(model, "fp8lm-o2", seq=32)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())
    named = qv.plan("tiny", "fp8lm-o2", seq=32, dtype=torch.float32)
    assert {k: plan[k] for k in plan if k != "settings"} == {
        k: named[k] for k in named if k != "settings"
    }


def test_transformers_configurations_and_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=64,
    )  # fmt: skip
    plan = qv.plan(config, "coat", recompute=True)
    config.save_pretrained(tmp_path)
    again = qv.plan(tmp_path, "coat", recompute=True)
    assert again["settings"]["seq"] == 64
    assert {k: plan[k] for k in plan if k != "settings"} == {
        k: again[k] for k in again if k != "settings"
    }
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    found, chosen = source(model, torch.bfloat16), recipe.get("coat")
    job = Job(found, chosen, None, Parallel(), World(), release=False, recompute=True)
    report, peak = measure(job.training(qv.convert(model, chosen)), 1, 64)
    assert {key: plan[key] for key in report} == report
    assert plan["peak"] == peak.bytes


@pytest.mark.parametrize(
    ("kind", "name"), [("Llama", "bf16"), ("Mixtral", "bf16"), ("Mixtral", "tensorwise")]
)
def test_what_transformers_decide_by_values_is_planned_as_it_is(kind, name):
    """Masks, which whole rows do without, and the rows of each expert."""
    transformers = pytest.importorskip("transformers")
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=64, **more,
    )  # fmt: skip
    plan, chosen = qv.plan(config, name), recipe.get(name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = source(model, torch.bfloat16)
    job = Job(found, chosen, None, Parallel(), World(), release=False, recompute=False)
    report, _ = measure(job.training(qv.convert(model, chosen)), 1, 64)
    # The grouped products keep as much however the rows fall on the experts.
    assert plan["activation"] == report["activation"]
    kinds = ("weight", "weight_fp8", "master", "grad", "exp_avg", "exp_avg_sq", "other")
    assert [plan[key] for key in kinds] == [report[key] for key in kinds]


def test_a_model_that_is_no_causal_one_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.T5Config(d_model=64, num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"^plan: [^:]*: Unrecognized configuration class"):
        qv.plan(tmp_path, "bf16")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"^plan: .*config\.json"):
        qv.plan(tmp_path, "bf16")


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("tiny", "coatt"), {}, "unknown recipe 'coatt'"),
        (("tiny", "bf16", "adam"), {}, "unknown optimizer 'adam'"),
        (("tiny", "bf16"), {"gpu": "h1000"}, "unknown GPU 'h1000'; there are"),
        (("tiny", "bf16"), {"seq": 4096}, "seq 4096 exceeds the model's context 1024"),
        (("tiny", "bf16"), {"batch": 0}, "batch must be an int from 1"),
        (("tiny", "bf16"), {"dtype": torch.int8}, "dtype must be one of"),
        ((3, "bf16"), {}, "a folder or a name, got int"),
        ((nn.Linear(4, 4), "bf16"), {"recompute": True}, "a list of blocks"),
        ((nn.Linear(4, 4), "bf16"), {}, "Linear does not run on tokens [1, 2048]"),
        (("tiny", "fp8lm-o2", "grass"), {}, "optimizer grass with recipe fp8lm-o2: Grass"),
        (("tiny", "bf16"), {"parallel": "pp=2"}, "parallel wants dp=N, zero=N, fsdp=N or tp=N"),
        (("tiny", "bf16"), {"parallel": "tp=5"}, "parallel tp=5: "),
        (("tiny", "coat"), {"parallel": "fsdp=2"}, "which FSDP2's shards would cut"),
        (("tiny", "bf16"), {"parallel": "dp=2", "rank": 2}, "rank must be an int from 0 to 1"),
        (("tiny", "bf16"), {"link": "wire"}, "unknown link 'wire'; there are"),
        (("tiny", "fp8lm-o3"), {"release": True}, "wanted an optimizer of quaver, got ZeroAdamW"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, options, text):
    with pytest.raises(UsageError) as error:
        qv.plan(*arguments, **options)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def reported(name, make):
    model = qv.convert(models.build(models.Config(**SMALL)), name)
    optimizer = make(model)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    found = qv.memory_report(model, optimizer, batch=(1, 32))
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    return model, optimizer, found


@pytest.mark.parametrize("name", ["f32", "fp8lm-o2"])
def test_a_memory_report_of_a_batch_is_the_plans(name):
    model, optimizer, found = reported(name, lambda m: qv.AdamW(m.parameters(), recipe=name))
    plan = qv.plan(model, dataclasses.replace(recipe.get(name), autocast=None), seq=32)
    assert {key: plan[key] for key in found} == found
    # After a step, and with a tensor of tokens, it is the same.
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    model(tokens).sum().backward()
    optimizer.step()
    again = qv.memory_report(model, optimizer, batch=tokens)
    assert {key: plan[key] for key in again if "peak" not in key} == {
        key: value for key, value in again.items() if "peak" not in key
    }
    assert plan["peak"] - again["peak"] == 8  # its count of skipped steps exists already
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(m.parameters()),
        lambda m: torch.optim.SGD(m.parameters(), momentum=0.9),
        lambda m: qv.MicroAdam(m.parameters(), 1e-3),
        lambda m: qv.Grass(m, rank=8),
        lambda m: qv.AdamW(m.parameters(), recipe="snsm"),
    ],
)
def test_a_memory_report_takes_every_optimizer(make):
    _, _, found = reported("bf16", make)
    assert found["peak"] >= found["master"] + found["grad"] + found["peak_by_kind"]["states"]
    assert found["peak_by_kind"]["gradients"] > 0


def test_a_memory_report_of_released_gradients_has_none():
    model = models.build(models.load("tiny"))
    optimizer = qv.AdamW(model.parameters(), recipe="bf16")
    qv.release_gradients(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        found = qv.memory_report(model, optimizer, batch=(1, 32))
    plan = qv.plan(model, "bf16", seq=32, release=True)
    assert found["grad"] == 0
    assert {key: plan[key] for key in found} == found


@pytest.mark.parametrize(
    ("arguments", "batch", "text"),
    [
        (2, 3, "batch must be (sequences, tokens)"),
        (2, (1, 0), "batch must be (sequences, tokens)"),
        (1, (1, 8), "wants the optimizer too"),
    ],
)
def test_a_memory_report_names_what_is_wrong_with_a_batch(arguments, batch, text):
    model = models.build(models.load("tiny"))
    pair = (model, qv.AdamW(model.parameters(), recipe="bf16"))[:arguments]
    with pytest.raises(UsageError, match=re.escape(text)):
        qv.memory_report(*pair, batch=batch)


def test_the_largest_batch_is_the_last_that_fits():
    model, size = models.Config(**SMALL), 10**8
    plan = qv.plan(model, "coat", seq=64)
    batch = plan.largest_batch(size)
    assert qv.plan(model, "coat", seq=64, batch=batch)["peak"] <= size
    assert qv.plan(model, "coat", seq=64, batch=batch + 1)["peak"] > size
    assert plan.largest_batch(plan["peak"] - 1) == 0
    with pytest.raises(UsageError, match="wants bytes, got -1"):
        plan.largest_batch(-1)


@pytest.mark.parametrize("size", [10, 11, 12, 13, 99, 100, 101, 2_000, 12_345])
def test_the_search_for_a_batch_takes_few_plans(size):
    asked = []

    def peak(batch):  # convex, as the largest of sums is
        asked.append(batch)
        return max(10 + batch, 5 + 3 * batch, 7 * batch - 40)

    found = largest(peak, size)
    assert found == sum(peak(batch) <= size for batch in range(1, 3_000))
    assert len(asked) - 2_999 <= 12


def test_the_search_for_settings_ends_with_the_first_that_fit():
    model, size = models.Config(**SMALL), 650_000
    found = list(tries(model, size, seq=8))
    peaks = [plan["peak"] for plan in found]
    assert all(peak > size for peak in peaks[:-1]) and peaks[-1] <= size
    settings = found[-1]["settings"]
    keys = ("recipe", "optimizer", "release", "recompute")
    again = qv.plan(model, seq=8, **{key: settings[key] for key in keys})
    assert again["peak"] == peaks[-1]
    fixed = list(tries(model, 1, "fp8lm-o2", release=True, seq=8))
    assert {plan["settings"]["recipe"] for plan in fixed} == {"fp8lm-o2"}
    assert all(plan["settings"]["release"] for plan in fixed)


def test_messages_take_the_stated_time_of_a_link():
    plan = qv.plan("tiny", "bf16", seq=16, parallel="dp=2", link="pcie4")
    assert plan["communication_seconds"] == sum(plan["communication"].values()) / 32e9
    assert qv.plan("tiny", "bf16", seq=16)["communication_seconds"] is None


def test_a_plan_without_a_card_does_not_say_that_it_fits():
    plan = qv.plan("tiny", "bf16", seq=16)
    assert plan["fits"] is plan["gpu"] is None


# The command


def test_the_command_prints_the_peak_and_the_verdict(capsys):
    flags = ["plan", "--model", "tiny", "--recipe", "coat", "--seq", "32"]
    status, out, err = run([*flags, "--gpu", "4090"], capsys)
    assert (status, err) == (0, "")
    assert "tiny, 4,917,888 parameters, batch 1 x 32, bfloat16" in out
    assert "fits 4090 of 24 GB" in out
    for kind in ("weights", "gradients", "states", "activations", "rest", "peak"):
        assert kind in out


def test_the_command_searches_for_settings(tmp_path, capsys):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    flags = ["plan", "--model", str(path), "--seq", "8", "--fit"]
    status, out, err = run([*flags, "0.00065"], capsys)
    assert (status, err) == (0, "")
    assert "GB: --recipe bf16" in out
    status, out, err = run([*flags, "0.0001"], capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "nothing fits 0.0001 GB, the least is" in err


def test_the_command_draws_the_peak_by_kind(tmp_path, monkeypatch, capsys):
    flags = ["plan", "--model", "tiny", "--seq", "16", "--gpu", "t4", "--plot"]
    path = tmp_path / "plan.png"
    assert run([*flags, str(path)], capsys)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run([*flags, str(path)], capsys)
    assert (status, err) == (
        2,
        "quaver plan: error: --plot needs matplotlib: pip install quaver[train]\n",
    )


def test_a_plan_that_does_not_fit_ends_with_a_remedy(tmp_path, capsys):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({"dim": 8192, "heads": 8, "kv_heads": 8, "ffn": 65536, "layers": 1}))
    flags = ["plan", "--model", str(path), "--dtype", "f32", "--seq", "8", "--gpu", "t4"]
    status, out, err = run(flags, capsys)
    assert status == 2
    assert "does not fit t4 of 16 GB" in out
    assert err.count("\n") == 1
    assert "GB and t4 has 16: try" in err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model", "8b"], "unknown model '8b'"),
        (["--model", "tiny", "--gpu", "x"], "unknown GPU 'x'"),
        (["--model", "."], "has no config.json"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(["plan", *flags], capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text in err
