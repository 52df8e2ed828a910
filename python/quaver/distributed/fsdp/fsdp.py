"""FSDP2 (torch.distributed.fsdp.fully_shard) with FP8 on the wire.

A converted weight is sharded as it is stored: f16 codes and one scale, equal on all ranks. Its
all-gather carries the e4m3 codes that the products take, one byte a value and no scale; they are
freed with the unsharded weight, and their transpose is made when backward needs it. A plain weight
whose scales are of tiles is gathered as codes too (tiles.py). Gradients are reduce-scattered in FP8
and summed in f32. (FP8-LM, arXiv 2310.18313, section 2.3; torchao's float8 all-gather has the idea
for f32 masters.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp as torch_fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...comm.transport import Transport, compare
from ...nn.experts import Experts
from ...nn.linear import LinearBase
from ...nn.weight import check_cut
from ...placement import max_, mesh_transports, transport, whole_amaxes_
from ...tensor import ScaledTensor, is_sharded, local, plain_tensors
from ..replicas import describe, histories, stack_histories, unstack_histories_
from .reduce_scatter import FORMATS, ReduceScatter
from .tiles import gather_tiles


class _AllGather:
    """torch's all-gather, counted, with an error that names the rank that is gone."""

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        if async_op:
            raise ValueError("all-gather of weights: set_unshard_async_op is not supported")
        transport(group).all_gather(input_tensor, "weight", out=output_tensor).wait()


def fully_shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    gradient: str = "e4m3",
    average: bool = True,
    **options,
) -> nn.Module:
    """Shard a converted model over the ranks of `mesh`, in place, as torch's fully_shard does: one
    unit for each element of each nn.ModuleList (a block, in most models), one for the rest. Returns
    the model. Build `quaver.AdamW` afterwards.

    torch's own fully_shard takes a converted model too, in units of your choice; this adds checks,
    FP8 gradients, shared amax histories and a count of the bytes sent (`transport_of`).

    Args:
        mesh: one-dimensional; None is all ranks of the process group.
        gradient: what a converted weight's gradient is sent as, "e4m3" (1.01 bytes a value),
            "bf16" or "f32". Other gradients go as bf16, or as f32 under "f32". Sums are f32, in
            rank order.
        average: gradients are the mean over ranks, as FSDP2 has it. False makes them the sum: with
            a loss that is divided by the token count of all ranks, what a token contributes is then
            the same bits on any number of ranks.
        options: for torch's fully_shard, such as mp_policy or reshard_after_forward.

    Raises:
        RuntimeError: no process group.
        ValueError: a model without converted layers (unless gradient is "bf16" or "f32"), one that
            is sharded already, has Smooth-SwiGLU, frozen codes with several scales or parameters
            of two dtypes in a unit, a mesh of two axes or of another device type, an unknown
            gradient format, or ranks whose parameters differ in name, order, shape, recipe or
            value: found before anything is sharded, on every rank.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "fully_shard: no process group; start with torchrun and call "
            "torch.distributed.init_process_group"
        )
    units = _units(model)
    mesh = _checked_mesh(model, units, mesh, gradient)
    linears = [module for module in model.modules() if isinstance(module, LinearBase)]
    for unit in units:
        torch_fsdp.fully_shard(unit, mesh=mesh, **options)
    for unit in units:
        unit.set_custom_all_gather(_AllGather())
        unit.set_custom_reduce_scatter(ReduceScatter(unit, gradient))
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(float(mesh.size()) if average else 1.0)
    for linear in linears:
        linear.refresh()  # drops the copies of the whole weight
    gather_tiles(model)
    # A compiled model breaks its graph at these hooks, as it does at FSDP2's own.
    before = torch.compiler.disable(_gather_tiles)
    model.register_forward_pre_hook(before, prepend=True)  # before FSDP2's own
    model.register_forward_pre_hook(torch.compiler.disable(_sync_histories))
    return model


def _units(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered as one, inner ones first."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = dict.fromkeys(b for stack in stacks for b in stack if list(b.parameters()))
    return [*reversed(blocks), model]  # modules() lists outer ones first


def _check_dtypes(units: list[nn.Module]) -> None:
    inner = set()
    for unit in units:
        names: dict[torch.dtype, str] = {}
        for name, p in unit.named_parameters():
            if p.requires_grad and p not in inner:
                names.setdefault(p.dtype, name)
        inner.update(unit.parameters())
        if len(names) > 1:
            found = " and ".join(f"{name} {dtype}" for dtype, name in names.items())
            raise ValueError(
                f"fully_shard: FSDP2 takes parameters of one dtype in a {type(unit).__name__}, got "
                f"{found}; for a recipe that mixes them (coat) use quaver.distributed.ddp or "
                "ZeroAdamW"
            )


def _checked_mesh(
    model: nn.Module, units: list[nn.Module], mesh: DeviceMesh | None, gradient: str
) -> DeviceMesh:
    """The mesh, once all that `fully_shard` raises ValueError for has been looked at."""
    if gradient not in FORMATS:
        raise ValueError(f"fully_shard: gradient must be one of {FORMATS}, got {gradient!r}")
    parameters = dict(model.named_parameters())
    converted = any(isinstance(module, LinearBase) for module in model.modules())
    if not converted and gradient == "e4m3":
        raise ValueError(
            "fully_shard: the model has no FP8 layer; call quaver.convert first, or pass "
            'gradient="bf16" or "f32" to shard it as it is'
        )
    smooth = [n for n, m in model.named_modules() if getattr(m, "channel_amax", None) is not None]
    if smooth:
        raise ValueError(
            f"fully_shard: {smooth[0]} has Smooth-SwiGLU; wanted a recipe without smooth_swiglu"
        )
    for module in model.modules():
        if isinstance(module, (LinearBase, Experts)):
            check_cut(module)
    already = [name for name, p in parameters.items() if is_sharded(p)]
    if already:
        raise ValueError(f"fully_shard: {already[0]} is sharded already")
    _check_dtypes(units)
    devices = {p.device.type for p in parameters.values()}
    if mesh is None:
        if len(devices) != 1:
            raise ValueError(f"fully_shard: parameters on one device type wanted, got {devices}")
        mesh = init_device_mesh(*devices, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(f"fully_shard: mesh must have one axis, got {mesh.ndim}: {mesh}")
    if devices != {mesh.device_type}:
        raise ValueError(f"fully_shard: a mesh of {mesh.device_type}, parameters on {devices}")
    group, device = transport(mesh.get_group()), next(iter(parameters.values())).device
    mine = describe(parameters, model)
    mine |= {
        f"checksum of {name} (were all ranks seeded alike?)": _checksums(p)
        for name, p in parameters.items()
    }
    compare("fully_shard", group.all_gather_object(mine, device))
    return mesh


def _checksums(p: Tensor) -> list[int]:
    parts = [part.detach().reshape(-1).view(torch.uint8) for part in plain_tensors(p)]
    return [int(part.sum(dtype=torch.int64)) for part in parts]


def sync_histories(model: nn.Module) -> None:
    """Amax histories become the maximum over ranks, those of the whole batch: then scales and
    checkpoints do not depend on how the batch was divided. One all-reduce."""
    found = histories(model)
    if found:
        unstack_histories_(found, max_(stack_histories(found), model.parameters()))


def transport_of(model: nn.Module) -> Transport:
    """Over which a sharded model is spread; its `traffic` counts the bytes that this rank has sent
    over that group. Raises ValueError for a model that is not sharded."""
    links = [link for p in model.parameters() for link in mesh_transports(p)]
    if not links:
        raise ValueError("transport_of: the model is not sharded")
    return links[0]


def _gather_tiles(model: nn.Module, arguments) -> None:
    gather_tiles(model)


@torch.no_grad()
def _sync_histories(model: nn.Module, arguments) -> None:
    # A forward inside a backward is activation checkpointing's, and must find the histories as the
    # first forward did.
    if model.training and torch._C._current_graph_task_id() == -1:
        sync_histories(model)


@torch.no_grad()
def sync_scales(model: nn.Module) -> None:
    """Give all shards of each converted weight one scale again, after anything but `quaver.AdamW`
    wrote to them (an initialiser, say). One all-reduce for all weights."""
    weights = [p for p in model.parameters() if isinstance(local(p), ScaledTensor)]
    weights = [p for p in weights if is_sharded(p)]
    if not weights:
        return
    whole_amaxes_(weights)
    scales = max_(torch.stack([local(p).scale for p in weights]), weights)
    for p, scale in zip(weights, scales.unbind(), strict=True):
        shard = local(p)
        codes, _, _ = torch.ops.quaver.quantize(
            shard.dequantize(torch.float32), shard.qdata.dtype, scale, None, "tensor", 128, True,
            False, 0,
        )  # fmt: skip
        shard.qdata.copy_(codes)
        shard.scale.copy_(scale)
