"""The memory of a training step: the saved activations of one Llama block, and everything
(weights, gradients, states, activations) of a whole model, each recipe against bf16.

Counted from the storages that exist (quaver.memory_report), so the figures do not depend on the
machine. Two baselines for a block: the bf16 recipe (f32 weights and residual stream under
autocast), and a model that is bf16 throughout. The block is Hugging Face's where transformers is
installed, and ours.
"""

import argparse

import common
import torch

import quaver as qv
from quaver import machine, models, train
from quaver.job import Job, Run
from quaver.memory import ACTIVATION_KINDS, KINDS
from quaver.models.layers import rotary
from quaver.models.llama import Block

BLOCK_BAR, BLOCK_AIM = 0.60, 0.50  # of the bf16 recipe's bytes, at most
WHOLE_BAR = 1.54  # times less than the bf16 recipe, at least (COAT, arXiv 2410.19313)
HIDDEN, FFN, SEQ, HEADS = 512, 1376, 512, 8
UNIT = HIDDEN * SEQ  # bytes of one FP8 tensor [tokens, hidden]


def huggingface_block():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        attn_implementation="sdpa",
    )
    rotate = LlamaRotaryEmbedding(config)

    def call(block, x):
        return block(x, position_embeddings=rotate(x, torch.arange(SEQ)[None]))

    return LlamaDecoderLayer(config, 0), call


def our_block():
    config = models.Config(dim=HIDDEN, ffn=FFN, heads=HEADS, kv_heads=HEADS, context=SEQ)
    position = rotary(config.head_dim, SEQ, config.rope_theta)
    return Block(config), lambda block, x: block(x, position)


def saved_by_block(make, recipe, dtype):
    torch.manual_seed(0)
    block, call = make()
    block = qv.convert(block.to(dtype), recipe)
    x = torch.randn(1, SEQ, HIDDEN, dtype=dtype, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)
    with qv.saved_activations(block) as saved, autocast:
        y = call(block, x)
    y.float().sum().backward()
    return saved


def block_rows(name, make):
    base = saved_by_block(make, "bf16", torch.float32)
    pure = saved_by_block(make, "bf16", torch.bfloat16)
    print(f"\n{name}: hidden {HIDDEN}, ffn {FFN}, {SEQ} tokens; saved bytes / (tokens * hidden)")
    print(f"  {'':<24}{'all':>7}" + "".join(f"{kind:>11}" for kind in ACTIVATION_KINDS))
    shown = {
        "bf16 recipe": base,
        "all in bf16": pure,
        "fp8lm-o2": saved_by_block(make, "fp8lm-o2", torch.float32),
        "coat": saved_by_block(make, "coat", torch.float32),
        "coat-blockwise": saved_by_block(make, "coat-blockwise", torch.float32),
        "coat on a bf16 model": saved_by_block(make, "coat", torch.bfloat16),
    }
    for label, saved in shown.items():
        kinds = "".join(f"{size / UNIT:11.2f}" for size in saved.by_kind().values())
        print(f"  {label:<24}{saved.bytes / UNIT:7.2f}{kinds}")
    ratio = shown["coat"].bytes / base.bytes
    more = shown["coat-blockwise"].bytes - shown["coat"].bytes
    print(f"  coat-blockwise - coat: {more} bytes, {more / shown['coat'].bytes:.4%}")
    against_pure = shown["coat on a bf16 model"].bytes / pure.bytes
    print(f"  coat / all in bf16    {against_pure:.3f}")
    # The norms of the CPU keep f32 copies of their input; a fused one would keep the bf16 alone.
    lean = pure.bytes - pure.by_kind()["norm"] + 2 * 2 * UNIT
    against_lean = shown["coat on a bf16 model"].bytes / lean
    print(f"  coat / all in bf16 with fused norms (computed: 2 bytes a value)   {against_lean:.3f}")
    print(f"  f32 residual stream: {1 - pure.bytes / base.bytes:.1%} of the bf16 recipe's bytes")
    return common.judge(
        f"{name}: bytes saved by coat over the bf16 recipe's",
        ratio,
        "at most",
        BLOCK_BAR,
        saved={label: saved.bytes for label, saved in shown.items()},
        ratio_all_bf16=against_pure,
        ratio_fused_norms=against_lean,
    )


def whole(model, recipe, batch, seq):
    """memory_report of a step: its activations, its gradients, and the states that it leaves."""
    settings = train.Settings(model=model, recipe=(recipe,), batch=batch, seq=seq, device="cpu")
    config = models.load(model)
    job = Job(Run(settings, config, None, qv.distributed.World("cpu")), recipe)
    net, optimizer = job.model, job.optimizer
    tokens = torch.randint(0, config.vocab, (batch, seq + 1))
    with machine.bf16_products(job.device):
        with qv.saved_activations(net) as saved:
            loss = job._loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    optimizer.step()
    return qv.memory_report(net, optimizer, activations=saved)


def whole_row(model, recipes, batch, seq):
    print(f"\n{model}: weights, gradients, states and activations of {batch} x {seq} tokens, MiB")
    reports = {recipe: whole(model, recipe, batch, seq) for recipe in recipes}
    kinds = [*KINDS, "other", "activation", "total"]
    print("  " + " " * 10 + "".join(f"{kind:>12}" for kind in kinds))
    for recipe, report in reports.items():
        print(f"  {recipe:<10}" + "".join(f"{report[kind] / 2**20:12.1f}" for kind in kinds))
    base, ours = (reports[recipe] for recipe in recipes)
    less = base["total"] / ours["total"]
    states = (base["total"] - base["activation"]) / (ours["total"] - ours["activation"])
    print(f"  without activations {states:.2f} x, activations alone ", end="")
    print(f"{base['activation'] / ours['activation']:.2f} x")
    return common.judge(
        f"{model}, {batch} x {seq} tokens: all bytes of {recipes[0]} over {recipes[1]}'s",
        less,
        "at least",
        WHOLE_BAR,
        memory=reports,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="125m", help='"none" leaves the whole model out')
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=1024)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = []
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("transformers is not installed: without its block")
    else:
        rows.append(block_rows("Hugging Face Llama block", huggingface_block))
    rows.append(block_rows("Llama block of quaver.models", our_block))
    if args.model != "none":
        rows.append(whole_row(args.model, ("bf16", "coat"), args.batch, args.seq))
    common.finish("activation_memory", rows)


if __name__ == "__main__":
    main()
