"""The precision of codecs of Adam's moments: the mean squared error of m / sqrt(v), and bytes.

The states are those of a model trained here; the table is COAT's (arXiv 2410.19313, table 1).

The paper does not say in what unit its errors are, so the bars are ratios between codecs.
"""

import argparse

import common

from quaver import data, models, train
from quaver.distributed import World
from quaver.job import Job, Run
from quaver.optim import encode_state

EPS = 1e-8
FORMATS = ("e4m3", "e5m2")
PAIRS = [(m, v) for m in FORMATS for v in FORMATS]
# The largest error of the expanded pair e4m3/e4m3 over that of the pairs without expansion.
BARS = {("e4m3", "e4m3"): 0.45, ("e5m2", "e5m2"): 0.15}

BYTES_BAR = ("at most", 2.19)


def trained_states(steps, batch, seq):
    """Moments of `tiny` after some f32 steps on the standard library's text, and its loss."""
    settings = train.Settings(
        data=("stdlib",), model="tiny", recipe=("f32",), steps=steps, batch=batch, seq=seq
    )
    text = data.load(settings.data, settings.seq)
    config = models.load(settings.model).replace(vocab=text.vocab)
    job = Job(Run(settings, config, text, World("cpu")), "f32")
    for step in range(1, steps + 1):
        line = job.step(step)
    states = [job.optimizer.state[p] for p in job.model.parameters()]
    return [(s["exp_avg"], s["exp_avg_sq"]) for s in states], line["loss"]


def error(states, first, second):
    """Mean of (m / (sqrt(v) + eps) - decoded)^2 over all elements that ever had a gradient, and
    bytes of both moments a parameter."""
    total, count, size, numel = 0.0, 0, 0, 0
    for m, v in states:
        stored_m, stored_v = encode_state(m, first), encode_state(v, second)
        live = v > 0
        exact = m.double() / (v.double().sqrt() + EPS)
        ours = stored_m.decode().double() / (stored_v.decode().double().sqrt() + EPS)
        total += (ours - exact)[live].square().sum().item()
        count += int(live.sum())
        size += stored_m.nbytes + stored_v.nbytes
        numel += m.numel()
    return total / count, size / numel


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    states, loss = trained_states(args.steps, args.batch, args.seq)
    print(f"tiny after {args.steps} steps, loss {loss:.3f}; MSE of m / sqrt(v), times 1e5:")
    print(f"{'m / v':<12} {'plain':>9} {'expanded':>9} {'ratio':>6}  bytes a parameter")
    rows, plain = [], {}
    for pair in PAIRS:
        plain[pair], plain_bytes = error(states, *pair)
        expanded, expanded_bytes = error(states, *(f"{name}-expand" for name in pair))
        name = "/".join(pair)
        rows.append(
            {
                "name": f"states {name}",
                "mse": plain[pair],
                "mse_expanded": expanded,
                "bytes_per_param": plain_bytes,
                "bytes_per_param_expanded": expanded_bytes,
            }
        )
        print(
            f"{name:<12} {plain[pair] * 1e5:9.3f} {expanded * 1e5:9.3f} "
            f"{expanded / plain[pair]:6.3f}  {plain_bytes:.4f} {expanded_bytes:.4f}"
        )
    ours = rows[0]["mse_expanded"]
    for pair, bar in BARS.items():
        name = f"MSE of m / sqrt(v), expanded e4m3/e4m3 over plain {'/'.join(pair)}"
        rows.append(common.judge(name, ours / plain[pair], "at most", bar))
    bytes = rows[0]["bytes_per_param_expanded"]
    rows.append(common.judge("bytes a parameter of both moments, expanded", bytes, *BYTES_BAR))
    rows.append({"name": "training", "steps": args.steps, "loss": loss})
    common.finish("states", rows)


if __name__ == "__main__":
    main()
