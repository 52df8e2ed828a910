"""Training idioms that people write by hand: each does to the converted model what it does to the
plain one, and what the layers multiply by afterwards is what the parameters hold."""

import copy

import pytest
import torch
from small import RECIPES, assert_computes_with, batch, distance, mlp, plain, twin_of, values
from torch import nn
from torch.nn import functional as F


def backward(model, seed=0):
    x, y = batch(seed=seed)
    F.mse_loss(model(x), y).backward()


def sgd(model, lr=5.0):
    return torch.optim.SGD(model.parameters(), lr=lr)


def zeroed_gradients(m):
    optimizer = sgd(m)
    backward(m)
    optimizer.zero_grad(set_to_none=False)
    backward(m, 1)
    optimizer.step()


def noise_on_gradients(m):
    backward(m)
    generator = torch.Generator().manual_seed(0)
    for p in m.parameters():
        p.grad.add_(1e-4 * torch.randn(p.shape, generator=generator))
    sgd(m).step()


def decay_in_the_gradient(m):
    backward(m)
    for p in m.parameters():
        p.grad = p.grad + 0.5 * p.detach()
    sgd(m).step()


def centralized_gradients(m):
    backward(m)
    for p in m.parameters():
        if p.dim() > 1:
            p.grad.sub_(p.grad.mean(1, keepdim=True))
    sgd(m).step()


def stashed_gradients(m):
    backward(m)
    kept = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    backward(m, 1)
    for p, old in zip(m.parameters(), kept, strict=True):
        p.grad.add_(old)
    sgd(m).step()


def projected_gradients(m):
    """Of two tasks, flattened and put back (PCGrad)."""
    flat = []
    for seed in range(2):
        m.zero_grad()
        backward(m, seed)
        flat.append(torch.cat([plain(p.grad).reshape(-1) for p in m.parameters()]))
    total, start = flat[0] + 2 * flat[1], 0
    for p in m.parameters():
        p.grad.copy_(total[start : start + p.numel()].view_as(p))
        start += p.numel()
    sgd(m).step()


def sharpness_aware(m):
    optimizer = sgd(m)
    backward(m)
    norm = torch.nn.utils.get_total_norm([p.grad for p in m.parameters()])
    steps = [p.grad * (0.5 / norm) for p in m.parameters()]
    with torch.no_grad():
        for p, step in zip(m.parameters(), steps, strict=True):
            p.add_(step)
    optimizer.zero_grad()
    backward(m)
    with torch.no_grad():
        for p, step in zip(m.parameters(), steps, strict=True):
            p.sub_(step)
    optimizer.step()


def sharpness_aware_by_data(m):
    optimizer = sgd(m)
    backward(m)
    norm = torch.nn.utils.get_total_norm([p.grad for p in m.parameters()])
    old = []
    for p in m.parameters():
        old.append(p.data.clone())
        p.data.add_(p.grad * (0.5 / norm))
    optimizer.zero_grad()
    backward(m)
    for p, value in zip(m.parameters(), old, strict=True):
        p.data = value
    optimizer.step()


def lookahead(m):
    slow, optimizer = [p.data.clone() for p in m.parameters()], sgd(m)
    for seed in range(3):
        backward(m, seed)
        optimizer.step()
        optimizer.zero_grad()
    for p, s in zip(m.parameters(), slow, strict=True):
        s.add_(p.data - s, alpha=0.5)
        p.data.copy_(s)


def clipped_weights(m):
    backward(m)
    for p in m.parameters():
        p.data.clamp_(-0.02, 0.02)


def one_flat_buffer(m):
    """apex and fairseq: parameters become views of one buffer, which is then written."""
    backward(m)
    flat, start = torch.cat([plain(p).reshape(-1) for p in m.parameters()]), 0
    for p in m.parameters():
        p.data = flat[start : start + p.numel()].view_as(p).to(p.dtype)
        start += p.numel()
        p.data.mul_(-1)


def swapped_data(m):
    backward(m)
    m[0].weight.data, m[2].weight.data = m[2].weight.data, m[0].weight.data


def truncated_by_svd(m):
    backward(m)
    u, s, v = torch.linalg.svd(m[0].weight.detach().float())
    with torch.no_grad():
        m[0].weight.copy_((u[:, :8] * s[:8]) @ v[:8])


def surgery(m):
    backward(m)
    w = m[0].weight
    m[0].weight = nn.Parameter(torch.cat([w[:32], w[:32]]).detach())
    m.zero_grad()
    backward(m)
    sgd(m).step()


def restored_after_a_trial(m):
    """A learning rate finder."""
    kept, optimizer = copy.deepcopy(m.state_dict()), sgd(m)
    backward(m)
    optimizer.step()
    optimizer.zero_grad()
    m.load_state_dict(kept)


def step_in_backward(m):
    optimizers = {p: torch.optim.SGD([p], lr=5.0) for p in m.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(hook)
    backward(m)
    backward(m, 1)


def penalty_of_weights(m):
    x, y = batch()
    loss = F.mse_loss(m(x), y) + 1e-2 * sum(p.square().sum() for p in m.parameters())
    loss.backward()
    sgd(m).step()


def a_layer_used_twice(m):
    x, y = batch()
    F.mse_loss(m[2](m[0](torch.tanh(m[0](x)))), y).backward()
    sgd(m).step()


def two_backwards_of_one_graph(m):
    x, y = batch()
    loss = F.mse_loss(m(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    sgd(m).step()


def a_weight_used_directly(m):
    x, y = batch()
    w = m[0].weight.to(x.dtype)
    h = m[0](x) + F.linear(x, w) + torch.einsum("bi,oi->bo", x, w)
    F.mse_loss(m[2](h), y).backward()
    sgd(m).step()


def outputs_written_in_place(m):
    x, y = batch()
    h = m[0](x)
    h += x
    h[:, 3] = 0
    F.relu_(h)
    F.mse_loss(m[2](h), y).backward()
    sgd(m).step()


def saved_on_the_host(m):
    with torch.autograd.graph.save_on_cpu():
        x, y = batch()
        loss = F.mse_loss(m(x), y)
    loss.backward()
    sgd(m).step()


def served_between_steps(m):
    optimizer = sgd(m)
    for seed in range(2):
        backward(m, seed)
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            m.eval()(batch()[0])
        m.train()


IDIOMS = [
    zeroed_gradients, noise_on_gradients, decay_in_the_gradient, centralized_gradients,
    stashed_gradients, projected_gradients, sharpness_aware, sharpness_aware_by_data, lookahead,
    clipped_weights, one_flat_buffer, swapped_data, truncated_by_svd, surgery,
    restored_after_a_trial, step_in_backward, penalty_of_weights, a_layer_used_twice,
    two_backwards_of_one_graph, a_weight_used_directly, outputs_written_in_place,
    saved_on_the_host, served_between_steps,
]  # fmt: skip


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_idiom(recipe, idiom):
    model = mlp(recipe)
    twin, start = twin_of(model), values(model)
    idiom(model)
    idiom(twin)
    found = values(model)
    for name, p in twin.named_parameters():
        wanted = plain(p)
        # The change is right to FP8's rounding of gradients, the value to that of its format.
        bound = 0.25 * (wanted - start[name]).norm()
        bound += max(2**-10, torch.finfo(p.dtype).eps / 2) * wanted.norm()
        assert (found[name] - wanted).norm() <= bound, name
    assert_computes_with(model, found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_to_look_at(recipe):
    """What logging code reads: lists, numbers, NumPy arrays, text."""
    model = mlp(recipe)
    backward(model)
    for t in (model[0].weight, model[0].weight.grad):
        wanted = plain(t)
        assert t.tolist() == wanted.tolist()
        assert t[0, 0].item() == float(t[0, 0]) == wanted[0, 0].item()
        assert (t.detach().float().numpy() == wanted.numpy()).all()
        assert float(f"{t.norm():.3e}") == pytest.approx(wanted.norm().item(), rel=2**-7)
        assert t.shape == wanted.shape and repr(t) and str(t)
        assert not torch.isnan(t).any() and distance(t, wanted) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_made_while_serving(recipe):
    """Made, converted and run in inference mode."""
    with torch.inference_mode():
        model, x = mlp(recipe), batch()[0]
        assert distance(model(x), mlp()(x)) < 0.1
