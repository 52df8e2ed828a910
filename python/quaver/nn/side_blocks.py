"""Finds the repeated blocks of a decoder of any library, and builds narrower ones of their kind."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from dataclasses import dataclass

import torch
from torch import nn

from ..structure import is_conv1d, is_norm
from ..tensor import is_sharded

OP = "side_tune"


@dataclass(frozen=True)
class Trunk:
    """The part of a model that the side network runs beside.

    blocks: the repeated layers; norm: of the last one's state; config: of their sizes; width: of
    their states; heads: modules behind the trunk that train, {name: module}, such as a classifier.
    """

    blocks: nn.ModuleList
    norm: nn.Module
    config: object
    width: int
    heads: dict[str, nn.Module]


def find_trunk(model: nn.Module) -> Trunk:
    """The one list of repeated blocks of `model`, the norm behind it and the heads.

    Raises ValueError naming the model where there is none, or more than one."""
    kind = type(model).__name__
    config = getattr(model, "config", None)
    found = _block_lists(model)
    if not found:
        raise ValueError(
            f"{OP}: {kind} has no repeated blocks: wanted one ModuleList of layers of one class"
        )
    if len(found) > 1:
        raise ValueError(
            f"{OP}: {kind} has several lists of blocks ({', '.join(found)}); wanted a decoder, "
            "which has one"
        )
    (name,) = found
    if config is None or _sizes(config) is None:
        raise ValueError(
            f"{OP}: {kind} has no config of its width and attention heads, by which side blocks "
            "are built"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    norms = {n: m for n, m in parent.named_children() if is_norm(m)}
    if len(norms) != 1:
        raise ValueError(
            f"{OP}: {kind} has {len(norms)} norms beside its blocks ({', '.join(norms) or 'none'});"
            " wanted the one behind the last block"
        )
    (norm,) = norms.values()
    width = _sizes(config)["width"]
    if norm.weight.numel() != width:
        raise ValueError(
            f"{OP}: {kind}'s last norm has {norm.weight.numel()} values, its blocks' states {width}"
        )
    return Trunk(found[name], norm, config, width, _heads(model))


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ModuleLists whose modules are of one class and hold matrices."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not isinstance(module, nn.ModuleList) or not len(module) or inside:
            continue
        if any(p.dim() > 1 for p in module.parameters()) and len({type(m) for m in module}) == 1:
            found[name] = module
    return found


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that a library's model has beside its base model and its language-model head."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "config", None)
    if not isinstance(base, nn.Module):
        return {}
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_children()
        if module not in (base, output) and any(True for _ in module.parameters())
    }


def check_weights(trunk: Trunk, encoded: bool) -> None:
    """Raises ValueError for blocks on several devices or sharded over ranks and, where they are to
    be `encoded`, for matrices of anything but linear layers."""
    devices = sorted({str(p.device) for p in trunk.blocks.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"{OP}: the model is on several devices ({', '.join(devices)}); wanted one"
        )
    for name, module in trunk.blocks.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(is_sharded(p) for p in own.values()):
            raise ValueError(f"{OP}: the model is sharded over ranks; side-tune it before")
        matrices = [key for key, p in own.items() if p.dim() > 1]
        linear = type(module) is nn.Linear or is_conv1d(module)
        if encoded and matrices and not linear:
            raise ValueError(
                f"{OP}: blocks.{name} is a {type(module).__name__} with a matrix {matrices[0]!r}, "
                'which is no linear layer to encode; take backbone="keep"'
            )


def _sizes(config) -> dict | None:
    """{"width", "heads", "kv_heads"} of a config of either kind; None of something else."""
    if dataclasses.is_dataclass(config) and hasattr(config, "dim"):
        return {"width": config.dim, "heads": config.heads, "kv_heads": config.kv_heads}
    width = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(width, int) or not isinstance(heads, int):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return {"width": width, "heads": heads, "kv_heads": kv_heads}


def narrow(config, reduction: int):
    """A copy of `config` with width, MLP width and heads divided by `reduction`. A head keeps its
    width, so that the positions of the model's own blocks fit; kv heads are at least one.

    Raises ValueError naming what is not divided."""
    sizes = _sizes(config)
    heads = sizes["heads"]
    for what in ("width", "heads"):
        if sizes[what] % reduction:
            noun = "attention heads" if what == "heads" else "values of a state"
            fits = [d for d in range(2, heads + 1) if heads % d == sizes["width"] % d == 0]
            raise ValueError(
                f"{OP}: reduction {reduction} does not divide the {sizes[what]} {noun}; take one "
                f"of {', '.join(map(str, fits)) or '1'}"
            )
    kv_heads = max(1, sizes["kv_heads"] // reduction)
    if heads // reduction % kv_heads:
        raise ValueError(
            f"{OP}: reduction {reduction} leaves {heads // reduction} heads and {kv_heads} "
            "key-value heads, which do not divide them; take another"
        )
    width = sizes["width"] // reduction
    if dataclasses.is_dataclass(config) and hasattr(config, "dim"):
        return config.replace(
            dim=width, heads=heads // reduction, kv_heads=kv_heads, ffn=-(-config.ffn // reduction)
        )
    side = copy.deepcopy(config)
    side.hidden_size = width
    side.num_attention_heads = heads // reduction
    if getattr(config, "num_key_value_heads", None) is not None:
        side.num_key_value_heads = kv_heads
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(getattr(config, name, None), int):
            setattr(side, name, -(-getattr(config, name) // reduction))
    return side


def build_blocks(model: nn.Module, trunk: Trunk, config) -> nn.ModuleList:
    """Blocks of the model's own class with the sizes of `config`, initialised as it does."""
    count = len(trunk.blocks)
    like = next(trunk.blocks.parameters())
    with torch.device(like.device):
        if hasattr(model, "initialise"):
            small = type(model)(config.replace(vocab=1))
            return _cast(small.blocks, like.dtype)
        blocks = nn.ModuleList(_block(type(trunk.blocks[0]), config, i) for i in range(count))
    for i, block in enumerate(blocks):
        # A cache keeps the keys of side blocks behind those of the model's.
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = count + i
    if hasattr(model, "_init_weights"):
        blocks.apply(model._init_weights)
    return _cast(blocks, like.dtype)


def _cast(blocks: nn.ModuleList, dtype: torch.dtype) -> nn.ModuleList:
    # `to` exchanges every parameter even for one of the same dtype, which fake tensors refuse.
    return blocks if all(p.dtype == dtype for p in blocks.parameters()) else blocks.to(dtype)


def _block(kind: type, config, index: int) -> nn.Module:
    """A block made from the config and, where its class asks for it, its index."""
    given = {"config": config, "layer_idx": index}
    wanted = list(inspect.signature(kind.__init__).parameters.values())[1:]
    unknown = [p.name for p in wanted if p.name not in given and p.default is p.empty]
    if unknown:
        raise ValueError(
            f"{OP}: {kind.__name__} is built from {', '.join(unknown)}; wanted a block that is "
            "built from its config and its index"
        )
    return kind(**{p.name: given[p.name] for p in wanted if p.name in given})


def find_cache(args: tuple, kwargs: dict):
    """The cache of keys and values among a block's arguments; None where there is none."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "layers") and callable(getattr(value, "update", None)):
            return value
    return None


def extend_cache(cache, config, count: int) -> None:
    """Gives a cache of `count` layers as many again, for the side blocks.

    Raises ValueError for a cache whose layers have a fixed size, or hold more than keys."""
    from transformers import DynamicCache  # there where a cache is

    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{OP}: a {type(cache).__name__} has no room for the keys of the side network; pass a "
            "DynamicCache"
        )
    if cache.layer_class_to_replicate is None and len(cache.layers) == count:
        cache.layers.extend(DynamicCache(config=config).layers)
