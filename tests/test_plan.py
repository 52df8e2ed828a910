"""`qv.plan` on fake tensors against the same steps taken for real: equal to the byte."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import quaver as qv
from quaver import models, optimizers, recipe
from quaver.distributed import World
from quaver.errors import UsageError
from quaver.parallel import Parallel
from quaver.planning.job import Job
from quaver.planning.sources import source
from quaver.planning.step import measure

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
