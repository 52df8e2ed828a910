"""Recipes: the one table of FP8 choices, as frozen data. No code branches on a recipe's name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .moment_rules import SubsetNorm, Subspace, check

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# The storage of optimizer states, by name; optim/states.py implements each.
STATES = ("f32", "e4m3", "e5m2", "e4m3-expand", "e5m2-expand", "e4m3-tensor", "f16-tensor")

# Adam's moments in 4 bits, which go together; optim/packed.py implements each.
PACKED_FIRST, PACKED_SECONDS = "dynamic4", ("linear4", "linear4-rank1", "factor")


@dataclass(frozen=True)
class LinearRecipe:
    """The formats and scaling of a linear layer's products.

    Args:
        input, weight, grad_output: float8_e4m3fn or float8_e5m2 of the products' operands. CUDA
            multiplies no e5m2 by e5m2.
        scaling: of inputs and output gradients, "current" (just in time) or "delayed" (just in
            time for 16 casts, then from the maximum of the last 16 amaxes).
        master: storage of the weight itself. "as-is" leaves the parameter alone, "bf16" makes it a
            plain bf16 parameter, "f16-tensor" a ScaledTensor: f16 codes with one scale.
        weight_grad: the gradient that backward leaves in `.grad`. "f32" and "bf16" are the
            product's format; a plain parameter's gradient is then a plain tensor of the parameter's
            dtype. "e4m3" is a ScaledTensor of 1 byte a value, also for a plain parameter, so that
            only code that takes ScaledTensors may read it.
        grad_accumulate: "bf16" or "f32", the format of an e4m3 gradient once a second micro-batch
            is added.
        cache: "none" casts a weight where it is used; "master" keeps the two FP8 copies of an
            "f16-tensor" weight (2 bytes a value), which every write of the weight writes too. A
            plain weight has no such copies, because any code may write it unnoticed.
        grain: the values that share a scale: all of a "tensor"; a "row" of each operand, as the
            product reads it; or a "block", 1 x 128 along the axis that a product sums over for
            inputs and output gradients, and 128 x 128 for weights (DeepSeek-V3, arXiv 2412.19437,
            section 3.3.2). Rows and blocks are scaled just in time, and go with plain weights.
        kept: the scales of the transposed input that backward keeps. "grain" has those of `grain`,
            4 bytes for 128 codes of blocks; "tile", with blocks, has one for each 128 x 128.
        power_of_two: scales are rounded up to powers of two. Those of tensors always are.
        weight_product: "fp8", or with rows and blocks "bf16": the product of the weight's gradient
            reads input and output gradient in bf16, and backward keeps the input in bf16.

    Raises:
        ValueError: a field with a value that is none of its choices, or choices that exclude each
            other; it names the field and the choices.
    """

    input: torch.dtype = E4M3
    weight: torch.dtype = E4M3
    grad_output: torch.dtype = E5M2
    scaling: str = "current"
    weight_grad: str = "f32"
    master: str = "as-is"
    grad_accumulate: str = "bf16"
    cache: str = "none"
    grain: str = "tensor"
    kept: str = "grain"
    power_of_two: bool = True
    weight_product: str = "fp8"

    def __post_init__(self):
        formats = (E4M3, E5M2)
        check(
            self,
            input=formats,
            weight=formats,
            grad_output=formats,
            scaling=("current", "delayed"),
            weight_grad=("e4m3", "bf16", "f32"),
            master=("as-is", "bf16", "f16-tensor"),
            grad_accumulate=("bf16", "f32"),
            cache=("none", "master"),
            grain=("tensor", "row", "block"),
            kept=("grain", "tile"),
            power_of_two=(True, False),
            weight_product=("fp8", "bf16"),
        )
        if self.cache == "master" and self.master != "f16-tensor":
            raise ValueError(
                f'LinearRecipe: cache="master" needs master="f16-tensor", got {self.master!r}: '
                "copies of a plain weight could be stale"
            )
        fine = self.grain != "tensor"
        for field, value, possible in (
            ("scaling", "delayed", not fine),
            ("master", "f16-tensor", not fine),
            ("power_of_two", False, fine),
            ("kept", "tile", self.grain == "block"),
            ("weight_product", "bf16", fine and self.weight_grad != "e4m3"),
        ):
            if getattr(self, field) == value and not possible:
                raise ValueError(
                    f"LinearRecipe: {field}={value!r} excludes grain={self.grain!r} with "
                    f"weight_grad={self.weight_grad!r}"
                )

    @property
    def weight_grain(self) -> str:
        """The grain of the weight's scales."""
        return "tile" if self.grain == "block" else self.grain


@dataclass(frozen=True)
class ActivationRecipe:
    """FP8 between linear layers (COAT, arXiv 2410.19313, section 5).

    `norm` and `mlp`: norms and MLPs give FP8 to the linear layers that read them, with the scales
    of the layers' products (one a tensor, or 1 x 128 blocks), and save their own inputs for
    backward in e4m3 groups of 1 x `block` with power-of-two scales.
    `smooth_swiglu`: the product of a gated MLP is divided by a power of two per channel before its
    cast, from the amaxes of the forward before, and the next layer's FP8 weights are multiplied by
    it (arXiv 2409.12517); the weights themselves do not change.

    Raises:
        ValueError: a field with a value that is none of its choices.
    """

    block: int = 128
    norm: bool = True
    mlp: bool = True
    smooth_swiglu: bool = False

    def __post_init__(self):
        flags = (True, False)
        check(self, norm=flags, mlp=flags, smooth_swiglu=flags)
        if type(self.block) is not int or not 1 <= self.block < 2**31:
            raise ValueError(
                f"ActivationRecipe: block must be an int from 1 to 2^31 - 1, got {self.block!r}"
            )


@dataclass(frozen=True)
class Recipe:
    """The linear layers, activations and optimizer states that a model trains with.

    Args:
        autocast: the dtype of everything that is not FP8; None runs in the model's dtype.
        linear, activation: None leaves linear layers, or what lies between them, as they are;
            without FP8 linear layers nothing is FP8 between them.
        exp_avg, exp_avg_sq: names of STATES for converted weights, and with `plain_moments` for
            all other parameters too. Or a Subspace and a SubsetNorm, for the matrices among plain
            parameters; beside one of them the other moment is "f32" or "bf16".
        bf16_master: the rounding of a bf16 parameter's update: "nearest", "stochastic" (unbiased,
            no further bytes), "remainder" (16 more bits in the optimizer's state, which make
            it an exact f32 master) or "remainder8" (8 more bits: a master of 24 bits, the f32
            rounded to nearest at 15 bits of mantissa).
        master_rounding: the rounding of an f16 master's update, "stochastic" or "nearest".
        replica: what distributed.ZeroAdamW leaves of a converted weight on every rank, beside the
            master of its owner; None leaves copies of the master.
        fp8_sum: under tensor parallelism partial sums are sent in FP8, as gathered activations are.

    Raises:
        ValueError: a field with a value that is none of its choices.
    """

    name: str
    autocast: torch.dtype | None = torch.bfloat16
    linear: LinearRecipe | None = None
    activation: ActivationRecipe | None = None
    exp_avg: str | Subspace = "f32"
    exp_avg_sq: str | SubsetNorm = "f32"
    plain_moments: bool = False
    bf16_master: str = "nearest"
    master_rounding: str = "stochastic"
    replica: torch.dtype | None = None
    fp8_sum: bool = False

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Recipe: name must be a non-empty string, got {self.name!r}")
        for field, kind in (("linear", LinearRecipe), ("activation", ActivationRecipe)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"Recipe: {field} must be a {kind.__name__} or None, got {value!r}"
                )
        flags = (True, False)
        check(
            self,
            autocast=(None, torch.bfloat16, torch.float16),
            plain_moments=flags,
            bf16_master=("nearest", "stochastic", "remainder", "remainder8"),
            master_rounding=("stochastic", "nearest"),
            replica=(None, E4M3, E5M2),
            fp8_sum=flags,
        )
        self._check_moments()
        rows = self.linear is not None and self.linear.grain == "row"
        if self.activation is not None and rows:
            raise ValueError(
                "Recipe: an ActivationRecipe casts with a scale for each tensor or block: "
                "linear.grain must be tensor or block, got row"
            )

    @property
    def composed(self) -> bool:
        """Whether a moment is not one value for each element."""
        return isinstance(self.exp_avg, Subspace) or isinstance(self.exp_avg_sq, SubsetNorm)

    @property
    def packed(self) -> bool:
        """Whether moments have 4 bits."""
        return self.exp_avg == PACKED_FIRST

    def _check_moments(self) -> None:
        first, second = self.exp_avg == PACKED_FIRST, self.exp_avg_sq in PACKED_SECONDS
        if first or second:
            return self._check_packed(first and second)
        named = ("f32", "bf16") if self.composed else STATES
        for field, kind in (("exp_avg", Subspace), ("exp_avg_sq", SubsetNorm)):
            if not isinstance(getattr(self, field), kind):
                check(self, **{field: named})
        if self.composed and self.linear is not None:
            raise ValueError(
                "Recipe: a Subspace or SubsetNorm is for plain parameters: linear must be None, "
                f"got {self.linear!r}"
            )

    def _check_packed(self, both: bool) -> None:
        if not both:
            raise ValueError(
                f'Recipe: exp_avg "{PACKED_FIRST}" goes with one of exp_avg_sq '
                f"{', '.join(PACKED_SECONDS)}, got {self.exp_avg} and {self.exp_avg_sq}"
            )
        if self.linear is not None and self.linear.master == "f16-tensor":
            raise ValueError(
                "Recipe: moments of 4 bits are for plain weights: linear.master must be as-is or "
                "bf16, got f16-tensor"
            )


_FP8LM = LinearRecipe(scaling="delayed", weight_grad="e4m3", master="f16-tensor", cache="master")
# Just in time: the norm's and the activation's kernel reduces its own amax (Group Scaling).
_COAT = LinearRecipe(weight_grad="bf16", master="bf16")

# Their own scales leave output gradients range enough in e4m3.
_FINE = LinearRecipe(grain="block", grad_output=E4M3, power_of_two=False)

# Values of a norm or an MLP are cast once, to codes that every product reads as they are. Powers of
# two need no division, and a tile's scales take no more memory than COAT's one a tensor.
_COAT_FINE = replace(_COAT, grain="block", grad_output=E4M3, kept="tile")

_RECIPES = {
    r.name: r
    for r in (
        Recipe("f32", autocast=None),
        Recipe("bf16"),
        Recipe("tensorwise", linear=LinearRecipe()),
        Recipe("rowwise", linear=replace(_FINE, grain="row")),
        Recipe("blockwise", linear=_FINE),
        Recipe("fp8lm-o1", linear=_FP8LM),
        Recipe("fp8lm-o2", linear=_FP8LM, exp_avg="e4m3-tensor", exp_avg_sq="f16-tensor"),
        Recipe(
            "fp8lm-o3",
            linear=_FP8LM,
            exp_avg="e4m3-tensor",
            exp_avg_sq="f16-tensor",
            replica=E4M3,
            fp8_sum=True,
        ),
        *(
            Recipe(
                name,
                linear=linear,
                activation=ActivationRecipe(),
                exp_avg="e4m3-expand",
                exp_avg_sq="e4m3-expand",
                plain_moments=True,
                bf16_master="stochastic",
            )
            for name, linear in (("coat", _COAT), ("coat-blockwise", _COAT_FINE))
        ),
    )
}


# Of AdamW alone: a model needs no conversion for them.
_STEPS = {
    r.name: r
    for r in (
        Recipe("subset-norm", exp_avg_sq=SubsetNorm(), bf16_master="stochastic"),
        Recipe("snsm", exp_avg=Subspace(), exp_avg_sq=SubsetNorm(), bf16_master="stochastic"),
        *(
            Recipe(name, exp_avg="dynamic4", exp_avg_sq=second, bf16_master="stochastic")
            for name, second in (
                ("adamw-4bit", "linear4-rank1"),
                ("adamw-4bit-block", "linear4"),
                ("adamw-4bit-factor", "factor"),
            )
        ),
    )
}


def names() -> list[str]:
    """The recipes by which a model trains."""
    return list(_RECIPES)


def step_names() -> list[str]:
    """The recipes of AdamW alone."""
    return list(_STEPS)


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name; a Recipe (say from dataclasses.replace) is returned as it is.

    Raises ValueError on an unknown name, listing the known ones.
    """
    if isinstance(recipe, Recipe):
        return recipe
    known = _RECIPES | _STEPS
    if recipe not in known:
        raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(known)}")
    return known[recipe]
