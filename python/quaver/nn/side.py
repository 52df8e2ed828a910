"""Quantized side tuning (QST, arXiv 2401.07159): finetuning through a narrow network beside a
frozen model, whose gradient never passes the model.

    h = down_0(embedding);  for each block i:  f = block_i(f)
        beta_i = sigmoid(gamma_i);  h = side_i((1 - beta_i) * down_i(f) + beta_i * h)
    out = alpha * norm(f) + (1 - alpha) * up(norm_h(h)), which the model's own head reads
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import recipe as recipes
from ..convert import convert
from ..errors import CheckpointError
from ..structure import is_conv1d
from ..tensor_file import read_tensors, write_tensors
from .frozen import FORMATS, freeze_linear
from .linear import is_converted
from .side_blocks import (
    OP,
    Trunk,
    build_blocks,
    check_weights,
    extend_cache,
    find_cache,
    find_trunk,
    narrow,
)
from .swap import Swapped, swap

NAME = "side_network"  # of the submodule that side_tune adds
FILE = "side.safetensors"
MIX_RATE = 10.0
INITS = {"paper": (0.0, 1.0), "reference": (0.5, 0.7310585786300049)}  # gamma, alpha


class SideNetwork(nn.Module):
    """The narrow network. It runs in hooks of the model's blocks and of the norm behind them.

    State during a forward: `h` [..., width / reduction], and without streaming the outputs of all
    blocks with their arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        trunk: Trunk,
        reduction: int,
        adapter: int,
        init: str = "paper",
        stream: bool = True,
    ):
        super().__init__()
        self.config = narrow(trunk.config, reduction)
        self.cache_config, self.stream, self.count = trunk.config, stream, len(trunk.blocks)
        self.blocks = build_blocks(model, trunk, self.config)
        like = next(trunk.blocks.parameters())
        place = {"device": like.device, "dtype": like.dtype}
        side, gamma_alpha = trunk.width // reduction, INITS[init]
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Linear(trunk.width, adapter, bias=False, **place),
                nn.SiLU(),
                nn.Linear(adapter, side, bias=False, **place),
                nn.LayerNorm(side, **place),
            )
            for _ in range(self.count)
        )
        self.gamma = nn.Parameter(torch.full((self.count, side), gamma_alpha[0], **place))
        norm = nn.RMSNorm if getattr(trunk.norm, "bias", None) is None else nn.LayerNorm
        self.norm = norm(side, eps=1e-6, **place)
        self.up = nn.Linear(side, trunk.width, **place)
        self.alpha = nn.Parameter(torch.full((trunk.width,), gamma_alpha[1], **place))
        self.h, self.states = None, []

    def attach(self, trunk: Trunk) -> None:
        """Hooks the trunk, which calls this network from then on."""
        trunk.blocks[0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for i, block in enumerate(trunk.blocks):
            hook = functools.partial(self._follow, i)
            block.register_forward_hook(hook, with_kwargs=True)
        trunk.norm.register_forward_hook(self._finish)

    def _begin(self, block, args, kwargs):
        """Starts at the embedding. What comes before needs no gradient, so neither do the blocks,
        and autograd saves nothing of them."""
        if getattr(block, "gradient_checkpointing", False) and block.training:
            raise ValueError(
                f"{OP}: the model's blocks save no activations, and checkpointing them would run "
                "the side network twice; call model.gradient_checkpointing_disable()"
            )
        if kwargs.get("alibi") is not None:
            raise ValueError(
                f"{OP}: {type(block).__name__} takes its positions as biases of its own heads "
                "(ALiBi), which do not fit the side network's"
            )
        # Masks have the form that the model's attention takes.
        kind = getattr(self.cache_config, "_attn_implementation", None)
        if kind != getattr(self.config, "_attn_implementation", None):
            self.config._attn_implementation = kind
        x, replaced = _take(args, kwargs)
        x = x.detach()
        self.states.clear()
        self.h = self.down[0](x)
        return replaced(x)

    def _follow(self, i, block, args, kwargs, output) -> None:
        if self.h is None:
            return
        state = output[0] if isinstance(output, tuple) else output
        if self.stream:
            self._step(i, state, args, kwargs)
        else:
            self.states.append((i, state, args, kwargs))

    def _step(self, i: int, state: Tensor, args: tuple, kwargs: dict) -> None:
        beta = torch.sigmoid(self.gamma[i])
        x = (1 - beta) * self.down[i](state) + beta * self.h
        cache = find_cache(args, kwargs)
        if cache is not None:
            extend_cache(cache, self.cache_config, self.count)
        _, replaced = _take(args, kwargs)
        args, kwargs = replaced(x.to(state.dtype))
        output = self.blocks[i](*args, **kwargs)
        self.h = output[0] if isinstance(output, tuple) else output

    def _finish(self, norm, args, output):
        if self.h is None:  # somebody calls the norm alone
            return None
        for state in self.states:
            self._step(*state)
        self.states.clear()
        up, self.h = self.up(self.norm(self.h)), None
        return (self.alpha * output + (1 - self.alpha) * up).to(output.dtype)


def _take(args: tuple, kwargs: dict):
    """The states among a block's arguments, and a function that gives the arguments with others."""
    if args:
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda x: ((), kwargs | {"hidden_states": x})


class SideTuned(Swapped):
    """What `side_tune` adds to a model's class."""

    def side_parameters(self) -> list[nn.Parameter]:
        """The parameters that train: the side network's, and those of a classifier's head."""
        return [p for p in self.parameters() if p.requires_grad]

    def side_parameter_groups(self, lr: float) -> list[dict]:
        """`side_parameters()` as groups of an optimizer: at `lr`, and the mix alpha at MIX_RATE
        times as much, because the rest learns as far as alpha has left its start."""
        mix = self.side_network.alpha
        rest = [p for p in self.side_parameters() if p is not mix]
        return [{"params": rest, "lr": lr}, {"params": [mix], "lr": MIX_RATE * lr}]

    def side_state(self) -> dict[str, Tensor]:
        """The tensors of `save_pretrained`, by their names in `state_dict`."""
        trained = (f"{NAME}.", *(f"{name}." for name in self.side_options["heads"]))
        return {k: v for k, v in self.state_dict().items() if k.startswith(trained)}

    def save_pretrained(
        self, save_directory, *, state_dict: dict | None = None, is_main_process: bool = True
    ) -> None:
        """Writes `side.safetensors` into a folder, which is made: the tensors that train and a
        digest of the model beside them. `state_dict`: take the tensors from there.

        Raises OSError if it cannot be written."""
        if not is_main_process:
            return
        source = self.side_state() if state_dict is None else state_dict
        tensors = {
            name: source[name].detach().to("cpu", copy=True).contiguous()
            for name in self.side_state()
        }
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        document = {"format": "quaver-side", "version": 1, "base": base_digest(self)}
        write_tensors(folder / FILE, tensors, document | {"options": self.side_options})

    def load(self, directory) -> None:
        """Takes the tensors of a folder that `save_pretrained` wrote.

        Raises CheckpointError, and changes nothing, for a file of another base model or of other
        options; FileError for one that is missing or damaged."""
        path = Path(directory) / FILE
        tensors, document = read_tensors(path, "quaver-side", 1)
        for name, value in self.side_options.items():
            stored = document.get("options", {}).get(name)
            if stored != value:
                raise CheckpointError(
                    f"{path}: it was tuned with {name} {stored!r}, this model with {value!r}"
                )
        if document.get("base") != base_digest(self):
            raise CheckpointError(
                f"{path}: it belongs to another base model; its digest is "
                f"{str(document.get('base'))[:12]}, this one's {base_digest(self)[:12]}"
            )
        own = self.side_state()
        for name in own.keys() | tensors.keys():
            got, wanted = (
                None if t is None else (t.dtype, tuple(t.shape))
                for t in (tensors.get(name), own.get(name))
            )
            if got != wanted:
                raise CheckpointError(f"{path}: {name}: wanted {wanted}, got {got}")
        self.load_state_dict(tensors, strict=False)


def base_digest(model: nn.Module) -> str:
    """SHA-256 of every name, type, shape and byte of the model that does not train."""
    own, digest = model.side_state(), hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in own:
            continue
        value = value.detach()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            plain = value.cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(plain.numpy()))
    return digest.hexdigest()


def side_tune(
    model: nn.Module,
    reduction: int = 16,
    adapter: int = 16,
    backbone: str = "nf4",
    recipe: str | recipes.Recipe = "bf16",
    init: str = "paper",
    stream: bool = True,
) -> nn.Module:
    """Freezes `model` and adds a side network that trains, in place; returns the model.

    Any decoder of transformers with one list of blocks and a norm behind it (Llama, Mistral, Qwen2,
    GPT-2, OPT, Phi, Gemma), with a language-model head, which stays frozen, or another, which
    trains; and `quaver.models`. Its forward, `generate` and losses work as before.
    `save_pretrained` and `load` take the side network alone; `side_parameters()` go to the
    optimizer. Autograd saves nothing of the model but each block's output, which the side network
    reads.

    Args:
        reduction: widths and heads are divided by it.
        adapter: width between the two matrices of a downsampler.
        backbone: how linear layers inside of blocks are kept: "nf4", "fp8", or "keep" as they are.
        recipe: of the side network's products, see `convert`.
        init: "paper" starts at the model's own output exactly (gamma 0, alpha 1); "reference" as
            the authors' code does (gamma 0.5, alpha 0.731), which mixes in a random part.
        stream: run each side block behind its block; False keeps all outputs until the last.

    Raises:
        TypeError: no module.
        ValueError: a model without such blocks, one that is side-tuned or converted already, on
            several devices or sharded over ranks, matrices that are in no linear layer and cannot
            be encoded, a reduction that does not divide its heads, an unknown name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, SideTuned):
        raise ValueError(f"{OP}: the model is side-tuned already")
    if any(is_converted(m) for m in model.modules()):
        raise ValueError(f"{OP}: the model was converted to FP8; restore it first")
    for name, value, known in (("backbone", backbone, FORMATS), ("init", init, tuple(INITS))):
        if value not in known:
            raise ValueError(f"{OP}: {name} must be one of {', '.join(known)}, got {value!r}")
    for name, value in (("reduction", reduction), ("adapter", adapter)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{OP}: {name} must be a positive whole number, got {value!r}")
    chosen, trunk = recipes.get(recipe), find_trunk(model)
    check_weights(trunk, encoded=backbone != "keep")
    side = SideNetwork(model, trunk, reduction, adapter, init, stream)
    convert(side, chosen, skip=())
    model.requires_grad_(False)
    for head in trunk.heads.values():
        head.requires_grad_(True)
    if backbone != "keep":
        freeze_linear(trunk.blocks, backbone, is_conv1d)
    side.attach(trunk)
    side.train(model.training)
    model.add_module(NAME, side)
    swap(model, SideTuned)
    model.side_options = {
        "reduction": reduction,
        "adapter": adapter,
        "backbone": backbone,
        "heads": sorted(trunk.heads),
    }
    return model
