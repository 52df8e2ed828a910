"""What casts to FP8 lose: the statistics of cast_statistics.py."""

import pytest
import torch
from helpers import randn

from quaver.cast_statistics import measured
from quaver.ops import quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_statistics_are_their_definitions(dtype):
    x = randn(64, 96) * 1e-2
    x[:, 5] = 1e4 * randn(64, seed=1)
    x[0, :9] = 0
    amax, saturated, flushed, kurtosis = measured(x, dtype).tolist()
    codes = quantize(x, dtype).qdata.float()
    assert amax == x.abs().max()
    assert saturated == 0
    assert flushed == pytest.approx(((codes == 0) & (x != 0)).sum().item() / (x != 0).sum().item())
    wide = x.double()
    assert kurtosis == pytest.approx(
        (wide**4).mean().item() / (wide**2).mean().item() ** 2, rel=1e-4
    )
    # Codes that a producer made know no zeros of before, and are saturated at the largest.
    ready = quantize(x, dtype)
    of_codes = measured(ready, dtype).tolist()
    assert of_codes[2] == pytest.approx((codes == 0).double().mean().item())
    assert of_codes[1] == pytest.approx(
        (codes.abs() == torch.finfo(dtype).max).double().mean().item()
    )


@pytest.mark.parametrize("grain", ["row", "block", "tile"])
def test_scales_of_other_grains_are_those_of_the_layer(grain):
    x = randn(256, 256) * 1e-4
    x[3, 3] = 1e4  # flushes what shares its scale
    amax, saturated, flushed, _ = measured(x, E4M3, None, grain, False)
    q = quantize(x, E4M3, granularity=grain, power_of_two=False)
    assert amax == 1e4 and saturated == 0
    assert flushed == (q.qdata.float() == 0).float().mean()
    assert flushed < measured(x, E4M3)[2]


def test_the_largest_code_of_a_block_is_no_saturation():
    x = randn(64, 256)
    x[:, ::128] = 448.0  # the largest value of each block, whose scale is 1
    q = quantize(x, E4M3, granularity="block")
    assert (q.qdata.float() == 448).sum() == 128 and measured(q, E4M3)[1] == 0
    assert measured(quantize(x, E4M3), E4M3)[1] > 0  # a scale of the tensor may be a forecast


def test_delayed_scaling_is_measured_by_a_copy_of_its_history():
    history, x = torch.zeros(17), randn(8, 32) * torch.logspace(-3, 3, 32)
    for _ in range(20):
        quantize(8 * x, E4M3, history=history)
    before = history.clone()
    _, saturated, flushed, _ = measured(x, E4M3, history).tolist()
    codes = quantize(x, E4M3, history=history.clone()).qdata.float()
    assert flushed == pytest.approx((codes == 0).double().mean().item())
    assert flushed > measured(x, E4M3)[2].item()
    assert saturated == 0
    assert torch.equal(history, before)
