"""Full finetuning of a 7B model on a card of 24 GB, on fake tensors: torch's MemTracker counts the
bytes of a step, and the report of a small model is a real run's to the byte."""

import functools

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

import quaver as qv
from quaver import models

GB = 10**9
LLAMA_2_7B = models.Config(
    vocab=32_000, dim=4096, layers=32, heads=32, kv_heads=32, ffn=11_008, context=2048
)


def recompute(model):
    """Keeps a block's input alone for backward."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def build(config):
    """A bf16 model under coat, without storage."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = models.build(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return qv.convert(model, "coat")


def materialise(model):
    """Gives every parameter and buffer a storage of the mode in force."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype))
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)


def prepare(model):
    materialise(model)
    recompute(model)
    optimizer = qv.AdamW(model.parameters(), 1e-5, recipe="adamw-4bit")
    qv.release_gradients(model, optimizer)
    return model, optimizer


def step(model, optimizer, config, length):
    ids = torch.zeros((1, length), dtype=torch.int64)
    F.cross_entropy(model(ids).view(-1, config.vocab).float(), ids.view(-1)).backward()
    optimizer.step()


def test_a_step_of_a_7b_model_peaks_below_24_gb():
    model = build(LLAMA_2_7B)
    with FakeTensorMode():
        model, optimizer = prepare(model)
        count = sum(p.numel() for p in model.parameters())
        assert count == 6_738_415_616
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                step(model, optimizer, LLAMA_2_7B, 2048)
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        report = qv.memory_report(model, optimizer)
    print(f"peak {peak['Total'] / GB:.2f} GB: { ({str(k): v for k, v in peak.items() if v}) }")
    assert report["master"] == 2 * count
    assert report["grad"] == 0
    assert report["exp_avg"] + report["exp_avg_sq"] <= 1.04 * count
    assert peak["Total"] <= 24 * GB


def test_the_report_of_a_small_model_is_a_real_runs():
    config = models.load("tiny")

    def report(model):
        model, optimizer = prepare(model)
        step(model, optimizer, config, 64)
        return qv.memory_report(model, optimizer)

    real, empty = report(build(config)), build(config)
    with FakeTensorMode():
        fake = report(empty)
    assert real == fake
