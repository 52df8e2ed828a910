"""Threads that convert, train and serve beside each other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from blocks import llama_block, run
from helpers import assert_same, randn
from torch import nn

import quaver as qv

TIMES = 20


class Plain(nn.Module):
    """Child modules, a parameter and functions: what a tracer patches."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(8)])
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x)) * self.scale
        return x


def trained(name, block, barrier):
    """Losses of a plain block that is converted here."""
    barrier.wait()
    qv.convert(block, name)
    optimizer = qv.AdamW(block.parameters(), lr=1e-2, recipe=name)
    found = []
    for step in range(6):
        loss = (run(block, randn(2, 8, 64, seed=step)).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_converting_disturbs_no_forward_of_another_thread():
    model, x, done = Plain().eval(), randn(4, 16), threading.Event()
    wanted = model(x).detach()

    def serve():
        count = 0
        while not done.is_set() or count < TIMES:
            assert_same(model(x).detach(), wanted)
            count += 1
        return count

    def converting():
        try:
            for seed in range(TIMES):
                block = llama_block("coat", seed=seed)
                assert set(qv.convert_report(block).converted.values()) == {"linear", "norm", "mlp"}
        finally:
            done.set()

    with ThreadPoolExecutor(2) as pool:
        server, converter = pool.submit(serve), pool.submit(converting)
        converter.result()
        assert server.result() >= TIMES


@pytest.mark.parametrize("names", [("coat", "coat"), ("tensorwise", "fp8lm-o2")])
def test_two_threads_convert_and_train_as_one_does(names):
    alone = [trained(name, llama_block("f32"), threading.Barrier(1)) for name in names]
    barrier = threading.Barrier(2)
    blocks = [llama_block("f32") for _ in names]
    with ThreadPoolExecutor(2) as pool:
        beside = list(pool.map(trained, names, blocks, [barrier] * 2))
    assert beside == alone


def test_a_thread_serves_what_another_has_trained():
    block, x = llama_block("coat"), randn(2, 8, 64)
    optimizer = qv.AdamW(block.parameters(), lr=1e-2, recipe="coat")
    server = llama_block("coat").eval()
    with torch.no_grad():
        wanted = run(server, x)

    def serve():
        with torch.no_grad():
            return [run(server, x) for _ in range(TIMES)]

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        for _ in range(5):
            run(block, x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for got in served.result():
        assert_same(got, wanted)
