"""The small Llama and GPT compute what their papers say, in plain torch written out below."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quaver import models
from quaver.models import Config, ConfigError

SMALL = Config(vocab=64, dim=32, layers=2, heads=4, kv_heads=2, ffn=48, context=16)
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def attention(module, x, turn):
    """One query, one key at a time: what `Attention` computes, with no SDPA and no fused heads."""
    length, size = x.shape[1], module.head_dim
    q, k, v = module.qkv(x).split(module.split, dim=-1)
    heads = []
    for head in range(module.heads):
        kv = head * module.kv_heads // module.heads
        mine = slice(head * size, (head + 1) * size)
        theirs = slice(kv * size, (kv + 1) * size)
        a, b = turn(q[..., mine]), turn(k[..., theirs])
        score = a @ b.transpose(1, 2) / math.sqrt(size)
        score += torch.full((length, length), -torch.inf).triu(1)
        heads.append(score.softmax(-1) @ v[..., theirs])
    return module.out(torch.cat(heads, -1))


def rotate_by_complex_numbers(x):
    """RoPE as its paper states it: the pair (i, i + half) is a complex number to be turned."""
    half = x.shape[-1] // 2
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), theta)
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1).float()


def rms(x, norm):
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def test_llama_equals_the_written_out_model():
    model = models.build(SMALL)
    for parameter in model.parameters():  # the initial norms are ones, which would hide a mistake
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    x = model.embed.weight[TOKENS]
    for block in model.blocks:
        x = x + attention(block.attention, rms(x, block.norm1), rotate_by_complex_numbers)
        gate, up = (rms(x, block.norm2) @ block.mlp.gate_up.weight.T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ block.mlp.down.weight.T
    expected = rms(x, model.norm) @ model.lm_head.weight.T
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_gpt_equals_the_written_out_model():
    model = models.build(SMALL.replace(family="gpt"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    x = model.embed.weight[TOKENS] + model.position.weight[: TOKENS.shape[1]]
    for block in model.blocks:
        x = x + attention(block.attention, block.norm1(x), lambda y: y)
        y = block.mlp.up(block.norm2(x))
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + block.mlp.down(y)
    expected = model.lm_head(model.norm(x))
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_no_token_sees_a_later_one(family):
    model = models.build(SMALL.replace(family=family)).eval()
    changed = TOKENS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 64
    before, after = model(TOKENS), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    logits = models.build(Config(layers=2))(TOKENS)
    loss = F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
    assert abs(loss.item() - math.log(256)) < 0.2


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = models.build(Config(layers=8))
    block = model.blocks[0]
    small = 0.02 / math.sqrt(16)
    for linear, std in (
        (block.attention.qkv, 0.02),
        (block.attention.out, small),
        (block.mlp.gate_up, 0.02),
        (block.mlp.down, small),
        (model.lm_head, 0.02),
    ):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)


def test_tied_embeddings_are_one_parameter():
    model = models.build(SMALL.replace(tie_embeddings=True))
    assert model.lm_head.weight is model.embed.weight
    model(TOKENS).sum().backward()
    assert len({id(p) for p in model.parameters()}) == sum(1 for _ in model.parameters())


def test_too_long_sequences_name_the_context():
    with pytest.raises(
        ValueError, match=r"Llama: tokens must be \[batch, length <= 16\], got \[1, 17\]"
    ):
        models.build(SMALL)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # 7b is Llama-2-7B to the parameter.
    [("tiny", 4_917_888), ("125m", None), ("350m", None), ("1b", None), ("7b", 6_738_415_616)],
)
def test_presets(name, parameters):
    config = models.load(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in models.build(config).parameters())
    if parameters:
        assert count == parameters
    nominal = {"tiny": 4e6, "125m": 125e6, "350m": 350e6, "1b": 1.1e9, "7b": 6.7e9}[name]
    assert 0.75 < count / nominal < 1.25
    assert all(size % 16 == 0 for size in (config.dim, config.ffn, config.vocab, config.head_dim))


def test_json_round_trip(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(SMALL.as_dict()))
    assert models.load(str(path)) == SMALL
    path.write_text('{"layers": 5}')
    assert models.load(str(path)) == Config(layers=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"dim": 1' + "0" * 30 + "}", "dim must be below 2^31"),
        ('{"norm_eps": 1' + "0" * 400 + "}", "norm_eps must be below 2^31"),
        ('{"rope_theta": 1e400}', "rope_theta must be below 2^31"),
        ("[]", "must hold a JSON object, got list"),
        ('{"depth": 3}', "unknown fields depth; known are"),
        ('{"layers": 0}', "layers must be a positive whole number, got 0"),
        ('{"layers": 2.5}', "layers must be a positive whole number, got 2.5"),
        ('{"layers": true}', "layers must be a positive whole number, got True"),
        ('{"dim": 100}', "dim must be a multiple of heads, got 100 and 6"),
        ('{"kv_heads": 4}', "heads must be a multiple of kv_heads, got 6 and 4"),
        ('{"dim": 18, "heads": 6}', "dim / heads must be even to rotate, got 3"),
        ('{"family": "bert"}', "family must be one of llama, gpt, got 'bert'"),
        ('{"norm_eps": "x"}', "norm_eps must be a positive number, got 'x'"),
        ('{"rope_theta": NaN}', "rope_theta must be a positive number, got nan"),
        ('{"tie_embeddings": 1}', "tie_embeddings must be true or false, got 1"),
    ],
)
def test_bad_configurations_name_the_field(tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        models.load(str(path))
    assert message in str(error.value)


def test_unknown_and_missing_models_are_named():
    with pytest.raises(ConfigError, match="unknown model 'huge': give one of tiny, 125m"):
        models.load("huge")
    with pytest.raises(ConfigError, match=r"/no/such\.json: no such file"):
        models.load("/no/such.json")
