"""MicroAdam: its op bit for bit against the oracle, what the algorithm promises, its states."""

import copy

import pytest
import torch
from helpers import assert_same, isa, threads

import quaver as qv
from quaver import reference

BETAS, EPS = (0.9, 0.999), 1e-8
STATE = ("index", "value", "error", "error_range")
SHAPES = ((1,), (7,), (63, 65), (4096,), (3, 4096), (130, 97))
ISAS = qv._C.available_isas()


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        x = torch.randn(p.shape, generator=generator) * scale
        x[torch.rand(p.shape, generator=generator) < 0.05] = 0
        p.grad = x.to(p.dtype)


def micro(params, density=0.05, window=3, error_block=64, alpha=0.0, decay=0.1, **options):
    return qv.MicroAdam(params, 1e-2, BETAS, EPS, decay, density=density, window=window,
                        error_block=error_block, alpha=alpha, **options)  # fmt: skip


class Oracle:
    """The oracle's states of an optimizer's parameters."""

    def __init__(self, opt, params, dtype=torch.float32):
        self.opt, self.params, self.dtype, self.t = opt, params, dtype, 0
        options = (opt.density, opt.window, opt.error_block, dtype)
        self.states = [reference.micro_adam_state(p.numel(), *options) for p in params]

    def step(self, weights):
        """The new weights of all parameters, unrounded."""
        group, self.t = self.opt.param_groups[0], self.t + 1
        options = {"density": self.opt.density, "error_block": self.opt.error_block}
        return [
            reference.micro_adam(w, s, p.grad, self.t, group["lr"], *group["betas"], group["eps"],
                                 group["weight_decay"], group["alpha"], **options)
            for w, s, p in zip(weights, self.states, self.params, strict=True)
        ]  # fmt: skip


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    ("density", "window", "error_block", "alpha"),
    [(0.01, 10, 64, 0.0), (0.3, 3, 16, 0.25), (1.0, 2, 4096, 0.0), (0.02, 4, 100_000, 0.0),
     (0.05, 3, 6000, 0.5), (0.01, 1, 1024, 0.1)],
)  # fmt: skip
def test_steps_have_the_bits_of_the_oracle(density, window, error_block, alpha, name):
    params = parameters()
    opt = micro(params, density, window, error_block, alpha, 0.1 if window == 3 else 0.0)
    oracle = Oracle(opt, params)
    for t in range(1, 6):
        set_grads(params, t, 10.0 ** (t % 3))
        grads = [p.grad.clone() for p in params]
        wanted = oracle.step([p.detach() for p in params])
        with isa(name), threads(1 + t % 2):
            opt.step()
        for p, state, w, g in zip(params, oracle.states, wanted, grads, strict=True):
            assert_same(p.detach(), w)
            assert_same(p.grad, g)
            assert opt.state[p]["step"] == t
            for key in STATE:
                assert_same(opt.state[p][key], state[key])


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["stochastic", "nearest", "remainder", "remainder8"])
def test_16_bit_parameters_round_as_the_rule_says(dtype, rule, name):
    params = parameters(dtype=dtype)
    opt = micro(params, bf16_master=rule)
    oracle = Oracle(opt, params)
    masters = [p.detach().float() for p in params]
    for t in range(1, 5):
        set_grads(params, t)
        if "remainder" not in rule or dtype != torch.bfloat16:
            masters = [p.detach().float() for p in params]
        masters = oracle.step(masters)
        with isa(name):
            opt.step()
        for i, (p, w) in enumerate(zip(params, masters, strict=True), 1):
            if rule == "stochastic" and dtype == torch.bfloat16:
                assert_same(p.detach(), reference.stochastic_bf16(w, i, t - 1))
            elif rule == "stochastic":
                noise = reference.dither_noise(w.numel(), i, t - 1)[0]
                assert_same(p.detach(), reference.encode_stochastic(w, dtype, words=noise >> 19))
            elif "remainder" in rule and dtype == torch.bfloat16:
                high, low = reference.split_master(w, 8 if rule == "remainder8" else 16)
                assert_same(p.detach(), high)
                assert_same(opt.state[p]["remainder"], low)
                masters[i - 1] = reference.join_master(high, low)
            else:
                assert_same(p.detach(), w.to(dtype))


def test_density_1_within_the_window_is_adamw():
    """f64 without 16-bit storage to 1e-12. f32 to 1e-6 of the updates' sum, with gradients that
    bf16 holds: each operation of a step adds at most 2^-24 of it."""
    params = parameters()
    opt = micro(params, density=1.0, window=8)
    oracle = Oracle(opt, params, torch.float64)
    exact = [p.detach().double() for p in params]
    adam = [(w, torch.zeros_like(w), torch.zeros_like(w)) for w in exact]
    for t in range(1, 9):
        set_grads(params, t)
        for p in params:
            p.grad = p.grad.bfloat16().float()
        exact = oracle.step(exact)
        opt.step()
        adam = [
            reference.adamw(*state, p.grad, t, 1e-2, *BETAS, EPS, 0.1)
            for state, p in zip(adam, params, strict=True)
        ]
        for p, w, (wanted, _, _) in zip(params, exact, adam, strict=True):
            torch.testing.assert_close(w, wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("error_block", [16, 64, 100_000])
def test_kept_and_error_are_the_gradient_within_half_a_level(error_block):
    """The code's own arithmetic adds 2^-21 of the range: (x - low) / level and low + level * code
    each round a few times."""
    params = parameters()
    opt = micro(params, error_block=error_block)
    before = [torch.zeros(p.numel()) for p in params]
    for t in range(1, 6):
        set_grads(params, t, 100.0 ** (t % 2))
        opt.step()
        for i, p in enumerate(params):
            s, n = opt.state[p], p.numel()
            a = p.grad.flatten() + before[i]
            kept, blocks = qv.optim.microadam.kept_of(n, opt.density)[0], n // 4096
            where = torch.arange(s["index"].shape[1]) // max(kept, 1)
            place = s["index"][(t - 1) % 3].long() + where.clamp(max=blocks) * 4096
            dense = torch.zeros(n).index_put((place,), s["value"][(t - 1) % 3].float())
            error = reference.decode_error(s, n, error_block)
            low, high = s["error_range"].float().unbind(1)
            width = (high - low).repeat_interleave(error_block)[:n]
            slack = width * 2**-21 + a.abs() * 2**-23
            assert ((dense + error - a).abs() <= width / 30 + slack).all()
            before[i] = error


def test_a_steady_gradient_steps_3_748925_times_as_far_as_adamw_at_400():
    """Of c1 z1 the window keeps (1 - b1^10) / (1 - b1^400) of g, of c2 z2 (1 - b2^10) /
    (1 - b2^400) of g^2, where AdamW has 1 and 1."""
    p = torch.nn.Parameter(torch.zeros(100))
    opt = qv.MicroAdam([p], 1.0, density=1.0)
    for _ in range(400):
        p.grad = torch.full((100,), 0.5)
        last = p.detach().clone()
        opt.step()
    b1, b2 = BETAS
    factor = (1 - b1**10) / (1 - b1**400) / ((1 - b2**10) / (1 - b2**400)) ** 0.5
    assert factor == pytest.approx(3.748925, abs=1e-6)
    torch.testing.assert_close(last - p.detach(), torch.full((100,), factor), rtol=1e-5, atol=0)


def test_ties_keep_the_lower_index_and_zeros_are_no_error():
    p = torch.nn.Parameter(torch.ones(4096 + 100))
    opt = micro([p], density=0.01)
    p.grad = torch.zeros_like(p)
    p.grad[10:4000] = 1.0
    opt.step()
    s = opt.state[p]
    assert s["index"][0].tolist() == [*range(10, 51), 0]
    assert s["value"][0].tolist() == [1.0] * 41 + [0.0]
    assert reference.decode_error(s, 4196, 64)[4096:].eq(0).all()


@pytest.mark.parametrize("name", ISAS)
def test_nans_are_the_same_whatever_their_bits(name):
    """An amax that has not seen them lets NaNs into a step. Instruction sets leave other signs and
    payloads, which must decide neither what is kept nor the range of the errors."""
    n, kept = 4096, 41
    bits = torch.full((n,), 0x7FC0, dtype=torch.int16)
    bits[1::2] = 0x7FFF
    bits[2::3] = -1  # 0xFFFF
    indices = torch.zeros(3, kept, dtype=torch.int16)
    ranges = torch.zeros(n // 64, 2, dtype=torch.bfloat16)
    with isa(name):
        torch.ops.quaver.micro_adam_(
            [torch.zeros(n)], [indices], [torch.zeros(3, kept, dtype=torch.bfloat16)],
            [torch.zeros(n // 2, dtype=torch.uint8)], [ranges], [bits.view(torch.bfloat16)],
            [torch.empty(0)], torch.ones(1), [torch.zeros((), dtype=torch.int64)],
            torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.1, 0.0]], dtype=torch.float64),
            torch.zeros((), dtype=torch.int64), [torch.empty(0)], [kept], [64], [-1],
        )  # fmt: skip
    assert indices[0].tolist() == list(range(kept))
    assert ranges.isnan().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    params = parameters()
    opt = micro(params)
    set_grads(params, 1)
    opt.step()
    before = copy.deepcopy([opt.state_dict(), [p.detach() for p in params]])
    set_grads(params, 2)
    params[2].grad[5, 5] = bad
    opt.step()
    assert opt.skipped == 1
    after = [opt.state_dict(), [p.detach() for p in params]]
    for x, y in zip(*map(torch.utils._pytree.tree_leaves, (before, after)), strict=True):
        assert_same(x, y) if isinstance(x, torch.Tensor) else None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0.0}, "density must be in"), ({"density": 1.5}, "density must be in"),
     ({"density": float("nan")}, "density must be in"), ({"window": 0}, "window must be"),
     ({"window": 2.0}, "window must be"), ({"error_block": 48}, "error_block must be"),
     ({"error_block": 8}, "error_block must be"), ({"error_block": 4104}, "error_block must be"),
     ({"alpha": 1.0}, "alpha must be"), ({"alpha": -0.1}, "alpha must be"),
     ({"lr": -1.0}, "lr must be"), ({"betas": (1.0, 0.9)}, "betas must be"),
     ({"eps": -1.0}, "eps must be"), ({"weight_decay": -1.0}, "weight_decay must be"),
     ({"bf16_master": "up"}, "bf16_master must be")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        qv.MicroAdam(parameters(), **{"lr": 1e-3, **options})


def test_parameters_that_it_cannot_step_are_refused():
    with pytest.raises(ValueError, match="density is one for all groups"):
        qv.MicroAdam([{"params": parameters(), "density": 0.5}], 1e-3)
    scaled = torch.nn.Parameter(qv.quantize(torch.randn(8, 8), torch.float16))
    with pytest.raises(ValueError, match="wanted plain parameters"):
        qv.MicroAdam([scaled], 1e-3)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        qv.MicroAdam([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))], 1e-3)
    p = parameters()[2]
    opt = qv.MicroAdam([p], 1e-3)
    p.grad = torch.zeros_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        opt.step()


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Linear(96, 130), torch.nn.GELU(), torch.nn.Linear(130, 7)
    return torch.nn.Sequential(*layers).to(dtype)


def train(net, opt, first, last):
    for step in range(first, last):
        set_grads(list(net.parameters()), step)
        opt.step()


@pytest.mark.parametrize("way", ["save", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bf16_master": "remainder", "error_block": 100_000}])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, options, dtype, way):
    whole, here = model(dtype), model(dtype)
    opt, part = micro(whole.parameters(), **options), micro(here.parameters(), **options)
    train(whole, opt, 0, 9)
    train(here, part, 0, 5)
    there = model(dtype)
    other = micro(there.parameters(), **options)
    if way == "save":
        qv.save(tmp_path / "run", here, part)
        qv.load(tmp_path / "run", there, other)
    else:
        there.load_state_dict(copy.deepcopy(here.state_dict()))
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    train(there, other, 5, 9)
    for p, q in zip(whole.parameters(), there.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
        for key, value in opt.state[p].items():
            assert_same(value, other.state[q][key])


def test_a_state_of_other_options_is_refused_and_changes_nothing(tmp_path):
    here, there = model(), model()
    part = micro(here.parameters())
    train(here, part, 0, 2)
    qv.save(tmp_path / "run", here, part)
    for options in ({"window": 4}, {"density": 0.5}, {"error_block": 128}):
        other = micro(there.parameters(), **options)
        with pytest.raises(ValueError, match="the state of parameter 0 has"):
            other.load_state_dict(part.state_dict())
        with pytest.raises(qv.CheckpointError, match="micro-adam"):
            qv.load(tmp_path / "run", there, other)
        assert not other.state
    adam = qv.AdamW(there.parameters())
    with pytest.raises(ValueError, match="has error, error_range"):
        adam.load_state_dict(part.state_dict())


def bytes_a_parameter(shapes, **options):
    params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in shapes]
    opt = qv.MicroAdam(params, 1e-4, **options)
    states = [t for p in params for t in opt.state_of(p).values()]
    return sum(t.nbytes for t in states) / sum(p.numel() for p in params)


@pytest.mark.parametrize(("error_block", "bar"), [(64, 0.97), (100_000, 0.91)])
def test_bytes_of_a_7b_model_are_within_the_bar(error_block, bar):
    d, ffn, vocab = 4096, 11008, 32000
    layer = [(d, d)] * 4 + [(ffn, d)] * 2 + [(d, ffn), (d,), (d,)]
    shapes = layer * 32 + [(vocab, d), (d,), (vocab, d)]
    assert bytes_a_parameter(shapes, error_block=error_block) <= bar


def test_a_report_counts_every_state_by_kind():
    net = model(torch.bfloat16)
    opt = micro(net.parameters(), bf16_master="remainder")
    train(net, opt, 0, 1)
    report = qv.memory_report(net, opt)
    states = [opt.state[p] for p in net.parameters()]
    assert report["exp_avg"] == sum(s[key].nbytes for s in states for key in STATE)
    weights = sum(p.nbytes for p in net.parameters())
    assert report["master"] == weights + sum(s["remainder"].nbytes for s in states)
    assert report["other"] == 8 * len(states)
