"""The weights of a model under the plain model's names, and its config, as a folder has them."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..models import GPT, Llama
from ..nn.frozen import FrozenLinear
from ..nn.linear import Linear, LinearBase, is_converted
from ..nn.norm import Norm
from ..placement import owner_of, shard_of
from ..recipe import E4M3
from ..tensor import ScaledTensor, is_sharded
from ..watching import STATE, is_watched
from . import llama

OURS = ("input_history", "grad_history", "output_history", "channel_amax")  # buffers of FP8 layers
GATES = ("gate", "router", "shared_expert_gate")
NO_MATRIX, SHARED = "it is no linear layer", "its weight is shared"


@dataclass(frozen=True)
class Weight:
    """A tensor of the model, and the parts along its first axis that a folder stores it as:
    {name: rows}, or {name: None} for the whole. `layer` is the linear layer that multiplies by it;
    `keeps` says that it has its own dtype in every format."""

    parts: dict[str, int | None]
    tensor: Tensor
    layer: nn.Module | None = None
    keeps: bool = False


@dataclass
class Source:
    """A model as a folder stores it.

    weights: every tensor that is stored, tied ones once.
    config, generation: what the folder's JSON files say, of transformers.
    fp8: names of the linear layers that FP8 formats encode. `left`: {name: the reason} of all other
        modules that hold tensors.
    revert: {name: tensor} of transformers' model to the names and forms of its checkpoints.
    code: writes the Python files of a model that is not transformers' own into a folder.
    """

    weights: list[Weight]
    config: object
    generation: object | None = None
    fp8: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    revert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    code: Callable[[object], None] | None = None


def source_of(model: nn.Module) -> Source:
    """The Source of a model of transformers, or of quaver.models, converted or not.

    Raises TypeError for another model, UsageError for one that cannot be exported as it is."""
    model = _unwrapped(model)
    if isinstance(model, (GPT, Llama)):
        for name, p in model.named_parameters():
            _check_whole(name, p)
        return _of_ours(model)
    library = sys.modules.get("transformers")  # a caller that has a model has imported it
    if library is None or not isinstance(model, library.PreTrainedModel):
        raise TypeError(
            "export: model must be one of transformers or a quaver.models.Llama, got "
            f"{type(model).__name__}"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError("export: the model has adapters; merge them (merge_and_unload) first")
    frozen = next((n for n, m in model.named_modules() if isinstance(m, FrozenLinear)), None)
    if frozen is not None:
        raise UsageError(
            f"export: {frozen} is a FrozenLinear, which keeps codes of another kind; export the "
            "model that it was made of"
        )
    return _of_transformers(model)


def _unwrapped(model) -> nn.Module:
    """The model inside of torch.compile's and DistributedDataParallel's wrappers."""
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise UsageError("export: the model has adapters; export model.merge_and_unload()")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _check_whole(name: str, tensor: Tensor) -> None:
    if is_sharded(tensor) or shard_of(tensor) is not None:
        raise UsageError(
            f"export: {name} is sharded over ranks; save by quaver.distributed.save, load that "
            "into one process's model, and export it"
        )
    if tensor.is_meta:
        raise UsageError(f"export: {name} is on the meta device and has no values")
    codes = isinstance(tensor, ScaledTensor) and tensor.qdata.dtype == E4M3
    if codes and owner_of(tensor) is not None:
        raise UsageError(
            f"export: of {name} this rank has the FP8 codes alone, another rank the master; save "
            "by quaver.distributed.save, load that into one process's model, and export it"
        )


# quaver.models


def _of_ours(model: nn.Module) -> Source:
    if isinstance(model, GPT):
        raise UsageError(
            "export: quaver.models.GPT is no architecture of transformers; export a model of the "
            "llama family"
        )
    modules = dict(model.named_modules())
    tied = model.lm_head.weight is model.embed.weight
    weights = []
    for name, tensor in model.named_parameters():
        layer = modules[name.rpartition(".")[0]]
        layer = layer if _is_linear(layer) else None
        weights.append(Weight(llama.parts(name, model.config), tensor, layer))
    found = Source(weights, llama.config(model.config, tied), llama.generation(model.config, tied))
    converted = any(is_converted(m) for m in model.modules())
    for weight in weights:
        for name in weight.parts:
            _sort_layer(found, _layer_name(name), weight, converted, name.startswith("lm_head."))
    if tied:
        found.left["lm_head"] = SHARED
    return found


# transformers


def _of_transformers(model) -> Source:
    tied = _tied_names(model)
    weights = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"export: {name} is a {type(tensor).__name__}, not a tensor")
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last in OURS and isinstance(module, (LinearBase, Norm)):
            continue
        if name in STATE and is_watched(model):
            continue
        if name in tied or name in (model._keys_to_ignore_on_save or ()):
            continue
        _check_whole(name, tensor)
        linear = last == "weight" and (_is_linear(module) or isinstance(module, nn.Linear))
        strict = any(re.search(p, name) for p in model._keep_in_fp32_modules_strict or ())
        keeps = strict or not isinstance(tensor, nn.Parameter)
        weights.append(Weight({name: None}, tensor, module if linear else None, keeps))
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.architectures = [type(model).__name__]
    found = Source(weights, config, model.generation_config if model.can_generate() else None)
    found.revert = _reverts(model)
    if model.is_remote_code():
        found.code = lambda folder: _save_code(model, folder, config)
    _sort_layers(found, model)
    found.left |= {_layer_name(name): SHARED for name in tied}
    return found


def _save_code(model, folder, config) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    custom_object_save(model, folder, config=config)


def _reverts(model) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        raise UsageError("export: wanted transformers 5 or newer") from None

    def revert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with _fresh(model):
            return dict(revert_weight_conversion(model, tensors))

    return revert


@contextmanager
def _fresh(model) -> Iterator[None]:
    """Hides the conversions that the model was loaded with: those of a folder that was quantised
    would quantise again."""
    loaded = model.__dict__.pop("_weight_conversions", None)
    try:
        yield
    finally:
        if loaded is not None:
            model._weight_conversions = loaded


def _tied_names(model) -> set[str]:
    """The names that transformers ties to others when it loads."""
    state = model.state_dict(keep_vars=True)
    tied = set()
    for target, kept in model.all_tied_weights_keys.items():
        if target not in state or kept not in state:
            continue
        if state[target] is not state[kept]:
            raise UsageError(
                f"export: the config ties {target} to {kept}, and they are two tensors; set "
                "model.config.tie_word_embeddings = False, or tie them (model.tie_weights())"
            )
        tied.add(target)
    return tied


def _sort_layers(found: Source, model) -> None:
    converted = any(is_converted(m) for m in model.modules())
    shared = _shared(model)
    output = model.get_output_embeddings()
    base = model.base_model
    inside = {id(m) for m in base.modules()} if base is not model else None
    for weight in found.weights:
        (name,) = weight.parts
        layer = weight.layer
        head = layer is not None and (
            layer is output or (inside is not None and id(layer) not in inside)
        )
        _sort_layer(found, _layer_name(name), weight, converted, head, id(weight.tensor) in shared)
    patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    joined = _not_stored_alone(found)
    for name in list(found.fp8):
        if name in joined:
            _leave(found, name, "transformers stores its weight in another form")
        elif _excludes(patterns, name):
            _leave(found, name, "transformers keeps it in float32")
    # A reader takes the names that are left for patterns, which may fit an FP8 layer too. Of a
    # module that has tensors beside its layers (sinks, say) it need not read the name.
    for name in [n for n, why in found.left.items() if why == NO_MATRIX]:
        if not name.endswith("experts") and any(_excludes([name], layer) for layer in found.fp8):
            del found.left[name]
    while clash := [name for name in found.fp8 if _excludes(found.left, name)]:
        for name in clash:
            _leave(found, name, "the name of another layer that is left excludes it too")


def _leave(found: Source, name: str, why: str) -> None:
    found.fp8.remove(name)
    found.left[name] = why


def _shared(model) -> set[int]:
    """The ids of parameters that several modules hold."""
    seen, shared = set(), set()
    for module in model.modules():
        for p in module.parameters(recurse=False):
            (shared if id(p) in seen else seen).add(id(p))
    return shared


def _not_stored_alone(found: Source) -> set[str]:
    """The linear layers whose weight [N, K] a folder does not store as it is, at most under another
    name: in pieces, or joined with others."""
    keys: dict[str, list[str]] = {}  # of a folder: the weights stored there
    changed = set()
    for weight in found.weights:
        (name,) = weight.parts
        probe = torch.empty(weight.tensor.shape, device="meta")
        try:
            stored = found.revert({name: probe})
        except Exception as error:  # of many types, by the conversion
            reason = str(error).splitlines() or [type(error).__name__]
            raise UsageError(
                f"export: transformers cannot store {name} by itself: {reason[0]}"
            ) from error
        for key, value in stored.items():
            keys.setdefault(key, []).append(_layer_name(name))
            as_it_is = key.endswith(".weight") and value.shape == probe.shape
            if weight.layer is not None and not (as_it_is and len(stored) == 1):
                changed.add(_layer_name(name))
    return changed.union(*(names for names in keys.values() if len(names) > 1))


def _excludes(patterns, name: str) -> bool:
    """Whether transformers leaves a module because of a list of names (should_convert_module)."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(
        name.endswith(p) or re.match(rf"(?:{p}){boundary}", name) is not None for p in patterns
    )


# Which layers become FP8


def _layer_name(name: str) -> str:
    return name.rpartition(".")[0]


def _is_linear(module: nn.Module) -> bool:
    """Whether a reader of the folder has an nn.Linear here."""
    return type(module) in (nn.Linear, Linear)


def _sort_layer(
    found: Source, name: str, weight: Weight, converted: bool, head: bool, shared: bool = False
) -> None:
    """Books a layer as FP8, or as left with the reason. Of a converted model the layers that it
    multiplies in FP8 are FP8; of a plain one all linear layers but heads and gates."""
    layer = weight.layer
    if layer is None:
        if name and name not in found.fp8:  # a tensor of the model itself has no layer's name
            found.left.setdefault(name, NO_MATRIX)
        return
    why = None
    if not _is_linear(layer):
        why = f"it is a {type(layer).__name__}"
    elif shared:
        why = SHARED
    elif converted and not is_converted(layer):
        why = "it does not multiply in FP8"
    elif not converted and head:
        why = "it is a head"
    elif not converted and name.rpartition(".")[2] in GATES:
        why = "it is a gate"
    if why is None:
        found.fp8.append(name)
        found.left.pop(name, None)  # booked by its bias
    else:
        found.left[name] = why
