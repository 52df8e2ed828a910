"""The model of a cluster: its curves against counts of more ranks, its operations against a sum."""

import subprocess
import sys

import pytest
import rank_pool
import torch
from test_plan_ranks import real

import quaver as qv
from quaver import models
from quaver.errors import UsageError
from quaver.planning.cluster import MESSAGE, RANKS, curve, model_cluster, operations

SEQ = 64


def test_a_curve_goes_through_what_is_whole_cut_and_gathered():
    def value(n):
        return 7 + 30 / n + 0.5 * n

    assert curve({n: value(n) for n in RANKS}, 1024) == pytest.approx(value(1024), rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "parallel"),
    [("fp8lm-o2", "dp"), pytest.param("coat", "dp", marks=pytest.mark.slow),
     pytest.param("bf16", "fsdp", marks=pytest.mark.slow),
     pytest.param("fp8lm-o2", "fsdp", marks=pytest.mark.slow)],
)  # fmt: skip
def test_small_groups_foretell_the_messages_and_memory_of_larger_ones(recipe, parallel):
    """Against counts, which test_plan_ranks.py compares with those of real ranks."""
    groups = {n: qv.plan("tiny", recipe, parallel=f"{parallel}={n}", seq=SEQ) for n in RANKS}
    large = qv.plan("tiny", recipe, parallel=f"{parallel}=32", seq=SEQ)
    for kind, sent in large["communication"].items():
        found = curve({n: p["communication"][kind] for n, p in groups.items()}, 32)
        assert found == pytest.approx(sent, rel=1e-3, abs=8), kind  # padding; a number or two
    assert round(curve({n: p["messages"] for n, p in groups.items()}, 32)) == large["messages"]
    # From 16 ranks on the peak of FSDP2 is in another place, and lower than the curve has it.
    peak = curve({n: p["peak"] for n, p in groups.items()}, 32)
    assert peak == pytest.approx(large["peak"], rel=0.1)


@pytest.mark.parametrize("recipe", ["fp8lm-o3", pytest.param("bf16", marks=pytest.mark.slow)])
def test_zero_sends_and_holds_what_the_busiest_of_real_ranks_do(recipe):
    found = model_cluster(
        "tiny", recipe, cluster="4xh100", parallel="zero", seq=SEQ, dtype=torch.float32
    )
    reports = [report for report, _ in rank_pool.run(4, real, "zero=4", recipe, None)]
    for kind, sent in found.communication.items():
        assert sent == max(report["communication"][kind] for report in reports), kind
    messages = max(report["messages"] for report in reports)
    starts = found.communication_seconds - sum(found.communication.values()) / 50e9
    assert starts == pytest.approx(messages * MESSAGE * 2)  # log2 of 4
    if recipe == "fp8lm-o3":  # whose data parallelism is ZeRO
        same = model_cluster(
            "tiny", recipe, cluster="4xh100", parallel="dp", seq=SEQ, dtype=torch.float32
        )
        assert same == found
    # Each rank holds a moment less than the whole; the weights are whole on all.
    alone = qv.plan("tiny", recipe, seq=SEQ, dtype=torch.float32)
    assert max(report["exp_avg"] for report in reports) < alone["exp_avg"]


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "coat"])
def test_operations_are_those_of_the_products(recipe):
    c = models.load("tiny")
    head = c.vocab * c.dim
    kept = c.kv_heads * (c.dim // c.heads)
    layer = 2 * c.dim * c.dim + 2 * c.dim * kept + 3 * c.dim * c.ffn
    low, fp8, plan = operations("tiny", recipe, batch=2, seq=SEQ)
    tokens = 2 * SEQ
    products, of_head = 6 * tokens * c.layers * layer, 6 * tokens * head
    # Forward has q k^T and p v; backward has the first again, and two products for each.
    attention = 2 * tokens * SEQ * c.dim * c.layers * (2 + 5)
    if recipe == "bf16":
        assert (low, fp8) == (products + of_head + attention, 0)
    else:
        assert (low, fp8) == (of_head + attention, products)
    assert plan["parameters"] > layer * c.layers


def test_times_are_counts_over_stated_rates():
    found = model_cluster(
        "tiny", "coat", cluster="16xh100", parallel="dp", seq=SEQ, utilization=0.25
    )
    products = (found.operations_bf16 / 989e12 + found.operations_fp8 / 1979e12) / 0.25
    assert (
        products < found.compute_seconds < products + 1e-3
    )  # a model of 60 MB at 3350 GB/s, twice
    sent = sum(found.communication.values()) / 50e9
    starts = found.communication_seconds - sent
    assert starts / MESSAGE / 4 == pytest.approx(round(starts / MESSAGE / 4))  # log2 of 16
    assert found.step_seconds == found.compute_seconds + found.communication_seconds
    assert found.tokens == 16 * SEQ and found.fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "h100"}, "cluster wants RANKSxGPU, as 1024xh100, of 2 or more, got 'h100'"),
        ({"cluster": "1xh100"}, "of 2 or more, got '1xh100'"),
        ({"cluster": "8xt4"}, "no rates are stated of 't4'; there are a100-40"),
        (
            {"cluster": "8xh100", "parallel": "tp"},
            "a cluster's parallel is dp, zero or fsdp, got 'tp'",
        ),
        ({"cluster": "8xh100", "utilization": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"cluster": "8xh100", "link_name": "string"}, "unknown link 'string'"),
    ],
)
def test_what_no_model_is_of_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        model_cluster("tiny", "bf16", seq=SEQ, **options)


def test_a_recipe_that_shards_would_cut_is_refused_with_the_other_kinds():
    with pytest.raises(UsageError, match=r"shards would cut.*may also be dp or zero$"):
        model_cluster("tiny", "coat", seq=SEQ, cluster="8xh100")


def command(*flags):
    words = [sys.executable, "-m", "quaver", "plan", "--model", "tiny", "--seq", "64", *flags]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def test_the_command_says_that_it_is_a_model():
    done = command("--recipe", "coat", "--cluster", "1024xh100", "--parallel", "dp")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "A model, not a measurement: 1024 x h100 over ib-ndr, 65,536 tokens a step"
    assert len(lines) == 5 and "fits" in lines[-1] and "with none" in lines[3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--utilization", "0.4"), "--utilization is of a --cluster"),
        (("--cluster", "8xh100", "--fit", "24"), "--cluster goes without --fit"),
        (("--cluster", "8xh100", "--utilization", "0"), "above 0 and at most 1, got 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    done = command(*flags)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
