"""What the model that chooses Hopper's matrix products (csrc/gemm_choice.cpp) expects of sums that
are promoted to f32 each 128 of K, beside sums in the tensor cores: the products of Llama 7B's
linear layers for 8192 tokens, on the 132 multiprocessors of an H100. A model, no measurement.
"""

import common

from quaver.gemm_table import Product

TOKENS, WIDTH, HIDDEN = 8192, 4096, 11008
LAYERS = {"attention": (WIDTH, WIDTH), "gate and up": (2 * HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
MULTIPROCESSORS = 132


def products(out, width):
    """The three products of a layer with a weight [out, width], by name."""
    yield "forward", (TOKENS, out, width), "e4m3"
    yield "input's gradient", (TOKENS, width, out), "e5m2"
    yield "weight's gradient", (out, width, TOKENS), "e5m2"


def efficiency(shape, first, fast):
    product = Product(*shape, a=first, fast_accumulate=fast)
    return product.candidates(MULTIPROCESSORS)[0][0]["efficiency"]


def main():
    print(common.describe(common.machine()))
    rows = []
    for layer, (out, width) in LAYERS.items():
        for name, shape, first in products(out, width):
            promoted, fast = (efficiency(shape, first, fast) for fast in (False, True))
            ratio = round(promoted / fast, 9)  # both are products of the model's factors
            what = f"{layer}, {name}: predicted speed of promoted sums over fast ones"
            rows.append(common.judge(what, ratio, "at least", 0.93, promoted=promoted))
    common.finish("gemm_model", rows)


if __name__ == "__main__":
    main()
