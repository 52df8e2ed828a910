"""Ops, optimizer and training on a GPU: streams, graphs, sizes, and what goes wrong by name."""

import itertools
import re

import pytest
import torch
from cuda_cases import FP8, adam_arguments, values
from helpers import REFUSAL, assert_same

import quaver as qv
from quaver import recipe
from quaver.tensor import plain_tensors

pytestmark = pytest.mark.cuda

ops = torch.ops.quaver
E4M3 = FP8[0]


def quantize(x, scale=None):
    return ops.quantize(x, E4M3, scale, None, "tensor", 0, True, False, 0)


def same(got, wanted, what=""):
    assert_same(got.cpu(), wanted.cpu(), what, any_nan=True)


def on_cuda(value):
    return [v.cuda() for v in value] if isinstance(value, list) else value.cuda()


def test_a_captured_adam_reads_its_step_and_hyperparameters_on_the_device():
    shapes = ((96, 160), (64, 64))
    cpu, gpu = adam_arguments(shapes), [on_cuda(a) for a in adam_arguments(shapes)]
    ops.adam_(*[on_cuda(a) for a in adam_arguments(shapes)])  # loads the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adam_(*gpu)
    for step in range(3):
        for hyper in (cpu[7], gpu[7]):
            hyper[:, 0] = 1e-3 * (step + 1)
        ops.adam_(*cpu)
        graph.replay()
    for i, (a, b) in enumerate(zip(cpu, gpu, strict=True)):
        for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
            same(y, x, f"argument {i}")


def test_captured_casts_read_their_history_on_the_device():
    x = values((128, 256), torch.bfloat16)
    cpu, gpu, source = torch.zeros(17), torch.zeros(17, device="cuda"), x.cuda()

    def cast(history):
        return ops.cast_transpose(source, E4M3, None, history, True)

    cast(gpu.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cast(gpu)
    for step in range(20):
        changed = x * 2.0 ** (step % 5)
        source.copy_(changed)
        graph.replay()
        for one, wanted in zip(got, ops.cast_transpose(changed, E4M3, None, cpu, True),
                               strict=True):  # fmt: skip
            same(one, wanted, f"cast {step}")
        same(gpu, cpu, f"history {step}")


def test_ops_run_in_the_current_stream():
    x = values((4096, 4096), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = torch.zeros_like(x, device="cuda")
        for _ in range(50):  # work that a kernel in another stream would overtake
            y += 1
        y.copy_(x, non_blocking=True)
        got = quantize(y)
    stream.synchronize()
    for a, b in zip(got, quantize(x), strict=True):
        same(a, b)


def test_ops_do_not_wait_for_the_device():
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    arguments = [on_cuda(a) for a in adam_arguments(((64, 64),))]
    history = torch.zeros(17, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.cast_transpose(x, E4M3, None, history, True)
        ops.dequantize(*quantize(x)[:2], torch.float32, "tensor", 0)
        ops.grad_norm([x], [x.new_empty(0)], [x.new_empty(0)])
        ops.adam_(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# More than 2^31 elements: the last tile, row and element must be where 64 bits put them.
ROWS, COLS = 2**16 + 5, 2**15


def far_tensor():
    x = torch.zeros(ROWS, COLS, dtype=torch.bfloat16, device="cuda")
    x[-200:] = values((200, COLS), torch.bfloat16).cuda()
    return x


def test_quantize_more_than_2_to_the_31_elements():
    x, scale = far_tensor(), torch.tensor(2.0**-3)
    q, _, amax = quantize(x, scale.cuda())
    wanted, _, wanted_amax = quantize(x[-200:].cpu(), scale)
    same(q[-200:], wanted)
    same(amax, wanted_amax)
    assert not q[:-200].view(torch.uint8).any()
    back = ops.dequantize(q, scale.cuda(), torch.bfloat16, "tensor", 0)
    same(back[-200:], ops.dequantize(wanted, scale, torch.bfloat16, "tensor", 0))


def test_cast_transpose_of_more_than_2_to_the_31_elements():
    x, scale = far_tensor(), torch.tensor(2.0**-3)
    q, qt, _, amax = ops.cast_transpose(x, E4M3, scale.cuda(), None, True)
    wanted, wanted_t, _, wanted_amax = ops.cast_transpose(x[-200:].cpu(), E4M3, scale, None, True)
    same(q[-200:], wanted)
    same(qt[:, -200:].contiguous(), wanted_t)
    same(amax, wanted_amax)
    assert not qt[:, :-200].view(torch.uint8).any()


def ones(*shape, device="cuda", dtype=torch.float32):
    return torch.ones(shape, device=device, dtype=dtype)


# (what is wrong, the call, what the error says)
REFUSED = [
    ("a scale on the CPU", lambda: quantize(ones(4, 4), ones(device="cpu")),
     r"quantize: scale must be on cuda:0 .* got cpu"),
    ("a history on the CPU",
     lambda: ops.cast_transpose(ones(4, 4), E4M3, None, torch.zeros(17), True),
     r"cast_transpose: history must be on cuda:0 .* got cpu"),
    ("gradients on two devices",
     lambda: ops.grad_norm([ones(4), ones(4, device="cpu")], [ones(0)] * 2, [ones(0)] * 2),
     r"grad_norm: grads must be on cuda:0 .* got cpu"),
    ("a scale of a CPU tensor on the GPU", lambda: quantize(ones(4, 4, device="cpu"), ones()),
     r"quantize: scale must be on cpu .* got cuda:0"),
    ("FP8 that is quantised again", lambda: quantize(ones(4, 4, dtype=E4M3)),
     r"quantize: x must be f32, f16 or bf16, got e4m3"),
    ("f64", lambda: quantize(ones(4, 4, dtype=torch.float64)),
     r"quantize: x must be float32, .* got Double"),
    ("a code that is none", lambda: ops.quantize(
        ones(4, 4), torch.bfloat16, None, None, "tensor", 0, True, False, 0),
     r"quantize: dtype must be e4m3, e5m2 or f16, got bf16"),
    ("no matrix", lambda: ops.cast_transpose(ones(4), E4M3, None, None, True),
     r"cast_transpose: x must be a matrix, got 1"),
    ("a scale too many", lambda: quantize(ones(4, 4), ones(2)),
     r"quantize: scale must be 1 float32, got 2"),
    ("FP8 from FP8", lambda: ops.dequantize(
        ones(4, dtype=E4M3), ones(), torch.float8_e5m2, "tensor", 0),
     r"dequantize: dtype must be f32, f16 or bf16, got e5m2"),
    ("a target of f32", lambda: ops.accumulate_(ones(4), ones(), ones(), ones(4), None, None),
     r"accumulate.*: target must be e4m3, e5m2 or bf16, got f32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), [row[1:] for row in REFUSED],
                         ids=[row[0] for row in REFUSED])  # fmt: skip
def test_a_mistake_is_named_and_leaves_no_error_behind(call, message):
    with pytest.raises(REFUSAL, match=message):
        call()
    x = values((16, 16), torch.float32)
    same(quantize(x.cuda())[0], quantize(x)[0])
    torch.cuda.synchronize()


def test_adam_refuses_mixed_devices_and_changes_nothing():
    arguments = [on_cuda(a) for a in adam_arguments(((16, 16), (8, 8)))]
    before = [[t.clone() for t in cuda_tensors(a)] for a in arguments]
    arguments[3][1] = arguments[3][1].cpu()
    with pytest.raises(REFUSAL, match=r"adam_: grads must be on cuda:0 .* got cpu"):
        ops.adam_(*arguments)
    arguments[3][1] = arguments[3][1].cuda()
    for now, then in zip(arguments, before, strict=True):
        for a, b in zip(cuda_tensors(now), then, strict=True):
            same(a, b)


def cuda_tensors(value):
    return value if isinstance(value, list) else [value]


def fill_memory():
    """Takes all that the allocator still gives, down to its smallest block."""
    held, size = [], 1 << 32
    while size >= 512:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held


def test_out_of_memory_in_a_step_changes_nothing():
    def make(device):
        torch.manual_seed(0)
        model = qv.convert(torch.nn.Linear(64, 48), recipe="fp8lm-o2").to(device)
        for p, seed in zip(model.parameters(), itertools.count()):
            grad = values(p.shape, torch.float32, seed).to(device)
            p.grad = qv.quantize(grad) if isinstance(p, qv.ScaledTensor) else grad
        return model, qv.AdamW(model.parameters(), lr=1e-2, recipe="fp8lm-o2")

    def state(model, optimizer):
        return [bytes_of(t) for t in [*model.parameters(), *(
            t for p in model.parameters() for t in optimizer.state[p].values())]]  # fmt: skip

    def bytes_of(t):
        return [part.cpu() for part in plain_tensors(t.detach())]

    model, optimizer = make("cuda")
    cpu_model, cpu_optimizer = make("cpu")
    for one in (optimizer, cpu_optimizer):
        one.step()  # the states exist and the kernels are loaded
    before = state(model, optimizer)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    refused = 0
    try:
        held = fill_memory()
        while True:  # with one more block of memory each time: it fails at every allocation
            try:
                optimizer.step()
                break
            except RuntimeError as error:
                # The stable ABI of torch 2.11 says which call failed, but not why.
                assert re.search("memory|empty", str(error)), error
                refused += 1
            for now, then in zip(state(model, optimizer), before, strict=True):
                for a, b in zip(now, then, strict=True):
                    same(a, b, f"after {refused} refusals")
            held.pop()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert refused > 0
    cpu_optimizer.step()
    for got, wanted in zip(state(model, optimizer), state(cpu_model, cpu_optimizer), strict=True):
        for a, b in zip(got, wanted, strict=True):
            same(a, b)


@pytest.mark.parametrize("name", [n for n in recipe.names() if recipe.get(n).linear])
def test_linear_and_adamw_train_on_the_gpu(name):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("quaver::gemm", "CUDA"):
        pytest.skip("this build has no gemm for CUDA")
    torch.manual_seed(0)
    model = qv.convert(torch.nn.Linear(64, 64).cuda(), recipe=name)
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=name)
    x = torch.randn(128, 64, device="cuda")
    losses = []
    for _ in range(20):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
