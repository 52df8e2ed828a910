"""A plain PyTorch loop in FP8: convert, train, save.

python examples/train_loop.py [steps]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import quaver as qv

RECIPE = "fp8lm-o2"


def main(steps: int = 200, path: str = "example.safetensors") -> float:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 16))
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                          nn.Linear(256, 16))  # fmt: skip
    qv.convert(model, recipe=RECIPE)
    optimizer = qv.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, recipe=RECIPE)
    for step in range(steps):
        x = torch.randn(512, 64)
        with torch.no_grad():
            y = teacher(x)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(x).float(), y)
        loss.backward()
        qv.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    report = qv.memory_report(model, optimizer)
    print({kind: size for kind, size in report.items() if kind != "bytes_per_param"})
    qv.save(path, model, optimizer, step=steps)
    print(f"saved {path}; {optimizer.skipped} steps skipped")
    return loss.item()


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]))
