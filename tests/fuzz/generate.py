"""Calls of the native ops, each a function of its seed: valid ones, and valid ones gone wrong."""

from __future__ import annotations

import math
import random

import torch
from memory import expanded, place
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8, FLOATS = (E4M3, E5M2), (torch.float32, torch.float16, torch.bfloat16)
CODES = (*FP8, torch.float16)
ANY = (*FLOATS, *FP8)
STRANGE = (torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)
GRAINS = ("tensor", "row", "block", "tile")
KINDS = ("silu", "gelu", "gelu_tanh")
WILD_INTS = (-(2**63), -(2**62), -17, -1, 0, 1, 2, 15, 16, 2**62, 2**63 - 16, 2**63 - 1)
WILD_FLOATS = (0.0, -0.0, -1.0, 1e-45, 3e38, math.inf, -math.inf, math.nan)
WILD_SCALES = (0.0, -1.0, -3e38, 3e38, 1e-45, -1e-40, 1e-30, math.inf, -math.inf, math.nan)
WILD_WORDS = ("", "tensor ", "Row", "relu", "\0", "\u00fc" * 40, "x" * 5000)
SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 130)


class Generator:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def call(self, ops: list[str]) -> tuple[str, list, bool]:
        """An op, its positional arguments, and whether they are as the op wants them."""
        op = self.pick(ops)
        args = list(getattr(self, op)())
        wild = self.random.choices((0, 1, 2), (6, 3, 1))[0]
        for _ in range(wild):
            if args:
                i = self.random.randrange(len(args))
                args[i] = self.wild(args[i])
        return op, args, wild == 0

    def pick(self, choices):
        return choices[self.random.randrange(len(choices))]

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def maybe(self, make):
        return make() if self.chance(0.5) else None

    def bits(self, shape, dtype) -> Tensor:
        """Any codes of a format."""
        size = dtype.itemsize
        count = math.prod(shape)
        raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=self.torch)
        return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)

    def numbers(self, shape, dtype=torch.float32, wild=0.2) -> Tensor:
        if dtype.itemsize == 1 or self.chance(wild / 2):
            return self.bits(shape, dtype)
        x = torch.randn(shape, generator=self.torch) * 10.0 ** self.random.uniform(-6, 6)
        if self.chance(0.1):
            x = x * 0
        if self.chance(wild) and x.numel():
            x.view(-1)[self.random.randrange(x.numel())] = self.pick(WILD_FLOATS)
        return x.to(dtype)

    def tensor(self, values: Tensor, written=False) -> Tensor:
        """The values in some memory: exact, guarded, with strides."""
        size, style = values.element_size(), self.random.random()
        if style < 0.4:
            return place(values)
        first = 64 + size * self.random.randrange(4)
        if style < 0.8 or written or not values.dim():
            return place(values, None, first, 64)
        stride = [s * 2 for s in values.contiguous().stride()]
        if style > 0.9 and values.dim() == 2:
            stride = [1, max(values.shape[0], 1)]
        return place(values, stride, first, 64)

    def floating(self, shape) -> Tensor:
        return self.tensor(self.numbers(shape, self.pick(FLOATS)))

    def floats(self, *shape, written=False) -> Tensor:
        return self.tensor(self.numbers(shape), written)

    def scales(self, *shape, written=False) -> Tensor:
        scale = torch.exp2(torch.randint(-20, 20, shape, generator=self.torch).float())
        if self.chance(0.3):
            scale = scale * (1 + torch.rand(shape, generator=self.torch))
        if self.chance(0.1) and scale.numel():
            scale.view(-1)[self.random.randrange(scale.numel())] = self.pick(WILD_SCALES)
        return self.tensor(scale, written)

    def history(self) -> Tensor:
        state = torch.rand(17, generator=self.torch) * 10.0 ** self.random.uniform(-6, 6)
        state[0] = self.pick((0, 3, 15, 16, 17, 31))
        if self.chance(0.2):
            state[0] = self.pick((-1, -1e30, 32, 1e9, math.nan, math.inf))
        if self.chance(0.2):
            state[self.random.randrange(1, 17)] = self.pick(WILD_FLOATS)
        return self.tensor(state, written=True)

    def matrix(self):
        return self.pick(SIZES), self.pick(SIZES)

    def block(self):
        return self.pick((1, 3, 7, 16, 32, 48, 128, 1000, 2**30))

    def wild(self, value):
        if self.chance(0.05):
            return self.pick((None, "word", 7, 0.5, [], torch.float32))
        if isinstance(value, Tensor):
            return self.wild_tensor(value)
        if isinstance(value, list) and value:
            return self.wild_list(list(value))
        if isinstance(value, bool):
            return not value
        if isinstance(value, str):
            return self.pick(WILD_WORDS)
        if isinstance(value, int):
            return self.pick(WILD_INTS)
        if isinstance(value, float):
            return self.pick(WILD_FLOATS)
        if isinstance(value, torch.dtype):
            return self.pick((*ANY, *STRANGE))
        return self.floats(*self.matrix())

    def wild_list(self, items: list) -> list:
        i = self.random.randrange(len(items))
        change = self.random.randrange(4)
        if change == 0:
            del items[i]
        elif change == 1:
            items.append(items[i])
        elif change == 2:
            items = []
        else:
            items[i] = self.wild(items[i])
        return items

    def wild_tensor(self, t: Tensor) -> Tensor:
        shape = list(t.shape)
        change = self.random.randrange(10)
        if change == 0 or t.is_meta:
            return t.to("meta")
        if change == 1:
            return torch.empty(0, dtype=t.dtype)
        if change == 2:  # at an odd address
            return place(t, None, 65, 64)
        if change == 3 and shape:  # one value for all
            return expanded(t) if shape[0] else t
        if change == 4:
            return place(t, [3 * s for s in t.contiguous().stride()], 64, 64)
        if change == 5:
            return self.tensor(self.bits(shape, self.pick(ANY)))
        if change == 6:
            return torch.zeros(shape, dtype=self.pick(STRANGE))
        if change == 7:
            return (
                self.tensor(self.numbers([*shape, self.pick((1, 2))], t.dtype))
                if t.dtype in ANY
                else t
            )
        if shape:
            i = self.random.randrange(len(shape))
            shape[i] = max(0, shape[i] + self.pick((-1, 1, 16)))
        else:
            shape = [2]
        return self.tensor(
            self.bits(shape, t.dtype) if t.dtype in ANY else torch.zeros(shape).to(t.dtype)
        )

    def quantize(self):
        shape, grain, block = self.layout()
        x = self.floating(shape)
        scale = history = None
        if self.chance(0.3):
            scale = self.scales(*scale_shape(shape, grain, block))
        elif grain == "tensor" and self.chance(0.5):
            history = self.history()
        stochastic, seed = self.chance(0.3), self.random.randrange(2**63)
        return x, self.pick(CODES), scale, history, grain, block, self.chance(0.7), stochastic, seed

    def dequantize(self):
        shape, grain, block = self.layout()
        q = self.tensor(self.bits(shape, self.pick(CODES)))
        return q, self.scales(*scale_shape(shape, grain, block)), self.pick(FLOATS), grain, block

    def layout(self):
        grain, matrix = self.pick(GRAINS), self.matrix()
        others = [(3, *matrix), (self.pick(SIZES),), ()] if grain != "tile" else []
        return self.pick([matrix, *others]), grain, self.block()

    def cast_layouts(self):
        x, grain = self.floating(self.matrix()), self.pick(GRAINS[1:])
        tiles_t = grain == "block" and self.chance(0.5)
        return x, self.pick(FP8), grain, *(self.chance(p) for p in (0.8, 0.8, 0.5)), tiles_t

    def cast_transpose(self):
        x = self.floating(self.matrix())
        return x, self.pick(FP8), *self.source(), self.chance(0.7)

    def source(self):
        """A scale, a history, or neither."""
        kind = self.random.randrange(3)
        return self.scales() if kind == 0 else None, self.history() if kind == 1 else None

    def channels(self, cols):
        return self.maybe(lambda: self.floating((cols,)))

    def normalize(self):
        rows, cols = self.matrix()
        x = self.floating((rows, cols))
        return (
            x, self.channels(cols), self.channels(cols), self.pick((1e-6, 1e-3, 1.0)),
            self.chance(0.5), self.pick(FP8), *self.source(), self.chance(0.7), self.block(),
        )  # fmt: skip

    def normalize_layouts(self):
        x, weight, bias, eps, centered, dtype, *_ = self.normalize()
        flags = self.chance(0.5), self.chance(0.7)
        return x, weight, bias, eps, centered, dtype, *flags, self.block()

    def saved(self, rows, cols, block):
        scale = self.bits((rows, -(-cols // block)), torch.uint8)
        return self.tensor(self.bits((rows, cols), E4M3)), self.tensor(scale)

    def normalize_backward(self):
        (rows, cols), block = self.matrix(), self.block()
        mean = self.floats(rows) if self.chance(0.5) else torch.empty(0)
        return (
            self.floating((rows, cols)), *self.saved(rows, cols, block),
            mean, self.floats(rows), self.channels(cols), block, self.chance(0.5),
            self.pick(FLOATS),
        )  # fmt: skip

    def activate(self):
        (rows, cols), dtype = self.matrix(), self.pick(FLOATS)
        x = self.tensor(self.numbers((rows, cols), dtype))
        up = self.maybe(lambda: self.tensor(self.numbers((rows, cols), dtype)))
        smooth = self.maybe(lambda: self.scales(cols))
        return (
            x, up, self.pick(KINDS), smooth, self.pick(FP8), *self.source(), self.chance(0.7),
            self.block(),
        )  # fmt: skip

    def activate_backward(self):
        (rows, cols), block, gated = self.matrix(), self.block(), self.chance(0.5)
        joint = gated and cols % 16 == 0 and self.chance(0.5)
        return (
            self.floating((rows, cols)), *self.saved(rows, cols, block),
            *(self.saved(rows, cols, block) if gated else (None, None)), self.pick(KINDS),
            self.maybe(lambda: self.scales(cols)), block, self.pick(FP8), self.maybe(self.history),
            self.history() if gated and not joint and self.chance(0.5) else None, self.chance(0.7),
            self.chance(0.5), joint,
        )  # fmt: skip

    def activate_layouts(self):
        return *self.activate()[:5], self.chance(0.5), self.chance(0.7), self.block()

    def activate_backward_layouts(self):
        return *self.activate_backward()[:9], self.chance(0.7)

    def operands(self):
        m, n, k = (self.pick((0, 1, 3, 16, 17, 48)) for _ in range(3))
        operands = []
        for rows in (m, n):
            blocks, tiles = -(-k // 128), -(-rows // 128)
            shapes = [(), (rows, 1), (rows,), (rows, blocks), (tiles, blocks)]
            scale = self.scales(*self.pick(shapes))
            operands += [self.tensor(self.bits((rows, k), self.pick(FP8))), scale]
        return m, n, operands

    def gemm(self):
        _, n, operands = self.operands()
        return *operands, self.channels(n), self.pick(FLOATS), self.chance(0.5)

    def gemm_(self):
        m, n, operands = self.operands()
        out, accumulate = self.numbers((m, n), self.pick(FLOATS)), self.chance(0.5)
        bias = None if accumulate else self.channels(n)
        return self.tensor(out), *operands, bias, accumulate, self.chance(0.5)

    def gemm_quantize(self):
        _, n, operands = self.operands()
        return *operands, self.channels(n), self.pick(FP8), self.scales(), self.chance(0.5)

    def ends(self, rows):
        """Ends of a few groups of `rows` rows, not always of all of them."""
        ends = sorted(self.random.randrange(rows + 1) for _ in range(self.pick((1, 2, 5))))
        return torch.tensor(ends)

    def cast_groups(self):
        rows, cols = self.matrix()
        grain = self.pick(GRAINS[:3])
        tiles_t = grain == "block" and self.chance(0.5)
        return (
            self.floating((rows, cols)), self.ends(rows), self.pick(FP8), grain, self.chance(0.8),
            self.chance(0.5), tiles_t,
        )  # fmt: skip

    def cast_stack(self):
        shape, grain = (self.pick((1, 3)), *self.matrix()), self.pick(("tensor", "row", "tile"))
        scale = self.scales(shape[0]) if grain == "tensor" and self.chance(0.5) else None
        flags = (self.chance(p) for p in (0.8, 0.8, 0.5))
        return self.floating(shape), self.pick(FP8), grain, scale, *flags

    def grouped_gemm(self):
        rows, n, k = self.pick((0, 1, 17, 150)), self.pick((1, 16, 20)), self.pick((16, 48, 144))
        ends, padded = self.ends(rows), (n + 15) // 16 * 16
        groups, blocks = len(ends), -(-k // 128)
        return (
            self.tensor(self.bits((rows, k), self.pick(FP8))),
            self.scales(*self.pick([(groups,), (rows, 1), (rows, blocks)])),
            self.tensor(self.bits((groups, padded, k), self.pick(FP8))),
            self.scales(*self.pick([(groups,), (groups, padded, 1), (groups, 1, blocks)])),
            ends, n, self.pick(FLOATS), self.chance(0.5),
        )  # fmt: skip

    def grouped_gemm_weight(self):
        rows, sizes = self.pick((0, 1, 17, 150)), [self.pick((1, 16, 20)) for _ in range(2)]
        ends = self.ends(rows)
        groups, width, operands = len(ends), (rows // 16 + len(ends)) * 16, []
        for size in sizes:
            height = (size + 15) // 16 * 16
            shapes = [(groups,), (groups, height, 1), (height, rows // 128 + groups)]
            operands += [self.tensor(self.bits((height, width), self.pick(FP8))),
                         self.scales(*self.pick(shapes))]  # fmt: skip
        return *operands, ends, *sizes, self.pick(FLOATS), self.chance(0.5)

    def linear(self):
        rows, n, k = (self.pick((0, 1, 3, 16, 17, 48)) for _ in range(3))
        lead = self.pick([(rows,), (rows, 2), ()])
        shapes = (math.prod(lead), k), (n, k)
        (codes, scale), (weight, w_scale) = (self.padded(*s) for s in shapes)
        cast, cast_weight, input_major = (self.chance(0.5) for _ in range(3))
        if cast:
            codes = scale = None
        if cast_weight:
            weight, w_scale = self.floating((k, n) if input_major else (n, k)), None
        return (
            self.floating((*lead, k)), codes, scale, weight, w_scale, self.channels(n), n,
            self.pick(FP8), self.pick(FP8), self.pick(FLOATS), self.chance(0.5), input_major,
            self.maybe(self.history) if cast else None,
        )  # fmt: skip

    def linear_backward(self):
        rows, n, k = (self.pick((0, 1, 3, 16, 17, 48)) for _ in range(3))
        cast, input_major, format = self.chance(0.5), self.chance(0.5), self.pick(FP8)
        needs_x, needs_weight = self.pick([(True, True), (True, False), (False, True)])
        codes, scale = self.padded(rows, n)
        g = (None, None, None) if cast else (codes, self.padded(n, rows)[0], scale)
        if self.chance(0.5):
            weight = self.floating((k, n) if input_major else (n, k)), self.scales()
        else:
            weight = self.padded(k, n, format)
        return (
            self.floating((rows, n)), *g, *(weight if needs_x else (None, None)),
            *(self.padded(k, rows) if needs_weight else (None, None)),
            self.channels(k), n, k, self.pick(FP8), format,
            self.pick(FLOATS), self.pick(FLOATS), self.maybe(lambda: self.pick(FP8)), input_major,
            self.maybe(self.history) if cast else None,
        )  # fmt: skip

    def padded(self, rows, cols, dtype=None):
        """Codes of a matrix, padded to multiples of 16, and their scale."""
        shape = tuple((size + 15) // 16 * 16 for size in (rows, cols))
        return self.tensor(self.bits(shape, dtype or self.pick(FP8))), self.scales()

    def scaled(self):
        """Values, scale and amax of a gradient; an empty tensor stands for none."""
        values = self.tensor(
            self.numbers(self.pick([self.matrix(), (self.pick(SIZES),), ()]), self.pick(ANY))
        )
        none = lambda make: make() if self.chance(0.6) else torch.empty(0)  # noqa: E731
        return values, none(self.scales), none(lambda: self.floats())

    def grad_norm(self):
        return [
            list(part)
            for part in zip(*(self.scaled() for _ in range(self.pick((1, 2, 5)))), strict=True)
        ]

    def subset_sums(self):
        each = [self.scaled() for _ in range(self.pick((1, 2, 5)))]
        subsets = [self.subsets(values.shape) if values.dim() == 2 else 0 for values, *_ in each]
        return *map(list, zip(*each, strict=True)), subsets

    def accumulate_(self):
        shape, target = self.matrix(), self.pick((*FP8, torch.bfloat16))
        other = self.tensor(self.numbers(shape, self.pick(ANY)))
        return (
            self.tensor(self.numbers(shape, target), written=True), self.scales(written=True),
            self.floats(written=True), other, self.maybe(self.scales), self.maybe(self.floats),
        )  # fmt: skip

    def share_scales(self):
        ranks, count = self.pick((1, 2, 5)), self.pick(SIZES)
        return (
            self.tensor(self.numbers((ranks, count)).abs()), self.maybe(lambda: self.scales(count)),
            self.pick(FP8),
        )  # fmt: skip

    def pack(self):
        values, scales, _ = zip(*(self.scaled() for _ in range(self.pick((1, 2, 5)))), strict=True)
        length = sum(-(-v.numel() // 16) * 16 for v in values) + 16 * self.pick((0, 1, 5))
        return list(values), list(scales), self.scales(len(values)), self.pick(ANY), length

    def reduce_shards(self):
        ranks, length = self.pick((1, 2, 5)), 16 * self.pick((0, 1, 3, 20))
        sizes = [self.pick(SIZES) for _ in range(self.pick((0, 1, 2, 5)))]
        dtype, n = self.pick(ANY), len(sizes)
        return (
            self.tensor(self.numbers((ranks, length), dtype)), self.maybe(lambda: self.scales(n)),
            self.maybe(lambda: self.scales(n)), sizes, 16 * self.pick((0, 0, 1, 4)),
            self.pick((dtype, torch.float32)),
        )  # fmt: skip

    def encode_state(self):
        x = self.numbers(self.pick([self.matrix(), (self.pick(SIZES),)]), self.pick(FLOATS))
        return self.tensor(x), self.pick(FP8), self.chance(0.5)

    def decode_state(self):
        shape = self.pick([self.matrix(), (self.pick(SIZES),)])
        groups = -(-math.prod(shape) // 128)
        return self.tensor(self.bits(shape, self.pick(FP8))), self.scales(groups), self.chance(0.5)

    def rotate(self):
        batch, length, dim = self.pick((1, 2)), self.pick((0, 1, 7)), self.pick((0, 2, 14, 16, 64))
        heads = [self.pick((0, 1, 2, 5)) for _ in range(self.pick((1, 2, 3)))]
        dtype = self.pick((torch.float32, torch.bfloat16))
        return (
            [self.tensor(self.numbers((batch, length, n, dim), dtype)) for n in heads],
            *(self.tensor(self.numbers((length, dim))) for _ in range(2)),
            self.pick(range(sum(heads) + 1)), self.chance(0.5),
        )  # fmt: skip

    def nf4_encode(self):
        x = self.numbers(
            self.pick([self.matrix(), (self.pick((63, 4096, 4099)),)]), self.pick(FLOATS)
        )
        return self.tensor(x), self.pick((64, 128, 4096))

    def nf4_decode(self):
        n, block = self.pick((*SIZES, 4096, 4099)), self.pick((64, 128, 4096))
        codes = self.tensor(self.bits(((n + 1) // 2,), torch.uint8))
        return codes, self.scales(-(-n // block)), n, self.pick(FLOATS), block

    def adam_(self):
        count = self.pick((1, 2, 3))
        each = [self.parameter() for _ in range(count)]
        # Of every state: all parameters' weights, then all their first moments, then all second.
        values, scales, amaxes, copies, scalings = (
            [p[name][k] for k in range(3) for p in each]
            for name in ("values", "scales", "amaxes", "copies", "scalings")
        )
        grads, grad_scales, steps, remainders, sums, seeds, first, subsets = (
            [p[name] for p in each]
            for name in ("grad", "grad_scale", "step", "remainder", "sums", "seed", "first",
                         "subsets")
        )  # fmt: skip
        hyper = torch.tensor([[1e-3, 0.9, self.pick((0.95, 0.999)), 1e-8, 0.1]] * count).double()
        skipped = self.tensor(torch.zeros((), dtype=torch.int64), written=True)
        return (
            values, scales, amaxes, grads, grad_scales, self.floats(count), steps,
            self.tensor(hyper, written=True), skipped, copies, remainders, sums, scalings, seeds,
            first, subsets,
        )  # fmt: skip

    def adam_4bit_(self):
        each = [self.packed_parameter() for _ in range(self.pick((1, 2, 3)))]
        lists = [list(x) for x in zip(*each, strict=True)]
        tensors, (remainders, seconds, seeds) = lists[:8], lists[8:]
        row = [1e-3, 0.9, self.pick((0.95, 0.999)), 1e-8, 0.1]
        hyper = self.tensor(torch.tensor([row] * len(each)).double(), written=True)
        skipped = self.tensor(torch.zeros((), dtype=torch.int64), written=True)
        return (*tensors[:7], self.floats(len(each)), tensors[7], hyper, skipped, remainders,
                seconds, seeds)  # fmt: skip

    def packed_parameter(self) -> tuple:
        """One parameter's weight, moments of 4 bits, gradient and step; its remainder and
        options."""
        shape, second = self.pick((self.matrix(), (3, 4, 5, 6), (2, 700))), self.random.randrange(3)
        n, none = math.prod(shape), torch.empty(0)
        scales = (-(-n // 128), sum(shape), n // shape[-1] + n // shape[-2] if n else 0)[second]
        dtype = self.pick(FLOATS)
        exact = dtype == torch.bfloat16 and self.chance(0.5)
        rounded = dtype != torch.float32 and not exact and self.chance(0.5)
        codes = ((n + 1) // 2,)
        return (
            self.tensor(self.numbers(shape, dtype), True),
            self.tensor(self.bits(codes, torch.uint8), True),
            self.tensor(self.numbers((-(-n // 128),), torch.float32).abs(), True),
            none.byte() if second == 2 else self.tensor(self.bits(codes, torch.uint8), True),
            self.tensor(self.numbers((scales,), torch.float32).abs(), True),
            self.tensor(self.numbers(shape, self.pick(ANY))),
            self.scales() if self.chance(0.5) else none,
            self.tensor(torch.tensor(self.pick((0, 1, 1000, 2**62, 2**63 - 2))), True),
            self.remainder(shape) if exact else none,
            second, self.random.randrange(2**31) if rounded else -1,
        )  # fmt: skip

    def micro_adam_(self):
        each = [self.micro_parameter() for _ in range(self.pick((1, 2, 3)))]
        lists = [list(x) for x in zip(*each, strict=True)]
        tensors, (remainders, kept, blocks, seeds) = lists[:8], lists[8:]
        row = [1e-3, 0.9, self.pick((0.95, 0.999)), 1e-8, 0.1, self.pick((0.0, 0.5))]
        hyper = self.tensor(torch.tensor([row] * len(each)).double(), written=True)
        skipped = self.tensor(torch.zeros((), dtype=torch.int64), written=True)
        return (*tensors[:7], self.floats(len(each)), tensors[7], hyper, skipped, remainders, kept,
                blocks, seeds)  # fmt: skip

    def micro_parameter(self) -> tuple:
        """One parameter's weight, ring, error, gradient and step; its remainder and options."""
        shape = self.pick((self.matrix(), (4096,), (3, 1400)))
        n, block = math.prod(shape), self.pick((16, 64, 4096, 4112))
        kept = self.pick((1, 41, 4096)) if n >= 4096 else 0
        rest = n % 4096
        ring = (self.pick((1, 3)), n // 4096 * kept + (self.pick((1, rest)) if rest else 0))
        dtype = self.pick(FLOATS)
        exact = dtype == torch.bfloat16 and self.chance(0.5)
        rounded = dtype != torch.float32 and not exact and self.chance(0.5)
        state = [(ring, torch.int16), (ring, torch.bfloat16), (((n + 1) // 2,), torch.uint8),
                 ((-(-n // block), 2), torch.bfloat16)]  # fmt: skip
        none = torch.empty(0)
        return (
            self.tensor(self.numbers(shape, dtype), True),
            *(self.tensor(self.bits(*part), True) for part in state),
            self.tensor(self.numbers(shape, self.pick(ANY))),
            self.scales() if self.chance(0.5) else none,
            self.tensor(torch.tensor(self.pick((0, 1, 1000, 2**62, 2**63 - 2))), True),
            self.remainder(shape) if exact else none,
            kept, block, self.random.randrange(2**31) if rounded else -1,
        )  # fmt: skip

    def parameter(self) -> dict:
        """One parameter's weight, moments and gradient; an empty tensor stands for none."""
        shape, none = self.matrix(), torch.empty(0)
        blocks = -(-math.prod(shape) // 128)
        dtype = self.pick(FLOATS)
        kinds = [(dtype, 0)]
        for grain in (self.pick((0, 1, 2)), self.pick((0, 1, 2))):
            kinds.append((self.pick(FP8 if grain else (torch.float32, *CODES)), grain))
        copies = [none] * 3
        if dtype == torch.float16 and self.chance(0.5):
            copies = [self.tensor(self.bits(s, E4M3), True) for s in (shape, shape[::-1])]
            copies.append(self.scales(written=True))
        exact = dtype == torch.bfloat16 and self.chance(0.5)
        rounded = dtype != torch.float32 and not exact and self.chance(0.5)
        shapes, subsets = [shape] * 3, self.subsets(shape) if self.chance(0.3) else 0
        if subsets:
            kinds[2] = (self.pick((torch.float32, torch.bfloat16)), 0)
            kinds[1] = self.pick((kinds[1], (torch.bfloat16, 0)))
            shapes[2] = (-subsets if subsets < 0 else -(-math.prod(shape) // subsets),)
        scaled = [grain == 0 and stored in CODES for stored, grain in kinds]
        return {
            "values": [
                self.tensor(self.numbers(size, stored), True)
                for size, (stored, _) in zip(shapes, kinds, strict=True)
            ],
            "scales": [
                self.scales(blocks, written=True) if grain
                else self.scales(written=True) if one else none
                for one, (_, grain) in zip(scaled, kinds, strict=True)
            ],
            "amaxes": [self.scales(written=True) if one else none for one in scaled],
            "copies": copies,
            "scalings": [grain for _, grain in kinds],
            "grad": self.tensor(self.numbers(shape, self.pick(ANY))),
            "grad_scale": self.scales() if self.chance(0.5) else none,
            "step": self.tensor(torch.tensor(self.pick((0, 1, 1000, 2**62, 2**63 - 2))), True),
            "remainder": self.remainder(shape) if exact else none,
            "seed": self.random.randrange(2**31) if rounded else -1,
            "first": self.pick((0, 0, 128, 2**40)),
            "subsets": subsets,
            "sums": self.tensor(self.numbers(shapes[2]).abs(), True) if subsets else none,
        }  # fmt: skip

    def remainder(self, shape) -> Tensor:
        return self.tensor(self.bits(shape, self.pick((torch.int16, torch.int8))), True)

    def subsets(self, shape) -> int:
        """How elements of a matrix share a second moment: by rows, by columns, or in runs."""
        rows, cols = shape
        found = self.pick((cols, -cols, self.pick((1, 7, 100, 10**6))))
        return found if rows * cols and found else 0


def scale_shape(shape, grain: str, block: int):
    if grain == "tensor":
        return ()
    *rows, cols = shape or (1,)
    if grain == "tile":
        return tuple(-(-n // 128) for n in shape)
    return (*rows, 1 if grain == "row" else -(-cols // block))
