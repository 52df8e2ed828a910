"""Bytes of global memory that CUDA's kernels move for the ops of a model, counted on fake tensors:
no bytes of the model exist, so that it may have its real sizes.

Our kernels: bytes an element that the interpreter of tests/ptx counted on their machine-independent
code (bench/results/ptx.json), beside the least of them that the same algorithm must move. aten's:
each tensor that an op reads or writes, once, unless PASSES says otherwise. Views and allocations
move nothing. Products and attention are left out.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import launches
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KEPT = Path(__file__).resolve().parent / "results" / "ptx.json"
TILE, MULTIPROCESSORS = 128, 132  # kTile of csrc/cuda; an H100's
LOOP, IDLE = 8 * MULTIPROCESSORS, 2 * MULTIPROCESSORS  # most_loop_blocks, idle_blocks
NOW, DELAYED, GIVEN = "just in time", "delayed", "given scale"
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
         torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}  # fmt: skip

LEFT_OUT = ("mm", "addmm", "bmm", "_scaled_dot_product")  # products and attention

# How often CUDA's kernels of an op read an argument, where that is not once; "rows": once for each
# row of the first argument.
PASSES = {
    # A block a row: the sum of squares, then the result (vectorized_layer_norm_kernel).
    "_fused_rms_norm": {"x": 2, "weight": "rows"},
    # Two sums a row, then dx, and a kernel of its own for the weight's gradient
    # (layer_norm_grad_input_kernel_vectorized, GammaBetaBackwardCUDAKernel).
    "_fused_rms_norm_backward": {"dy": 3, "x": 3, "weight": "rows", "weight again": "rows"},
}

# Ops that write an argument, or make a tensor like one, without a read of it.
WRITES_ONLY = ("copy_", "fill_", "zero_", "full_like", "ones_like", "zeros_like", "new_full",
               "new_ones", "new_zeros")  # fmt: skip


class Move(NamedTuple):
    """What one kernel, or an op's kernels together, move in bytes: at least, and as counted."""

    what: str
    least: float
    counted: float


def size(t: torch.Tensor) -> int:
    """The bytes of a tensor's elements; those that a broadcast repeats count once."""
    distinct = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return math.prod(distinct) * t.element_size()


def aten(name: str, read: dict, written) -> Move:
    """What an op of aten moves that reads {argument: tensor} and writes tensors."""
    passes = PASSES.get(name, {})

    def times(key) -> int:
        n = passes.get(key, 1)
        first = next(iter(read.values()))
        return first.numel() // first.shape[-1] if n == "rows" else n

    out = sum(map(size, written))
    least = sum(size(t) for key, t in read.items() if not key.endswith("again")) + out
    dtypes = " ".join(NAMES.get(t.dtype, str(t.dtype)) for t in read.values())
    to = " ".join(NAMES.get(t.dtype, str(t.dtype)) for t in written)
    return Move(f"aten {name}: {dtypes} to {to}", least,
                sum(times(key) * size(t) for key, t in read.items()) + out)  # fmt: skip


def cases() -> dict:
    """{case: (least bytes, counted bytes)} an element, of bench/results/ptx.json."""
    rows = json.loads(KEPT.read_text())["rows"]
    return {
        row["name"].removesuffix(": PTX instructions an element"): (row["least_bytes"],
                                                                    row["bytes"])
        for row in rows if "bytes" in row
    }  # fmt: skip


def maxima(mode: str, rows: int, cols: int) -> int:
    """The bytes of a cast's amax between its two launches: every block of the second reads what
    each of the first left. At most: a first pass may have fewer blocks."""
    tiles = math.ceil(rows / TILE) * math.ceil(cols / TILE)
    return {NOW: 4 * LOOP * tiles, DELAYED: 4 * tiles * min(tiles, IDLE), GIVEN: 0}[mode]


def mode_of(scale, history) -> str:
    return GIVEN if scale is not None else NOW if history is None else DELAYED


class Ours:
    """What ops of ours move, by their arguments {name: value} and results: a method each, which
    gives (role, case, tensor, mode) for each cast. It follows csrc/torch."""

    @staticmethod
    def linear(a, out):
        if a["codes"] is None:
            mode = mode_of(None, a.get("history"))
            yield "input", layouts(a["x"], a["both"]), a["x"], mode
        if a["weight_scale"] is None:
            yield "weight", layouts(a["weight"], a.get("input_major")), a["weight"], NOW

    @staticmethod
    def linear_backward(a, out):
        if a["channels"] is not None:
            raise NotImplementedError("linear_backward: the product by channels is not counted")
        if a["codes"] is None:
            mode = mode_of(None, a.get("history"))
            yield "gradient", layouts(a["dy"], a["xt"] is not None), a["dy"], mode
        weight = a["weight"]
        if weight is not None and weight.dtype != a["weight_dtype"]:
            yield "weight", layouts(weight, not a.get("input_major")), weight, GIVEN
        if a.get("dw_codes") is not None:
            yield "weight's gradient", f"quantize {NAMES[a['dw_dtype']]} to e4m3", out[1], NOW

    @staticmethod
    def normalize(a, out):
        kind = "LayerNorm" if a["centered"] else "RMSNorm"
        mode = mode_of(a.get("scale"), a.get("history"))
        yield "", f"normalize {kind} {NAMES[a['x'].dtype]}", a["x"], mode

    @staticmethod
    def normalize_backward(a, out):
        kind = "LayerNorm" if a["mean"].numel() else "RMSNorm"
        dy, dx = NAMES[a["dy"].dtype], NAMES[a["dx_dtype"]]
        case = f"normalize_backward {kind} {dy}" + (f" to {dx}" if dx != dy else "")
        yield "", case, a["dy"], None

    @staticmethod
    def activate(a, out):
        mode = mode_of(a.get("scale"), a.get("history"))
        yield "", f"activate {gate(a, a['up'])} {NAMES[a['x'].dtype]}", a["x"], mode

    @staticmethod
    def activate_backward(a, out):
        case = f"activate_backward {gate(a, a['uq'])} {NAMES[a['dy'].dtype]}"
        yield "", case, a["dy"], mode_of(None, a.get("x_history"))

    @staticmethod
    def rotate(a, out):
        yield "", f"rotate {NAMES[out.dtype]}", out, None

    @staticmethod
    def dequantize(a, out):
        yield "", f"dequantize e4m3 to {NAMES[a['dtype']]}", a["q"], None


def layouts(x, both: bool) -> str:
    """The case of a cast to either FP8 format, which move the same bytes."""
    return f"cast_transpose {NAMES[x.dtype]} to e4m3" + ("" if both else " alone")


def is_read_as_it_lies(op: str, t: torch.Tensor) -> bool:
    """Whether an op reads a tensor without a dense copy (dense() and with_rows() of csrc/torch)."""
    rows = op in ("activate", "activate_layouts") and t.dim() == 2 and t.stride(1) == 1
    return t.is_contiguous() or rows


def gate(a: dict, up) -> str:
    return "SwiGLU" if a["kind"] == "silu" and up is not None else a["kind"]


class Traffic(TorchDispatchMode):
    """Counts what ops move while it is the mode in force, in `moves`."""

    def __init__(self):
        super().__init__()
        self.moves: list[Move] = []
        self._cases = cases()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented  # a subclass acts by ops on its parts
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        space, name = func.name().split(".")[0].split("::")
        given = zip(func._schema.arguments, args, strict=False)
        named = {argument.name: value for argument, value in given} | kwargs
        if space == "quaver":
            self._add_ours(name, named, out)
        elif space == "aten" and not self._is_free(func, name):
            self._add_aten(func, name, named, out)
        return out

    @staticmethod
    def _is_free(func, name: str) -> bool:
        returns = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        return view or name in launches.NO_KERNEL or name.startswith(LEFT_OUT)

    def _add_aten(self, func, name: str, named: dict, out) -> None:
        writes = {a.name: a.kwarg_only for a in func._schema.arguments
                  if a.alias_info is not None and a.alias_info.is_write}  # fmt: skip
        read = {}
        for key, value in named.items():
            unread = writes.get(key) or (name in WRITES_ONLY and key == "self")
            if not unread:
                for i, t in enumerate(tree_leaves(value)):
                    if isinstance(t, torch.Tensor):
                        read[f"{key} {i}"] = t
        self.moves.append(aten(name, read, [t for t in tree_leaves(out) if t is not None]))

    def _add_ours(self, name: str, named: dict, out) -> None:
        if not hasattr(Ours, name):
            raise NotImplementedError(f"traffic.py: Ours has no {name}; state what it moves there")
        for key, value in named.items():
            if isinstance(value, torch.Tensor) and not is_read_as_it_lies(name, value):
                self.moves.append(Move(f"{name}: dense {key}", 2 * size(value), 2 * size(value)))
        for role, case, t, mode in getattr(Ours, name)(named, out):
            self.moves.append(self._counted(f"{name}: {role}" if role else name, case, t, mode))

    def _counted(self, what: str, case: str, t: torch.Tensor, mode: str | None) -> Move:
        if mode is not None:
            case += f", {mode}"
        if case not in self._cases:
            raise KeyError(f"no count of {case!r} in {KEPT.name}: add it to tests/ptx/count, and "
                           "run bench_ptx.py")  # fmt: skip
        least, counted = (bytes_each * t.numel() for bytes_each in self._cases[case])
        if mode is not None:
            counted += maxima(mode, t.numel() // t.shape[-1], t.shape[-1])
        return Move(what, least, counted)

    def by_op(self) -> dict[str, Move]:
        """The sums of moves of one name, the largest first."""
        sums = defaultdict(lambda: [0.0, 0.0])
        for move in self.moves:
            sums[move.what][0] += move.least
            sums[move.what][1] += move.counted
        found = [Move(what, *values) for what, values in sums.items()]
        return {move.what: move for move in sorted(found, key=lambda m: -m.counted)}


class RMSNorm(torch.autograd.Function):
    """What CUDA has for an RMSNorm, on a Traffic: one op each way, where the CPU composes many."""

    @staticmethod
    def forward(ctx, x, weight, traffic):
        ctx.save_for_backward(x, weight)
        ctx.traffic = traffic
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        traffic.moves.append(aten("_fused_rms_norm", {"x": x, "weight": weight}, [y, rstd]))
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        read = {"dy": dy, "x": x, "weight": weight, "weight again": weight, "rstd": rstd}
        ctx.traffic.moves.append(aten("_fused_rms_norm_backward", read, [dx, dweight]))
        return dx, dweight, None


def rms_norm(traffic: Traffic):
    """torch.nn.functional.rms_norm as CUDA's autocast runs it: in f32."""

    def forward(x, shape, weight=None, eps=None):
        if torch.is_autocast_enabled("cpu"):
            x, weight = x.float(), weight.float()
        return RMSNorm.apply(x, weight, traffic)

    return forward
