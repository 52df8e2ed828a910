"""Tensor and sequence parallelism: spread the layers of a model over the ranks of a group.

    model = qv.convert(model, recipe="fp8lm-o2")
    parallelize(model, mesh["tp"])                    # our Llama and GPT, Hugging Face's Llama
    optimizer = qv.AdamW(model.parameters())

or with a plan as torch.distributed.tensor.parallel has them, a style for every name pattern:

    parallelize(model, group, {"mlp.up": ColumnParallel(), "mlp.down": RowParallel()})

Between the linear layers a rank holds a shard of the sequence, inside a part of the heads or of the
hidden width. Embeddings and the head (`lm_head`) are replicated: every rank computes them whole.
The weights of spread layers have a scale for each part, which is never coarser than one for the
whole: with scales that are powers of two the codes are those of the whole weight, except for values
below its smallest normal, which keep more bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch.distributed as dist
from torch import nn

from ...comm.together import together
from ...comm.transport import Transport, compare
from ..replicas import broadcast_values, describe
from .linear import TPGroup
from .styles import (
    ColumnParallel,
    GatherInput,
    LocalHeads,
    RowParallel,
    SequenceParallel,
    Split,
)

__all__ = [
    "ColumnParallel",
    "GatherInput",
    "LocalHeads",
    "RowParallel",
    "SequenceParallel",
    "Split",
    "default_plan",
    "parallelize",
]


def parallelize(
    model: nn.Module,
    mesh,
    plan: Mapping[str, object] | None = None,
    *,
    fp8_sum: bool = False,
    regather: bool | None = None,
) -> nn.Module:
    """Spread `model` over the ranks of `mesh`, in place; returns the model.

    Layers that `quaver.convert` made send FP8; plain ones send the autocast dtype. Convert first,
    and build the optimizer last: spread weights are new Parameters. Rank 0's values are what
    all ranks start from. The model takes the same input on all ranks and, by the default plan,
    gives the same output on all. `quaver.clip_grad_norm_` and `quaver.AdamW` take spread
    parameters: the norm is that of the whole model, and all ranks skip a step or none.

    Args:
        mesh: a 1-D DeviceMesh (mesh["tp"] of one with more axes), a process group, or a Transport,
            whose `traffic` then counts what is sent.
        plan: a style for every module whose name matches a pattern; None for `default_plan(model)`.
        fp8_sum: partial sums (the reduce-scatters) are sent in FP8 too: e4m3 outputs, and input
            gradients in the recipe's gradient format.
        regather: backward gathers inputs again from the shards, as Megatron-LM does; without, a
            rank keeps the whole sequence, which saves a third of the gathers. None: keeps the
            sequence where it takes no more bytes than its shard in bf16: FP8 codes on two ranks.

    Raises:
        ValueError: on all ranks, where one of them found a pattern that matches nothing, features
            or heads that the ranks do not divide, or another model or plan than rank 0.
        TypeError: a style for a module that it does not fit.
    """
    if isinstance(mesh, Transport):
        transport = mesh
    else:
        transport = Transport(mesh if isinstance(mesh, dist.ProcessGroup) else mesh.get_group())
    group = TPGroup(transport, fp8_sum, regather)
    device = next(model.parameters()).device
    with together(transport, device, ValueError):
        styles = _resolve(model, default_plan(model) if plan is None else plan)
        _check_ties(model, styles)
        for name, module, style in styles:
            style.check(name, module, transport.size)
    state = model.state_dict(keep_vars=True)
    mine = {"options": f"fp8_sum={fp8_sum}, regather={regather}"}
    mine |= {f"style {i}": f"{name}: {style}" for i, (name, _, style) in enumerate(styles)}
    compare("parallelize", transport.all_gather_object(mine | describe(state, model), device))
    broadcast_values(state.values(), transport)
    for _, module, style in styles:
        style.apply(module, group)
    return model


def default_plan(model: nn.Module) -> dict[str, object]:
    """The plan of a decoder that is recognised by its modules: quaver's Llama and GPT, and models
    built like Hugging Face's Llama. Raises ValueError for others."""
    blocks, kind = _blocks(model)
    plan = {f"{blocks}.0": Split()}
    first = model.get_submodule(f"{blocks}.0")
    if kind == "quaver":
        attention, root = first.attention, ""
        up = "gate_up" if hasattr(first.mlp, "gate_up") else "up"
        ffn = first.mlp.down.in_features
        inner = {
            "norm[12]": SequenceParallel(),
            "attention": LocalHeads(heads=attention.heads, kv_heads=attention.kv_heads),
            "attention.qkv": ColumnParallel(tuple(attention.split), gathers=False),
            "attention.out": RowParallel(),
            "mlp": GatherInput(),
            f"mlp.{up}": ColumnParallel(
                (ffn,) * (getattr(first.mlp, up).out_features // ffn), gathers=False
            ),
            "mlp.down": RowParallel(),
        }
    else:
        attention, root = first.self_attn, blocks.removesuffix("layers")
        heads = attention.q_proj.out_features // attention.head_dim
        kv_heads = attention.k_proj.out_features // attention.head_dim
        inner = {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": LocalHeads(heads=heads, kv_heads=kv_heads),
            "self_attn.[qkv]_proj": ColumnParallel(gathers=False),
            "self_attn.o_proj": RowParallel(),
            "mlp": GatherInput(argument="x"),
            "mlp.gate_proj": ColumnParallel(gathers=False),
            "mlp.up_proj": ColumnParallel(gathers=False),
            "mlp.down_proj": RowParallel(),
        }
    for name, module in first.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if own and not any(fnmatchcase(name, pattern) for pattern in inner):
            raise ValueError(f"default_plan: {blocks}.0.{name} is unknown; give a plan")
    plan |= {f"{blocks}.*.{pattern}": style for pattern, style in inner.items()}
    return plan | {f"{root}norm": SequenceParallel(gather_output=True)}


def _blocks(model: nn.Module) -> tuple[str, str]:
    """The name of the list of blocks, and the kind of model."""
    names = dict(model.named_modules())
    for blocks, kind, needed in (
        ("blocks", "quaver", ("attention.qkv", "attention.out", "mlp.down")),
        ("model.layers", "huggingface", ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")),
        ("layers", "huggingface", ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")),
    ):
        if all(f"{blocks}.0.{name}" in names for name in needed):
            return blocks, kind
    raise ValueError(f"default_plan: {type(model).__name__} is no known decoder; give a plan")


def _resolve(model: nn.Module, plan: Mapping[str, object]) -> list[tuple[str, nn.Module, object]]:
    """Every module that a pattern names, with its style."""
    found = []
    for pattern, style in plan.items():
        depth = pattern.count(".")
        matches = [
            (name, module, style)
            for name, module in model.named_modules()
            if name.count(".") == depth and fnmatchcase(name, pattern)
        ]
        if not matches:
            raise ValueError(f"parallelize: no module matches {pattern!r}")
        found += matches
    return found


def _check_ties(model: nn.Module, styles) -> None:
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, module, style in styles:
        if isinstance(style, (ColumnParallel, RowParallel)):
            for parameter in module.parameters(recurse=False):
                if len(names[id(parameter)]) > 1:
                    raise ValueError(
                        f"parallelize: {name} shares a parameter: {', '.join(names[id(parameter)])}"
                    )
