"""normalize and activate with their backwards against torch's bf16 ops and quaver's casts apart.

The plain baseline makes less: it keeps nothing in FP8 for backward. The rows "as much kept" add
that to it, by quantize.
"""

import common
import torch
import torch.nn.functional as F

import quaver as qv

ROWS, HIDDEN, INNER = 2048, 1024, 2816
E5M2 = torch.float8_e5m2


def bench(pairs):
    x, dy = (torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.randn(HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    gate, up, dh = (torch.randn(ROWS, INNER, dtype=torch.bfloat16) for _ in range(3))
    rms, layer = qv.ops.normalize(x, weight), qv.ops.normalize(x, weight, bias, 1e-5, True)
    swiglu = qv.ops.activate(gate, up)
    mean, rstd = (t[:, None].bfloat16() for t in (layer.mean, layer.rstd))

    def rms_norm():
        return qv.cast_transpose(F.rms_norm(x, (HIDDEN,), weight, 1e-6))

    def layer_norm():
        return qv.cast_transpose(F.layer_norm(x, (HIDDEN,), weight, bias, 1e-5))

    def layer_norm_backward():
        return torch.ops.aten.native_layer_norm_backward(
            dy, x, (HIDDEN,), mean, rstd, weight, bias, (True, True, True)
        )

    def gated():
        return qv.cast_transpose(F.silu(gate) * up)

    def gated_backward():
        grad = torch.ops.aten.silu_backward(dh * up, gate)
        return qv.cast_transpose(grad, E5M2), qv.cast_transpose(dh * F.silu(gate), E5M2)

    def keep(*tensors):
        return [qv.quantize(t, granularity="block", block=32) for t in tensors]

    def row(name, call, baseline, baseline_name, bar=None):
        return common.compare(
            name, baseline, call, baseline_name=baseline_name, pairs=pairs, bar=bar
        )

    norm, mlp = f"{ROWS} x {HIDDEN} bf16", f"{ROWS} x {INNER} bf16"
    yield row(f"normalize RMS {norm}", lambda: qv.ops.normalize(x, weight), rms_norm,
              "rms_norm + cast_transpose", 1.0)  # fmt: skip
    yield row(f"normalize layer {norm}",
              lambda: qv.ops.normalize(x, weight, bias, 1e-5, True), layer_norm,
              "layer_norm + cast_transpose", 1.0)  # fmt: skip
    yield row(f"normalize layer {norm}, as much kept",
              lambda: qv.ops.normalize(x, weight, bias, 1e-5, True),
              lambda: (layer_norm(), keep(x)), "the same + quantize")  # fmt: skip
    yield row(f"normalize_backward layer {norm}",
              lambda: qv.ops.normalize_backward(
                  dy, layer.saved, layer.mean, layer.rstd, weight, has_bias=True),
              layer_norm_backward, "native_layer_norm_backward")  # fmt: skip
    yield row(f"normalize_backward RMS {norm}",
              lambda: qv.ops.normalize_backward(dy, rms.saved, rms.mean, rms.rstd, weight),
              layer_norm_backward, "native_layer_norm_backward")  # fmt: skip
    yield row(f"activate silu, up {mlp}", lambda: qv.ops.activate(gate, up), gated,
              "silu * up + cast_transpose", 1.0)  # fmt: skip
    yield row(f"activate silu, up {mlp}, as much kept", lambda: qv.ops.activate(gate, up),
              lambda: (gated(), keep(gate, up)), "the same + 2 quantize")  # fmt: skip
    yield row(f"activate_backward silu, up {mlp}",
              lambda: qv.ops.activate_backward(dh, swiglu.x, swiglu.up), gated_backward,
              "silu_backward, silu, 2 cast_transpose")  # fmt: skip
    yield row(f"activate gelu {mlp}", lambda: qv.ops.activate(gate, kind="gelu"),
              lambda: qv.cast_transpose(F.gelu(gate)), "gelu + cast_transpose", 1.0)  # fmt: skip


if __name__ == "__main__":
    common.main("activation", bench)
