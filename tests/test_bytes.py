"""The counts of bytes on fake tensors (bench/traffic.py), and those of a Llama block."""

import bench_bytes
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from traffic import GIVEN, NOW, Traffic, cases, maxima

import quaver as qv

N = 256 * 512
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


def counted(function):
    """{op: (least, counted)} of function(x f32, y bf16), two matrices."""
    with FakeTensorMode():
        x, y = torch.empty(256, 512), torch.empty(256, 512, dtype=BF16)
        with Traffic() as traffic:
            function(x, y)
    return {what: move[1:] for what, move in traffic.by_op().items()}


@pytest.mark.parametrize(
    "function, bytes_each",
    [
        (lambda x, y: x + y, 4 + 2 + 4),
        (lambda x, y: x * 2, 4 + 4),
        (lambda x, y: x.mul_(2), 4 + 4),
        (lambda x, y: y.copy_(x), 4 + 2),
        (lambda x, y: x.to(BF16), 4 + 2),
        (lambda x, y: torch.add(x, x, out=y), 4 + 4 + 2),
        (lambda x, y: torch.cat((y, y)), 2 * (2 + 2)),
        (lambda x, y: torch.zeros_like(x), 4),
        (lambda x, y: x.t().contiguous(), 4 + 4),
        (lambda x, y: x * y[:1].expand(256, 512), 4 + 4 + 2 / 256),
        (lambda x, y: (x.t(), x.view(-1), x[3:], x.split(2), torch.empty_like(x), x.detach()), 0),
        (lambda x, y: (y @ y.t(), torch.addmm(x, x, x.new_empty(512, 512))), 0),
    ],
)
def test_an_op_of_aten_moves_its_tensors_once(function, bytes_each):
    moved = counted(function)
    assert sum(least for least, _ in moved.values()) == bytes_each * N
    assert all(least == count for least, count in moved.values())


def test_a_kernel_of_several_passes_moves_more():
    norm = torch.nn.functional.rms_norm
    try:
        with FakeTensorMode(), Traffic() as traffic:
            torch.nn.functional.rms_norm = bench_bytes.rms_norm(traffic)
            x, weight = torch.empty(256, 512, requires_grad=True), torch.empty(512)
            y = torch.nn.functional.rms_norm(x, (512,), weight.requires_grad_())
            y.backward(torch.empty_like(y))
    finally:
        torch.nn.functional.rms_norm = norm
    moves = {what.split(":")[0]: move for what, move in traffic.by_op().items()}
    rows, row = 4 * 256, 4 * 512
    forward, backward = moves["aten _fused_rms_norm"], moves["aten _fused_rms_norm_backward"]
    assert forward[1:] == (8 * N + rows + row, 12 * N + rows + 256 * row)
    assert backward[1:] == (12 * N + rows + 2 * row, 28 * N + rows + row + 512 * row)


def test_a_linear_layer_casts_what_it_is_not_given():
    def linear(x, y):
        codes, scale = y.to(E4M3), x.new_empty(())
        torch.ops.quaver.linear(y, None, None, y, None, None, 256, E4M3, E4M3, BF16, True)
        torch.ops.quaver.linear(y, codes, scale, codes, scale, None, 256, E4M3, E4M3, BF16, True)

    moved = counted(linear)
    known, more = cases(), maxima(NOW, 256, 512)
    both = known[f"cast_transpose bf16 to e4m3, {NOW}"]
    alone = known[f"cast_transpose bf16 to e4m3 alone, {NOW}"]
    assert moved["linear: input"] == (both[0] * N, both[1] * N + more)
    assert moved["linear: weight"] == (alone[0] * N, alone[1] * N + more)
    assert set(moved) == {"linear: input", "linear: weight", "aten _to_copy: bf16 to e4m3"}
    assert (both[0], alone[0]) == (6, 5) and more > 0 and maxima(GIVEN, 256, 512) == 0


def test_an_operand_that_is_not_dense_is_copied():
    def activate(x, y):
        torch.ops.quaver.activate(*y.chunk(2, dim=1), "silu", None, E4M3)  # rows that lie apart
        torch.ops.quaver.activate(y, y.view(512, 256).t(), "silu", None, E4M3)

    moved = counted(activate)
    assert moved["activate: dense up"] == (4 * N, 4 * N) and "activate: dense x" not in moved


def test_what_is_not_counted_is_named():
    with pytest.raises(NotImplementedError, match="Ours has no grad_norm"):
        counted(lambda x, y: torch.ops.quaver.grad_norm([x], [], []))
    with pytest.raises(KeyError, match="no count of 'normalize LayerNorm f32, just in time'"):
        counted(lambda x, y: qv.ops.normalize(x, centered=True))


def test_no_count_of_a_llama_block_has_grown(monkeypatch):
    found = bench_bytes.counted(["coat"])
    totals = bench_bytes.totals_of(found)
    # The gradients of a fused gate and up are cast once, as the products read them.
    assert not any("dense" in op or op == "dequantize" for op in found["f32"]["coat"].by_op())
    assert bench_bytes.grown(totals) == []
    more = {stream: {"coat": total["coat"] + 1} for stream, total in totals.items()}
    assert len(bench_bytes.grown(more)) == 2
