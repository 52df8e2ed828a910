"""Small models, and what they should compute, for tests against other people's libraries."""

import torch
import transformers
from torch import nn

import quaver as qv

# One recipe of each kind: FP8 products alone, under one scale and by blocks, FP8 masters and
# gradients, FP8 between layers.
RECIPES = ("tensorwise", "blockwise", "fp8lm-o2", "coat")
WIDTH = 64
VOCABULARY = 128


def mlp(recipe=None, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH, bias=False)
    model = nn.Sequential(*layers).to(dtype)
    return model if recipe is None else qv.convert(model, recipe)


def batch(rows=32, seed=0):
    """Inputs, and the outputs of another model of the same shape."""
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, mlp(seed=99)(x)


def plain(t):
    """The values of any tensor in an ordinary one, f32: all that these tests take for granted."""
    return torch.empty(t.shape).copy_(t.detach())


def values(model):
    return {name: plain(p) for name, p in model.named_parameters()}


def distance(got, wanted):
    """Relative to `wanted`, in the 2-norm."""
    return ((plain(got) - plain(wanted)).norm() / plain(wanted).norm()).item()


class _Mixed(nn.Linear):
    """A plain layer; its parameters may be in bf16 where its input is not."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def twin_of(model):
    """The plain model with these parameters, in the dtypes that convert gave them."""
    twin = mlp()
    for module in twin:
        if isinstance(module, nn.Linear):
            module.__class__ = _Mixed
    for p, value in zip(twin.parameters(), model.parameters(), strict=True):
        p.data = plain(value).to(value.dtype)
    return twin


def assert_computes_with(model, parameters, x=None):
    """The model's result is that of the plain model with these parameters. Rounding x and w of two
    layers to e4m3 leaves 5 %; a write that got lost is far off, which callers see to."""
    x = batch()[0] if x is None else x
    twin = mlp()
    twin.load_state_dict({name: value.clone() for name, value in parameters.items()})
    with torch.no_grad():
        assert distance(model(x), twin(x)) < 0.1


def llama(recipe=None, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    config = transformers.LlamaConfig(**sizes | changes)
    model = transformers.LlamaForCausalLM(config)
    return model if recipe is None else qv.convert(model, recipe)


class Text(torch.utils.data.Dataset):
    """`count` sequences that count up from random starts: learned in a few steps."""

    def __init__(self, count=32, length=24, seed=0):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(1, 16, (count, 1), generator=generator)
        self.tokens = start + torch.arange(length)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}
