"""Benches of the GPU report without a GPU: statistics, targets, clocks; every CUDA row built and
called once on the CPU, small."""

import bench_gemm
import bench_kernels
import bench_layer
import bench_optimizer
import bench_quantize
import clocks
import common
import gpu
import pytest
import targets
import torch

import quaver as qv
from quaver import models

BENCHES = (bench_gemm, bench_quantize, bench_optimizer, bench_kernels, bench_layer)


class Clock:
    """Seconds from a script, and who was asked."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, function, calls):
        self.asked.append((function(), calls))
        return self.seconds[function()]


def test_pairs_alternate_and_ratios_are_medians(capsys):
    clock = Clock({"base": 0.004, "ours": 0.001})
    row = common.compare("row", lambda: "base", lambda: "ours", baseline_name="b", pairs=4,
                         bytes=2e6, flops=3e9, bar=5, target="cast", clock=clock)  # fmt: skip
    assert row["ratio"] == 4.0 and row["iqr"] == [4.0, 4.0]
    assert (row["baseline_s"], row["candidate_s"], row["calls"]) == (0.004, 0.001, 10)
    assert (row["gb_per_s"], row["tflop_per_s"]) == (2.0, 3.0)
    assert (row["bar"], row["met"], row["target"]) == (5, False, "cast")
    assert [name for name, _ in clock.asked[4:]] == ["base", "ours", "ours", "base"] * 2
    assert "NOT met" in capsys.readouterr().out


def test_spread():
    assert common.spread([2.0]) == {"ratio": 2.0, "iqr": [2.0, 2.0]}
    assert common.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"ratio": 3.0, "iqr": [1.5, 4.5]}


def test_a_row_that_fails_does_not_cost_the_others(capsys):
    def absent():
        raise common.NotHereError("it is not installed")

    def broken():
        raise RuntimeError("no such kernel\nmore")

    def fine():
        return (lambda: "base"), (lambda: "ours")

    clock = Clock({"base": 2.0, "ours": 1.0})
    kept = []
    cases = [common.Case(name, "b", build, target="cast")
             for name, build in (("x", absent), ("y", broken), ("z", fine))]  # fmt: skip
    rows = common.run_cases(
        cases, 2, lambda rows: kept.append([dict(row) for row in rows]), lambda: {"clock": clock}
    )
    assert rows[0] == {"name": "x", "baseline": "b", "target": "cast",
                       "reason": "it is not installed"}  # fmt: skip
    assert rows[1]["reason"] == "RuntimeError: no such kernel" and rows[1]["failed"]
    assert rows[2]["ratio"] == 2.0
    assert [len(one) for one in kept] == [3, 3, 3]
    assert kept[0][2]["reason"] == "not reached before the bench ended"
    assert "no such kernel" in capsys.readouterr().err


def rows_of(key, *ratios):
    return [{"name": f"{key} {r}", "target": key, "ratio": r} for r in ratios]


def test_targets():
    found = targets.evaluate(rows_of("gemm-fast", 0.96, 1.2) + rows_of("cast", 0.95))
    assert list(found) == list(targets.TARGETS)
    assert found["gemm-fast"]["worst"] == 0.96
    assert found["gemm-fast"]["geomean"] == pytest.approx((0.96 * 1.2) ** 0.5)
    assert found["gemm-fast"]["met"] and found["gemm-fast"]["stretched"]
    assert found["cast"]["met"] and not found["cast"]["stretched"]
    assert found["layer"]["met"] is None and found["layer"]["reason"] == "no row was measured"
    slow = targets.evaluate(rows_of("gemm-fast", 0.96, 0.97))
    assert slow["gemm-fast"]["met"] is False  # the mean is short
    assert targets.evaluate(rows_of("gemm-fast", 0.9, 2.0))["gemm-fast"]["met"] is False


def test_a_target_with_a_row_that_was_not_measured_stays_open():
    lacking = {"name": "x", "target": "cast", "reason": "out of memory"}
    found = targets.evaluate([*rows_of("cast", 0.99), lacking])["cast"]
    assert (found["met"], found["reason"], found["rows"]) == (None, "out of memory", 1)
    assert targets.evaluate([*rows_of("cast", 0.5), lacking])["cast"]["met"] is False


def test_clocks_are_those_of_a_busy_gpu():
    text = """345, 2619, 68.1, 30, 0, 0x0000000000000001
1980, 2619, 512.5, 41, 98, 0x0000000000000000
1755, 2619, 699.0, 55, 100, 0x0000000000000004
1900, 2619, [N/A], 50, 100, 0x0000000000000004
torn, line
"""
    found = clocks.parse(text)
    assert found["sm_mhz"] == {"min": 1755, "median": 1900, "max": 1980}
    assert found["power_w"] == {"min": 512.5, "median": 605.75, "max": 699}
    assert found["reasons"] == ["0x0000000000000000", "0x0000000000000004"]
    assert clocks.parse("") == {}


def test_sampler_without_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with clocks.Sampler() as sampler:
        pass
    assert sampler.result == {}


def test_inputs_rotate_through_more_than_the_caches_hold():
    assert gpu.set_count(32 << 20) == 8
    assert gpu.set_count(1 << 30) == gpu.SETS
    seen = []
    call = gpu.rotate(lambda a, b: seen.append((a, b)), [(1, 2), (3, 4)])
    for _ in range(3):
        call()
    assert seen == [(1, 2), (3, 4), (1, 2)]


def test_the_device_clock_counts_turns_that_the_host_held_up(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 5.0  # ms, also that of the wait before

    slept = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    now = iter((0.0, 0.001, 0.0, 0.006, 0.0, 0.001))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(now))
    clock = gpu.Clock()
    assert [clock(lambda: None, 2) for _ in range(3)] == [0.0025] * 3
    assert (clock.turns, clock.host_bound) == (3, 1)
    assert slept == [2_000_000, 3_000_000, 18_000_000]  # 1, then 1.5 times the longest queueing


@pytest.fixture
def small_on_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "CACHE_BYTES", 1 << 12)
    monkeypatch.setattr(bench_gemm, "WEIGHTS", ((16, 48), (32, 16), (48, 32)))
    monkeypatch.setattr(bench_gemm, "TOKENS", (16, 32, 48))
    monkeypatch.setattr(bench_quantize, "SHAPES", ((16, 32), (48, 16)))
    monkeypatch.setattr(bench_optimizer, "FEW_HUGE", ((32, 48), (16, 16)))
    monkeypatch.setattr(bench_optimizer, "MANY_SMALL", ((8, 8),) * 3)
    monkeypatch.setattr(bench_gemm, "WEIGHTS", ((32, 48),) * 5)
    monkeypatch.setattr(bench_gemm, "TOKENS", (16, 32, 48))
    monkeypatch.setitem(bench_kernels.SIZES, "cuda", (1024, 16, 64, 96))
    small = models.Config(dim=32, layers=1, heads=2, kv_heads=1, ffn=48, context=64)
    monkeypatch.setattr(bench_layer.models, "load", lambda name: small)
    monkeypatch.setitem(bench_layer.LENGTH, "cuda", 16)
    monkeypatch.setattr(bench_layer, "TARGETED", 32)


@pytest.mark.usefixtures("small_on_cpu")
@pytest.mark.parametrize("bench", BENCHES)
def test_every_cuda_row_runs(bench):
    built = 0
    for case in bench.cases("cuda"):
        if "compiled" in case.name and "not compiled" not in case.name:
            continue  # the compiler takes a minute; test_compile.py has converted models
        try:
            calls = case.build()
        except common.NotHereError:
            assert "torchao" in case.baseline or "bitsandbytes" in case.baseline
            continue
        built += 1
        if "rowwise" in case.baseline and not torch_multiplies_by_row_scales():
            calls = calls[1:]
        for call in calls * 2:
            call()
    assert built


def torch_multiplies_by_row_scales():
    """torch 2.11's product on the CPU takes tensor scales alone."""
    a = qv.quantize(torch.ones(16, 16), granularity="row")
    try:
        bench_gemm.scaled_mm(a, a)
    except RuntimeError as error:
        assert "per-tensor scaling" in str(error)
        return False
    return True
