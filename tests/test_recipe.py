"""Every field of a recipe is checked when the recipe is made."""

import dataclasses

import pytest
import torch

from quaver import recipe
from quaver.optim.states import STATES
from quaver.recipe import ActivationRecipe, LinearRecipe, Recipe

WRONG = [
    (LinearRecipe, "input", torch.bfloat16, "torch.float8_e4m3fn, torch.float8_e5m2"),
    (LinearRecipe, "weight", "e4m3", "torch.float8_e4m3fn, torch.float8_e5m2"),
    (LinearRecipe, "grad_output", None, "torch.float8_e4m3fn, torch.float8_e5m2"),
    (LinearRecipe, "scaling", "dleayed", "current, delayed"),
    (LinearRecipe, "weight_grad", "fp32", "e4m3, bf16, f32"),
    (LinearRecipe, "master", "f32", "as-is, bf16, f16-tensor"),
    (LinearRecipe, "grad_accumulate", "e4m3", "bf16, f32"),
    (LinearRecipe, "cache", True, "none, master"),
    (LinearRecipe, "grain", "tile", "tensor, row, block"),
    (LinearRecipe, "kept", "block", "grain, tile"),
    (LinearRecipe, "power_of_two", 1, "True, False"),
    (LinearRecipe, "weight_product", "f32", "fp8, bf16"),
    (ActivationRecipe, "block", 0, "an int from 1"),
    (ActivationRecipe, "block", True, "an int from 1"),
    (ActivationRecipe, "block", 32.0, "an int from 1"),
    (ActivationRecipe, "block", 2**63 - 1, "an int from 1"),
    (ActivationRecipe, "norm", 1, "True, False"),
    (ActivationRecipe, "mlp", "yes", "True, False"),
    (ActivationRecipe, "smooth_swiglu", None, "True, False"),
    (Recipe, "name", "", "a non-empty string"),
    (Recipe, "autocast", torch.float8_e4m3fn, "None, torch.bfloat16, torch.float16"),
    (Recipe, "linear", "tensorwise", "LinearRecipe or None"),
    (Recipe, "activation", True, "ActivationRecipe or None"),
    (Recipe, "exp_avg", "int8", "f32, e4m3, "),
    (Recipe, "exp_avg_sq", None, "f32, e4m3, "),
    (Recipe, "plain_moments", 1, "True, False"),
    (Recipe, "bf16_master", "up", "nearest, stochastic, remainder, remainder8"),
    (Recipe, "master_rounding", "remainder", "stochastic, nearest"),
    (Recipe, "replica", torch.float16, "None, torch.float8_e4m3fn, "),
    (Recipe, "fp8_sum", 0, "True, False"),
]


@pytest.mark.parametrize(("kind", "field", "value", "choices"), WRONG)
def test_a_wrong_value_is_refused_by_field_value_and_choices(kind, field, value, choices):
    base = Recipe("mine") if kind is Recipe else kind()
    with pytest.raises(ValueError) as refused:
        dataclasses.replace(base, **{field: value})
    message = str(refused.value)
    assert message.startswith(f"{kind.__name__}: {field} must be ")
    assert choices in message and message.endswith(f"got {value!r}")


def test_every_field_is_checked():
    for kind in (LinearRecipe, ActivationRecipe, Recipe):
        tested = {field for owner, field, *_ in WRONG if owner is kind}
        assert tested == {field.name for field in dataclasses.fields(kind)}


def test_choices_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match='cache="master" needs master="f16-tensor", got \'bf16\''):
        LinearRecipe(master="bf16", cache="master")


def test_the_names_of_states_are_those_of_the_optimizer():
    assert set(recipe.STATES) == set(STATES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grain": "block", "scaling": "delayed"}, "scaling='delayed' excludes grain='block'"),
        ({"grain": "row", "master": "f16-tensor"}, "master='f16-tensor' excludes grain='row'"),
        ({"power_of_two": False}, "power_of_two=False excludes grain='tensor'"),
        ({"weight_product": "bf16"}, "weight_product='bf16' excludes grain='tensor'"),
        ({"kept": "tile"}, "kept='tile' excludes grain='tensor'"),
        ({"grain": "row", "kept": "tile"}, "kept='tile' excludes grain='row'"),
        (
            {"grain": "row", "weight_product": "bf16", "weight_grad": "e4m3"},
            "excludes grain='row' with weight_grad='e4m3'",
        ),
    ],
)
def test_grains_that_exclude_other_choices(fields, message):
    with pytest.raises(ValueError, match=message):
        LinearRecipe(**fields)


def test_activations_in_fp8_have_one_scale_a_tensor_or_block():
    with pytest.raises(ValueError, match=r"linear\.grain must be tensor or block, got row"):
        dataclasses.replace(recipe.get("coat"), linear=recipe.get("rowwise").linear)
