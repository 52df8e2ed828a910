"""torchtitan's Llama 3 in FP8, by its own FSDP2, schedule and checkpoints, saved and resumed.

torchrun --nproc-per-node 2 examples/torchtitan_train.py [--recipe coat] [--resume]

On GPUs its Trainer does all of this: see `config` below. It does not run without one, so the loop
here puts the same parts together, on the CPU too, on a model and a task that learn in a minute.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.tools.utils as machine

if not torch.cuda.is_available():  # torchtitan expects a GPU where it finds no device
    machine.device_type, machine.device_module = "cpu", torch.cpu

from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

from quaver.torchtitan import QuaverConverter, adamw

LETTERS, LENGTH, BATCH = 64, 32, 16


def config(recipe: str | None, steps: int, folder: str, flavor: str = "debugmodel", **states):
    """The Trainer.Config; of plain torchtitan where `recipe` is None."""
    converters = [] if recipe is None else [QuaverConverter.Config(recipe=recipe)]
    lr = 1e-3
    dtype = "bfloat16" if recipe == "coat" else "float32"  # FSDP2 takes one
    return Trainer.Config(
        model_spec=model_registry(flavor, converters=converters),
        optimizer=default_adamw(lr, fused=torch.cuda.is_available())
        if recipe is None
        else adamw(lr, recipe="tensorwise", bf16_master="remainder", **states),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=BATCH, seq_len=LENGTH, steps=steps, dtype=dtype, max_norm=1.0,
            disable_cuda_graphs=True,
        ),
        # The default, spmd_types, wants a torch newer than 2.13 on several ranks.
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=steps // 2, last_save_model_only=False
        ),
        activation_checkpoint=None,
        dump_folder=folder,
    )  # fmt: skip


def walks(step: int, rank: int, count: int = BATCH) -> torch.Tensor:
    """Letters that go on by 1, 2 or 3: the loss of who has learned it is log 3 = 1.10."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(1, 4, (count, LENGTH + 1), generator=random).cumsum(1) % LETTERS


class Progress:
    """The state of the loop, in the checkpoint."""

    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def build(job) -> tuple[torch.nn.Module, ParallelDims]:
    """The model, sharded, as torchtitan's Trainer builds it."""
    spec, dims = job.model_spec, ParallelDims.from_config(job.parallelism, dist.get_world_size())
    for _, _, parent, name in list(spec.model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())  # it has no backward on the CPU
    spec.model.update_from_config(config=job)
    with torch.device("meta"):
        torch.set_default_dtype(TORCH_DTYPE_MAP[job.training.dtype])
        try:
            model = spec.model.build()
        finally:
            torch.set_default_dtype(torch.float32)
    model.verify_module_protocol()
    model = spec.parallelize_fn(
        model, parallel_dims=dims, training=job.training, parallelism=job.parallelism,
        compile_config=job.compile, ac_config=None, dump_folder=job.dump_folder,
    )  # fmt: skip
    if machine.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo has no sum with a factor
                module.set_force_sum_reduction_for_comms(True)
    torch.manual_seed(0)
    model.to_empty(device=machine.device_type)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model.train(), dims


def loss_of(model, tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.to(machine.device_type)
    logits = model(tokens[:, :-1]).flatten(0, 1).float()
    return F.cross_entropy(logits, tokens[:, 1:].flatten())


def main(
    recipe: str | None = "tensorwise",
    steps: int = 40,
    folder: str = "runs/torchtitan",
    resume: bool = False,
    **states,
) -> tuple[float, torch.nn.Module]:
    """Plain torchtitan where `recipe` is None; returns the held-out loss and the model. `resume`
    goes on from the folder's newest checkpoint. `states`: exp_avg and exp_avg_sq of `adamw`."""
    job = config(recipe, steps, folder, **states)
    model, dims = build(job)
    optimizers = job.optimizer.build(model_parts=[model])
    schedules = job.lr_scheduler.build(optimizers=optimizers, training_steps=steps)
    progress = Progress()
    checkpoints = job.checkpoint.build(
        dataloader=Progress(), model_parts=[model], optimizers=optimizers, lr_schedulers=schedules,
        states={"train_state": progress}, sd_adapter=None, base_folder=folder,
    )  # fmt: skip
    if resume:
        checkpoints.load()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    while progress.step < steps:
        progress.step += 1
        optimizers.zero_grad()
        # torchtitan sums gradients over ranks.
        (loss_of(model, walks(progress.step, rank, BATCH // ranks)) / ranks).backward()
        clip_grad_norm_(
            list(model.parameters()), job.training.max_norm, foreach=True,
            ep_enabled=dims.ep_enabled, pp_mesh=None,
        )  # fmt: skip
        optimizers.step()
        schedules.step()
        checkpoints.save(progress.step, last_step=progress.step == steps)
    checkpoints.close()
    with torch.no_grad():
        loss = loss_of(model, walks(0, 0, 64))
    if rank == 0:
        print(f"held-out loss {loss.item():.6f}")
    return loss.item(), model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="tensorwise", help="or none")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default="runs/torchtitan")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--exp-avg", default="", dest="exp_avg")
    parser.add_argument("--exp-avg-sq", default="", dest="exp_avg_sq")
    arguments = vars(parser.parse_args())
    if arguments["recipe"] == "none":
        arguments["recipe"] = None
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)  # without torchrun
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    dist.init_process_group(timeout=timedelta(minutes=5))
    main(**arguments)
    dist.destroy_process_group()
