"""Folders that tests export, and what lies in them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import quaver as qv

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

RECIPES = (None, "tensorwise", "blockwise", "fp8lm-o2", "coat")
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def plain(family="Llama", seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def trained(recipe, steps=4, **changes):
    """A model whose blocks and tensors have scales of many sizes, after some steps."""
    model = plain(**changes)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() == 2:
                p.mul_(torch.logspace(-1, 1, p.shape[0])[:, None] * 2.0 ** (i % 3 - 1))
    if recipe is not None:
        qv.convert(model, recipe)
    optimizer = qv.AdamW(model.parameters(), lr=1e-3, recipe=recipe or "bf16")
    for _ in range(steps):
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def stored(folder):
    """All tensors of a folder's safetensors, by their names."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def weights(model):
    """The plain f32 values of every parameter."""
    return {n: torch.empty(p.shape).copy_(p.detach()) for n, p in model.named_parameters()}


def by_blocks(scale, shape):
    """Block scales, repeated over the 128 x 128 that each decodes."""
    rows, columns = scale.repeat_interleave(128, 0), scale.repeat_interleave(128, 1)
    return rows[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]] + 0 * columns[0, 0]


def decoded(tensors, name):
    """What a folder's weight means: the oracle of every reader here."""
    q = tensors[name].float()
    for suffix in ("_scale_inv", "_scale"):
        scale = tensors.get(name + suffix)
        if scale is not None:
            return q * (by_blocks(scale, q.shape) if scale.dim() == 2 else scale)
    return q


def load(folder, form, **options):
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
