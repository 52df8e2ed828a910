"""Full finetuning of a 7B model on a card of 24 GB, planned on fake tensors."""

import quaver as qv
from quaver import models

LLAMA_2_7B = models.Config(
    vocab=32_000, dim=4096, layers=32, heads=32, kv_heads=32, ffn=11_008, context=2048
)


def test_a_step_of_a_7b_model_peaks_below_24_gb():
    plan = qv.plan(LLAMA_2_7B, "coat", "adamw-4bit", release=True, recompute=True, gpu="4090")
    count = plan["parameters"]
    assert count == 6_738_415_616
    print(f"peak {plan['peak'] / 1e9:.2f} GB in {plan['peak_at']}: {plan['peak_by_kind']}")
    assert plan["master"] == 2 * count
    assert plan["grad"] == 0
    assert plan["exp_avg"] + plan["exp_avg_sq"] <= 1.04 * count
    assert plan["peak"] <= 24 * 10**9
    assert plan["fits"]
