"""Side tuning (QST, arXiv 2401.07159) against LoRA and full finetuning: one small model, first
trained on Python code, then tuned on English text of the standard library's manual, each method on
the same batches and at the better of two learning rates. Held-out losses, the bytes of a step,
tokens/s; and the bytes of a step of a 7B model, counted on tensors without memory.

LoRA has as many parameters as the side network, on a base in NF4.
"""

import argparse
import copy
import statistics
from functools import partial
from pydoc_data.topics import topics

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import quaver as qv
from quaver import models
from quaver.documents import Notes, documents
from quaver.nn.frozen import FrozenLinear, freeze_linear
from quaver.tune.methods import trained

RATES = {"full": (1e-3, 3e-3), "lora": (1e-2, 3e-2), "qst": (3e-3, 1e-2)}
LOSS, GAIN = 1.05, 0.5  # of LoRA's loss at most, of full finetuning's gain at least
MEMORY = {"full": 6.0, "lora": 2.0}  # times as many bytes of a 7B step as QST's, at least
SPEED_WIDTH = 256  # of the model whose steps are timed; in a narrower one calls cost, not products
SPEED = 1.5  # times LoRA's tokens/s
GIB = 2**30


class Lora(nn.Module):
    """W x + B A x of a frozen W; B starts at 0."""

    def __init__(self, base: FrozenLinear, rank: int, dtype: torch.dtype):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.b = nn.Linear(rank, base.out_features, bias=False, dtype=dtype)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def linear_sizes(model: nn.Module) -> int:
    """Parameters of one rank of LoRA on every linear layer of the blocks."""
    layers = [m for m in model.blocks.modules() if isinstance(m, (nn.Linear, FrozenLinear))]
    return sum(m.in_features + m.out_features for m in layers)


def lora(model: nn.Module, parameters: int) -> nn.Module:
    """LoRA on the linear layers of all blocks in NF4, of about `parameters`."""
    rank = max(1, round(parameters / linear_sizes(model)))
    dtype = model.embed.weight.dtype
    model.requires_grad_(False)
    freeze_linear(model.blocks, "nf4", lambda layer: False)
    for parent in list(model.blocks.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, FrozenLinear):
                setattr(parent, name, Lora(layer, rank, dtype))
    return model


def qst(model: nn.Module, reduction: int, adapter: int = 16) -> nn.Module:
    return qv.side_tune(model, reduction=reduction, adapter=adapter)


def groups_of(model: nn.Module, lr: float) -> list[dict]:
    own = getattr(model, "side_parameter_groups", None)
    return [{"params": trained(model), "lr": lr}] if own is None else own(lr)


class Text:
    """Bytes as tokens; the last twentieth is held out."""

    def __init__(self, text: bytes, batch: int, length: int):
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(tokens) * 19 // 20
        self.train, self.held_out = tokens[:cut], tokens[cut:]
        self.batch, self.length = batch, length

    def at(self, step: int) -> Tensor:
        """[batch, length + 1], a function of the step alone."""
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(len(self.train) - self.length, (self.batch,), generator=generator)
        return torch.stack([self.train[s : s + self.length + 1] for s in start])

    def validation(self, count: int = 64) -> Tensor:
        starts = torch.linspace(0, len(self.held_out) - self.length - 1, count).long()
        return torch.stack([self.held_out[s : s + self.length + 1] for s in starts])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def held_out(model: nn.Module, text: Text) -> float:
    with torch.no_grad():
        return statistics.fmean(loss_of(model, x).item() for x in text.validation().split(8))


def train(model: nn.Module, text: Text, steps: int, lr: float) -> float:
    """Adam with a warm-up of a tenth and a linear decay; the held-out loss."""
    optimizer = qv.AdamW(groups_of(model, lr), recipe="f32", weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        part = min((step + 1) * 10 / steps, (steps - step) / steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * part
        loss = loss_of(model, text.at(step))
        optimizer.zero_grad()
        loss.backward()
        qv.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"    step {step + 1} loss {loss.item():.4f}", flush=True)
    return held_out(model, text)


def step_bytes(model: nn.Module, tokens: Tensor) -> dict[str, float]:
    """GiB of weights, gradients, Adam's two f32 states, and what a forward saves."""
    with qv.saved_activations(model) as saved:
        loss_of(model, tokens)
    held = {t.untyped_storage()._cdata: t.untyped_storage() for t in model.state_dict().values()}
    own = trained(model)
    found = {
        "weights": sum(s.nbytes() for s in held.values()),
        "gradients": sum(p.nbytes for p in own),
        "states": sum(8 * p.numel() for p in own),
        "activations": saved.bytes,
    }
    return {k: v / GIB for k, v in found.items()} | {"total": sum(found.values()) / GIB}


def plan(name: str, batch: int, length: int) -> list[dict]:
    """The bytes of a step of a bfloat16 model that is never allocated."""
    rows, found = [], {}
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = models.load(name).replace(context=length)
        tokens = torch.zeros(batch, length + 1, dtype=torch.int64)
        side = qst(models.build(config), 16)
        count = sum(p.numel() for p in side.side_parameters())
        found["qst"] = step_bytes(side, tokens)
        found["lora"] = step_bytes(lora(models.build(config), count), tokens)
        found["full"] = step_bytes(models.build(config), tokens)
    torch.set_default_dtype(torch.float32)
    for method, sizes in found.items():
        text = ", ".join(f"{kind} {size:.2f}" for kind, size in sizes.items())
        print(f"{name}, {length} tokens x {batch}, {method}: {text} GiB", flush=True)
        rows.append({"name": f"{name} {method}", **sizes})
    for method, bar in MEMORY.items():
        ratio = found[method]["total"] / found["qst"]["total"]
        what = f"{name}, {length} tokens x {batch}: bytes of a step, {method} over qst"
        rows.append(common.judge(what, ratio, "at least", bar))
    return rows


def speed(makers: dict, text: Text, pairs: int) -> list[dict]:
    """A tuning step of QST against one of the others."""

    def step_of(make):
        model = make()
        optimizer = qv.AdamW(trained(model), lr=1e-4, recipe="f32")

        def step():
            loss_of(model, text.at(0)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    rows, ours = [], step_of(makers["qst"])
    for name, bar in (("lora", SPEED), ("full", None)):
        rows.append(common.compare("qst tuning step", step_of(makers[name]), ours,
                                   baseline_name=f"{name} step", pairs=pairs, bar=bar))  # fmt: skip
        tokens = text.batch * text.length
        rate = {k: tokens / rows[-1][f"{k}_s"] for k in ("baseline", "candidate")}
        print(f"    {name} {rate['baseline']:.0f} tokens/s, qst {rate['candidate']:.0f}")
    return rows


def quality(args, base: nn.Module, makers: dict, text: Text) -> list[dict]:
    found = {"base": held_out(base, text)}
    rows = [{"name": "base", "val_loss": found["base"]}]
    print(f"untouched base: held-out loss {found['base']:.4f}", flush=True)
    for name, make in makers.items():
        tried = []
        for lr in RATES[name]:
            model = make()
            tried.append((train(model, text, args.steps, lr), lr))
            print(f"{name} lr {lr:g}: held-out loss {tried[-1][0]:.4f}", flush=True)
        found[name], lr = min(tried)
        sizes = step_bytes(model, text.at(0))
        count = sum(p.numel() for p in trained(model))
        print(f"{name}: {count:,} parameters train, {sizes['total'] * 1024:.1f} MiB", flush=True)
        rows.append({"name": name, "lr": lr, "val_loss": found[name], "trained": count, **sizes})
    if {"qst", "lora", "full"} <= found.keys():
        what = f"{args.steps} steps: held-out loss"
        ratio = found["qst"] / found["lora"]
        rows.append(common.judge(f"{what}, qst over lora", ratio, "at most", LOSS))
        gain = (found["base"] - found["qst"]) / (found["base"] - found["full"])
        rows.append(common.judge(f"{what}, qst's gain over full's", gain, "at least", GAIN))
    return rows


def config_of(width: int) -> models.Config:
    ffn = width * 43 // 16
    return models.Config(vocab=256, dim=width, layers=4, heads=8, kv_heads=8, ffn=ffn, context=128)


def makers_of(base: nn.Module, args) -> dict:
    """{method: a function that makes the model to tune of `base`}, LoRA with as many parameters as
    the side network."""

    def made(change, *more):
        torch.manual_seed(1)
        return change(copy.deepcopy(base), *more)

    sizes = (args.reduction, args.adapter)
    count = sum(p.numel() for p in made(qst, *sizes).side_parameters())
    return {
        "qst": partial(made, qst, *sizes),
        "lora": partial(made, lora, count),
        "full": partial(made, lambda model: model),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of tuning")
    parser.add_argument("--base-steps", type=int, default=400, help="of training on code")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="of the model that is tuned")
    parser.add_argument("--reduction", type=int, default=4)
    parser.add_argument("--adapter", type=int, default=64)
    parser.add_argument("--only", default="qst,lora,full", help="names, with commas")
    parser.add_argument("--plan", default="7b", help="the model whose bytes are counted")
    parser.add_argument("--pairs", type=int, default=common.PAIRS, help="of timed steps")
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = plan(args.plan, batch=4, length=2048)

    config = config_of(args.width)
    code = Text(b"\n".join(documents(["stdlib"], "text", Notes()))[: 8 * 2**20], args.batch, 128)
    manual = Text("\n".join(topics[name] for name in sorted(topics)).encode(), args.batch, 128)
    torch.manual_seed(0)
    base = models.build(config)
    wide = models.build(config_of(SPEED_WIDTH))
    print(f"base on code: {train(base, code, args.base_steps, 1e-3):.4f}", flush=True)

    rows += speed(makers_of(wide, args), manual, args.pairs)
    makers = makers_of(base, args)
    rows += quality(args, base, {k: makers[k] for k in args.only.split(",")}, manual)
    common.finish("side", rows)


if __name__ == "__main__":
    main()
