"""Every recipe under every `--parallel`: it trains, saves and resumes to the same bits, or is
refused by name before the first step."""

import json
import random
import shutil
from contextlib import nullcontext

import pytest
import rank_pool
import torch.distributed as dist
from pictures import leave_out
from runs import MODEL, losses

from quaver import recipe, train
from quaver.distributed import World
from quaver.errors import UsageError
from quaver.job import Job
from quaver.parallel import Parallel
from quaver.settings import Settings

PARALLEL = ("dp=2", "zero=2", "fsdp=2", "tp=2", "dp=2,tp=2", "zero=2,tp=2")
STEPS, SAVED = 3, 2
REFUSED = {
    (name, "fsdp=2"): "--parallel fsdp=2: fully_shard: FSDP2 takes parameters of one dtype"
    for name in ("coat", "coat-blockwise")
}

pytestmark = pytest.mark.slow


def _run(settings, whole=None):
    """`quaver train` on the ranks of the pool. With `whole`, the run's folder as it was after step
    SAVED is copied to there."""
    step = Job.step

    def copies(self, number):
        if number == SAVED + 1:
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.copytree(settings.out, whole)
            dist.barrier()
        return step(self, number)

    train._world = lambda settings, device: nullcontext(World("cpu", settings.parallel.tensor))
    Job.step = copies if whole else step
    leave_out()
    try:
        return train.run(settings)
    finally:
        Job.step = step


def trains_and_resumes(rank, folder, name, parallel):
    options = {
        "data": (f"{folder}/text.txt",), "model": f"{folder}/model.json", "recipe": (name,),
        "parallel": parallel, "steps": STEPS, "batch": 4, "seq": 16, "device": "cpu",
        "save_every": SAVED,
    }  # fmt: skip
    steps = []
    step = Job.step
    Job.step = lambda self, number: steps.append(number) or step(self, number)
    try:
        _run(Settings(out=f"{folder}/whole", **options), f"{folder}/cut")
        assert steps == [1, 2, 3]
        _run(Settings(out=f"{folder}/cut", resume=True, **options))
        assert steps == [1, 2, 3, 3]
    except UsageError as error:
        return str(error), steps
    finally:
        Job.step = step
    return None, steps


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_trains_and_resumes_under_every_parallel(tmp_path, name, parallel):
    (tmp_path / "text.txt").write_bytes(random.Random(0).randbytes(200) * 20)
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "kv_heads": 2}))
    size = Parallel.parse(parallel).ranks
    for error, steps in rank_pool.run(size, trains_and_resumes, tmp_path, name, parallel):
        if (name, parallel) in REFUSED:
            assert REFUSED[name, parallel] in error and steps == []
        else:
            assert error is None
    if (name, parallel) not in REFUSED:
        whole, resumed = (losses(tmp_path / out, name) for out in ("whole", "cut"))
        assert len(whole) == STEPS and resumed == whole
