"""The experts of a mixture whose weights lie in stacks [experts, N, K], with FP8 products.

transformers keeps experts like this (its `use_experts_implementation`). Tokens are sorted by their
expert; each expert multiplies its own as a linear layer would, with its own scales.
A stack that does not train may be codes alone, with scales of rows or of 128 x 128 tiles.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import recipe as recipes
from ..mismatch import mark_replaced
from ..ops import FLOATS
from ..tensor import ScaledTensor
from . import grouped
from .cast import check_devices, output_dtype
from .grouped import expert_of, group_rows, multiply_groups
from .linear import product_dtype
from .state_dict import SUFFIX, load_master, master_scale, save_master
from .swap import Swapped, swap, swap_back
from .weight import (
    check_cut,
    convert_weight,
    freeze_weight,
    set_dtype,
    several_scales,
)

TRAINS = "it trains"  # the reason why `frozen` leaves a layer

FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")


def _plain_product(x: Tensor, weight: Tensor, ends: list[int], out: torch.dtype,
                   input_major: bool) -> Tensor:  # fmt: skip
    """What `multiply_groups` computes, in `out` without FP8."""
    frozen, parts = isinstance(weight, ScaledTensor), []
    weights = None if frozen else weight.unbind()  # one gradient of the stack, not one for each
    with torch.autocast(x.device.type, enabled=False):
        for expert, begin, end in group_rows(ends):
            of = expert_of(weight, expert).dequantize(out) if frozen else weights[expert].to(out)
            parts.append(x[begin:end].to(out) @ (of if input_major else of.t()))
    rest = len(x) - sum(len(part) for part in parts)
    width = weight.shape[2 if input_major else 1]
    return torch.cat((*parts, x.new_zeros((rest, width), dtype=out)))


class Experts(Swapped):
    """Experts that multiply in FP8 by a recipe, as `quaver.convert` makes them.

    Input hidden_states [tokens, K], top_k_index and top_k_weights [tokens, k]; output [tokens, K]
    in the input's dtype: for each token the sum of its k experts, times their weights. On GPUs
    before sm_89, and on Hopper for many tokens, the host reads the count of each expert's tokens
    (grouped.LOOPED_ROWS). Scales are always just in time, because an expert may see no token for
    many steps.

    Raises:
        TypeError: an input of another dtype.
        RuntimeError: parameters on another device than the input.
    """

    plain = False  # whether `quaver.watch` lets it multiply without FP8
    several_scales = ()  # weight.py
    observer = None  # what `quaver.watch` measures the operands of both products with

    def convert_in_place(self, recipe: recipes.Recipe, frozen: bool = False) -> None:
        _keep_out_of_graphs()
        swap(self, Experts)
        self.rule = recipe.linear
        self.plain_dtype = self.down_proj.dtype  # what `restore` gives back
        convert_one = freeze_weight if frozen else convert_weight
        for name in weight_names(self):
            old = getattr(self, name)
            setattr(self, name, convert_one(old, self.rule))
            mark_replaced(old, getattr(self, name))
        self.several_scales = several_scales(self, weight_names(self))

    def restore(self) -> None:
        for name in weight_names(self):
            old = getattr(self, name)
            if isinstance(old, ScaledTensor):
                setattr(self, name, nn.Parameter(old.detach().dequantize(), old.requires_grad))
                mark_replaced(old, getattr(self, name))
            elif self.rule.master == "bf16":
                set_dtype(old, self.plain_dtype)
        del self.rule, self.plain_dtype, self.several_scales
        swap_back(self)

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return self.__dict__.get("_is_fsdp_managed_module", False)

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        check_cut(self)
        self.__dict__["_is_fsdp_managed_module"] = value

    def __getattr__(self, name: str):
        """Of frozen codes also the state_dict's entries of scales, which
        torch.distributed.checkpoint reads as attributes."""
        if name.endswith(SUFFIX):
            weight = self._parameters.get(name.removesuffix(SUFFIX))
            if isinstance(weight, ScaledTensor):
                return master_scale(weight)
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in weight_names(self):
                save_master(getattr(self, name), destination, f"{prefix}{name}")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in weight_names(self):
            state_dict = load_master(getattr(self, name), state_dict, f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.plain_dtype = fn(torch.empty(0, dtype=self.plain_dtype)).dtype
        return self

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hidden_states.dtype not in FLOATS:
            raise TypeError(
                "Experts: hidden_states must be float32, float16 or bfloat16, got "
                f"{hidden_states.dtype}"
            )
        check_devices(self, hidden_states.device)
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = self.ends_of(experts)
        # Experts of other ranks have numbers from num_experts on; their tokens are last.
        here = (experts < self.num_experts).unsqueeze(1) if self._is_expert_parallel else None
        experts = experts.clamp(max=self.num_experts - 1)
        x = hidden_states[order // k]
        up = self.multiply(x, "gate_up_proj" if self.has_gate else "up_proj", ends, experts)
        y = self._apply_gate(up) if self.has_gate else self.act_fn(up)
        y = self.multiply(y, "down_proj", ends, experts)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(1)
        y = y if here is None else y.masked_fill(~here, 0.0)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return y[back].view(tokens, k, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def ends_of(self, experts: Tensor) -> Tensor:
        """The end of each expert's rows, int64 [E], of the sorted experts of all rows."""
        numbers = torch.arange(self.num_experts, device=experts.device)
        return torch.searchsorted(experts, numbers, right=True)

    def multiply(self, x: Tensor, name: str, ends: Tensor, experts: Tensor) -> Tensor:
        """The product of the sorted tokens x [S, K] and their experts' weights called `name`, with
        their biases; `experts` are the experts of the rows."""
        out, weight = output_dtype(x), getattr(self, name)
        learns = torch.is_grad_enabled() and weight.requires_grad
        if self.plain:
            y = _plain_product(x, weight, grouped.read_ends(ends, len(x)), out, self.is_transposed)
        else:
            y = multiply_groups(
                x, weight, ends, self.rule, product_dtype(out), self.is_transposed, learns
            )
            y = y if y.dtype == out else y.to(out)
        if self.observer is not None:
            self.observer(self.rule, name, x, weight, y, ends)
        return y + getattr(self, f"{name}_bias")[experts].to(out) if self.has_bias else y


@functools.cache
def _keep_out_of_graphs() -> None:
    """Lets a compiled model break at experts, whose sizes depend on values. Not at import, because
    this imports the compiler."""
    Experts.forward = torch.compiler.disable(Experts.forward)


def weight_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the attributes by which transformers describes experts, and stacks of
    matrices that fit them."""
    if not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS):
        return False
    up, down = (module._parameters.get(name) for name in weight_names(module))
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return False
    count = getattr(module, "num_experts", None)
    last, first = (1, 2) if module.is_transposed else (2, 1)  # the axes of K and N
    inner = up.shape[first] // (2 if module.has_gate else 1)
    biases = {f"{name}_bias" for name in weight_names(module)} if module.has_bias else set()
    return (
        {*module._parameters} == {*weight_names(module), *biases}
        and up.shape[0] == down.shape[0] == count
        and down.shape[last] == inner
        and down.shape[first] == up.shape[last]
    )


def why_experts_stay(module: nn.Module, recipe: recipes.Recipe, frozen: bool) -> str | None:
    """The reason why experts keep their own products under a recipe, or None."""
    rule = recipe.linear
    if frozen:
        trains = any(getattr(module, name).requires_grad for name in weight_names(module))
        return TRAINS if trains else None
    if rule.master == "f16-tensor" or rule.weight_grad == "e4m3":
        return (
            "it is a stack of experts, whose weights and gradients stay plain: tensorwise, "
            "rowwise, blockwise, coat and coat-blockwise multiply it in FP8"
        )
    dtypes = {p.dtype for p in module.parameters(recurse=False)}
    if not dtypes <= set(FLOATS):
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}"
    return None
