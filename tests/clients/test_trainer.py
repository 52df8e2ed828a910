"""transformers' Trainer, unmodified: a converted model trains, saves, resumes and is read back."""

import pytest
import torch
import transformers
from small import RECIPES, Text, distance, llama, plain
from transformers import Trainer, TrainingArguments

import quaver as qv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


def trainer(model, out, recipe=None, callbacks=(), **changes):
    """With qv.AdamW where `recipe` is given, else with the Trainer's own optimizer."""
    options = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "save_steps": 10,
        "logging_steps": 1,
        "bf16": True,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(out), **options | changes)
    ours = {"optimizer_cls_and_kwargs": (qv.AdamW, {"lr": 3e-3, "recipe": recipe})}
    return Trainer(
        model,
        arguments,
        train_dataset=Text(64),
        eval_dataset=Text(8, seed=1),
        callbacks=list(callbacks),
        **(ours if recipe else {}),
    )


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("ours", [False, True], ids=["its optimizer", "qv.AdamW"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_resumes_to_the_same_losses(recipe, ours, tmp_path):
    chosen = recipe if ours else None
    whole = trainer(llama(recipe), tmp_path, chosen)
    whole.train()
    expected = losses(whole)
    assert expected[-1] < 0.9 * expected[0]

    again = trainer(llama(recipe, seed=1), tmp_path / "again", chosen)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert losses(again) == expected
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(plain(a), plain(b)), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_is_an_ordinary_model(recipe, tmp_path):
    """Any user of transformers reads the folder, without quaver, and keeps its values."""
    trained = trainer(llama(recipe), tmp_path, recipe, max_steps=4, save_steps=4)
    trained.train()
    folder = tmp_path / "checkpoint-4"
    twin, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        tokens = Text(4, seed=2).tokens
        assert distance(trained.model.eval()(tokens).logits, twin(tokens).logits) < 0.1
        for (name, a), b in zip(trained.model.named_parameters(), twin.parameters(), strict=True):
            assert distance(b, a.detach()) < 2**-8, name  # bf16's rounding at most

    again = qv.convert(twin, recipe)
    with torch.no_grad():
        assert distance(again(tokens).logits, trained.model(tokens).logits) < 0.02


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_best_model_is_loaded_at_the_end(recipe, tmp_path):
    class Spoil(transformers.TrainerCallback):
        """Moves the weights away after the first evaluation, so that the first was the best."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                self.best = {n: plain(p) for n, p in model.named_parameters()}
            if state.global_step == 5:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(-1)

    spoil = Spoil()
    trained = trainer(
        llama(recipe), tmp_path, recipe, [spoil],
        max_steps=6, save_steps=3, eval_steps=3, eval_strategy="steps", save_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trained.train()
    assert trained.state.best_global_step == 3
    for name, parameter in trained.model.named_parameters():
        assert distance(parameter.detach(), spoil.best[name]) < 2**-8, name
    found = trained.evaluate()["eval_loss"]
    assert found == pytest.approx(trained.state.best_metric, rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_checkpointing_changes_nothing(recipe, tmp_path):
    found = []
    for on in (False, True):
        model = llama(recipe)
        options = {"gradient_checkpointing": True} if on else {}
        trained = trainer(model, tmp_path / str(on), recipe, max_steps=4, **options)
        trained.train()
        found.append(losses(trained))
    assert found[0] == found[1]


def test_a_watch_resumes_with_the_same_bits_and_is_not_exported(tmp_path):
    class Watching(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **more):
            moved.update(watch.moved if watch.step() else {})

    found = []
    for resume in (None, str(tmp_path / "checkpoint-10")):
        model, moved = llama("tensorwise"), {}
        # A limit that some layers are above and below by turns.
        watch = qv.watch(model, every=2, fallback="auto", flushed=1.0, kurtosis=25.0, calm=1)
        trained = trainer(model, tmp_path, callbacks=[Watching()])
        trained.train(resume_from_checkpoint=resume)
        assert moved
        found.append((losses(trained), watch.steps, watch.plain, *model.parameters()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert found[0][1] == 20
    qv.export(model, tmp_path / "exported", "bf16")
    _, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]
